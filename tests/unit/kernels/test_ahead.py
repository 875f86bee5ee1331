"""Compiling ahead: each kernel is asked for once, none runs, and binaries are not launched either."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

import triton

from saddle.kernels import ahead, launching, nvrtc


class Kernel:
    """In place of a `triton.jit` function of a pointer, a number and a constant."""

    __name__ = "kernel"
    arg_names = ("x", "count", "BLOCK")

    class Param:
        def __init__(self, is_constexpr: bool) -> None:
            self.is_constexpr = is_constexpr

    params = (Param(False), Param(False), Param(True))

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []

    def warmup(self, x: torch.Tensor, count: int, grid: Any, BLOCK: int) -> None:
        self.compiled.append((x.dtype, count, BLOCK))

    def __getitem__(self, grid: Any) -> Any:
        return lambda x, count, BLOCK: self.ran.append((x.dtype, count, BLOCK))


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernels are compiled, and with a mode that needs no GPU."""
    @contextmanager
    def mode(pool: Any, *, ignore_errors: bool) -> Iterator[None]:
        assert ignore_errors
        yield

    monkeypatch.setattr(triton, "AsyncCompileMode", mode, raising=False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


def test_each_kernel_is_compiled_once_and_none_runs() -> None:
    kernel: Any = Kernel()
    x = torch.zeros(64)
    with ahead.side_by_side() as can:
        assert can and ahead.only_compiles()
        for count in (48, 64, 1, 3, 5):  # multiples of 16 are alike, so are others, and 1 is a constant
            launching.enqueue(kernel, (1, 1, 1), x, count, BLOCK=32)
        launching.enqueue(kernel, (1, 1, 1), x, 48, BLOCK=64)
        launching.enqueue(kernel, (1, 1, 1), x.to(torch.int32), 48, BLOCK=64)
    wanted = [(torch.float32, 48, 32), (torch.float32, 1, 32), (torch.float32, 3, 32), (torch.float32, 48, 64),
              (torch.int32, 48, 64)]  # fmt: skip
    assert kernel.compiled == wanted and kernel.ran == []
    assert not ahead.only_compiles()
    launching.enqueue(kernel, (1, 1, 1), x, 48, BLOCK=32)
    assert kernel.ran == [(torch.float32, 48, 32)] and kernel.compiled == wanted
    with ahead.side_by_side():  # another target may be the current one by now
        launching.enqueue(kernel, (1, 1, 1), x, 48, BLOCK=32)
    assert len(kernel.compiled) == len(wanted) + 1


def test_kernels_of_a_gpu_are_loaded_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that compiled; those that were compiled before as well."""
    class Compiled:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, b"binary"

        @property
        def run(self) -> None:
            loaded[self.name] = threading.get_ident(), set_to.get(threading.get_ident())
            if self.name == "too large":
                raise RuntimeError("out of resource: shared memory")

    class Future:
        def __init__(self, kernel: Compiled | None) -> None:
            self.future, self.kernel = None, kernel

    loaded: dict[str, tuple[int, int | None]] = {}
    set_to: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: set_to.__setitem__(threading.get_ident(), device))
    with ahead.side_by_side():
        ahead.ask("a", lambda: Future(Compiled("future")), 1)
        ahead.ask("b", lambda: Compiled("known"), 1)
        ahead.ask("c", lambda: Future(None), 1)
        ahead.ask("d", lambda: Compiled("elsewhere"), -1)
        ahead.ask("e", lambda: Compiled("too large"), 1)
        assert loaded == {}
    assert loaded.keys() == {"future", "known", "too large"}
    assert all(thread != threading.get_ident() and device == 1 for thread, device in loaded.values())


def test_it_ends_where_something_raises() -> None:
    with pytest.raises(RuntimeError, match="out of blocks"), ahead.side_by_side():
        raise RuntimeError("out of blocks")
    assert not ahead.only_compiles()


@pytest.mark.parametrize("how", ["interpreter", "old Triton"])
def test_where_it_cannot_nothing_changes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "interpreter":
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    else:
        monkeypatch.delattr(triton, "AsyncCompileMode")
    kernel: Any = Kernel()
    with ahead.side_by_side() as can:
        assert not can and not ahead.only_compiles()
        launching.enqueue(kernel, (1, 1, 1), torch.zeros(8), 8, BLOCK=32)
    assert len(kernel.ran) == 1


class Parameters(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int),)


def test_binaries_are_not_launched() -> None:
    class Driver:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: launched.append(name) or 0

    launched: list[str] = []
    kernel = nvrtc.Kernel.__new__(nvrtc.Kernel)
    kernel._driver, kernel._function, kernel._shared_bytes = Driver(), ctypes.c_void_p(), 0  # type: ignore[assignment]
    parameters = Parameters()
    with ahead.side_by_side():
        kernel.launch(1, 32, parameters, 0)
        kernel.launch_apart(1, 32, parameters, 0)
    assert launched == []
    kernel.launch(1, 32, parameters, 0)
    kernel.launch_apart(1, 32, parameters, 0)
    assert launched == ["cuLaunchCooperativeKernel", "cuLaunchKernel"]

"""Launches past Triton's launcher: what was compiled is found again, and nothing that Triton would compile anew."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: nothing is launched")

from saddle.kernels import launching
from saddle.kernels.launching import enqueue


class OnGpu(torch.Tensor):
    """A tensor that says it lies on the first GPU."""

    def get_device(self) -> int:
        return 0


class Kernel:
    """In place of a `triton.jit` function f(x, y, n, WIDTH, PDL); notes what reaches it and what is run directly."""

    __name__ = "f"
    arg_names = ("x", "y", "n", "WIDTH", "PDL")

    def __init__(self, constants: tuple[bool, ...] = (False, False, False, True, True)) -> None:
        self.params = [SimpleNamespace(is_constexpr=one) for one in constants]
        self.through_triton: list[Any] = []
        self.direct: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.through_triton.append((grid, args, constants))
            return SimpleNamespace(run=lambda *all: self.direct.append(all), function="handle", packed_metadata="meta")

        return launch


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_num_inputs", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)


def numbers(count: int = 64, start: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count + 64, dtype=dtype)[start:].as_subclass(OnGpu)


def test_the_second_launch_is_direct() -> None:
    kernel, x, y = Kernel(), numbers(), numbers()
    enqueue(kernel, (1, 2, 3), x, None, 5, WIDTH=8, PDL=2, num_warps=4)
    assert len(kernel.through_triton) == 1 and kernel.direct == []
    enqueue(kernel, (4, 5, 6), y, None, 7, WIDTH=8, PDL=2, num_warps=4)
    assert len(kernel.through_triton) == 1
    assert kernel.direct == [(4, 5, 6, 77, "handle", "meta", None, None, None, y.data_ptr(), None, 7, 8, 2)]


def test_constants_in_their_places_are_those_by_name() -> None:
    kernel, x = Kernel(), numbers()
    for _ in range(2):
        enqueue(kernel, (1, 1, 1), x, x, 5, 8, PDL=0)
    assert kernel.direct[0][-2:] == (8, 0)


@pytest.mark.parametrize("change", ["dtype", "alignment", "none", "one", "sixteen", "wide", "constant", "option"])
def test_what_is_new_goes_through_triton(change: str) -> None:
    kernel, x = Kernel(), numbers()
    enqueue(kernel, (1, 1, 1), x, x, 5, WIDTH=8, PDL=0, num_warps=4)
    first = numbers(dtype=torch.int32) if change == "dtype" else numbers(start=1) if change == "alignment" else x
    second = None if change == "none" else x
    number = {"one": 1, "sixteen": 32, "wide": 1 << 31}.get(change, 5)
    width, warps = 16 if change == "constant" else 8, 8 if change == "option" else 4
    enqueue(kernel, (1, 1, 1), first, second, number, WIDTH=width, PDL=0, num_warps=warps)
    assert len(kernel.through_triton) == 2 and kernel.direct == []


def test_tensors_elsewhere_go_through_triton() -> None:
    kernel = Kernel()
    for _ in range(2):
        enqueue(kernel, (1, 1, 1), torch.zeros(4), None, 5, WIDTH=8, PDL=0)
    assert len(kernel.through_triton) == 2


def test_an_argument_behind_a_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="f has other arguments behind"):
        enqueue(Kernel((False, True, False, True, True)), (1, 1, 1), numbers(), 1, 5, WIDTH=8, PDL=0)


def test_hooks_are_told_of_every_launch() -> None:
    import triton

    kernel, x = Kernel(), numbers()
    hooks, hook = triton.knobs.runtime.launch_enter_hook, lambda metadata: None
    hooks.add(hook)
    try:
        for _ in range(2):
            enqueue(kernel, (1, 1, 1), x, None, 5, WIDTH=8, PDL=0)
    finally:
        hooks.remove(hook)
    assert len(kernel.through_triton) == 2


def test_classes_are_at_least_as_fine_as_those_of_triton() -> None:
    """Two arguments of one class are of one kind for Triton, whatever it would specialise on."""
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("NOT THIS TRITON: it classifies arguments elsewhere")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend = type(make_backend(GPUTarget("cuda", 90, 32)))
    ints = [0, 1, 2, 15, 16, 17, 48, -16, -1, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, 2**40, 2**40 + 3]
    tensors = [torch.zeros(64, dtype=dtype)[start:] for start in range(5)
               for dtype in (torch.float32, torch.int32, torch.uint8, torch.bfloat16)]  # fmt: skip
    args = [*ints, *tensors, None, 1.0, 0.5, True, False]
    kinds = [launching._classify((arg,))[1] for arg in args]
    wanted = [jit.native_specialize_impl(backend, arg, False, True, True) for arg in args]
    assert len(set(map(str, wanted))) > 10
    for (kind, own), (other_kind, other) in itertools.combinations(zip(kinds, wanted, strict=True), 2):
        assert kind != other_kind or own == other

"""Compiling before anything runs, side by side: a first start has dozens of kernels to compile.

Inside `side_by_side` a launch compiles its kernel in a pool of threads and does not run it; launches of binaries that
are compiled already (`nvrtc.Kernel`) do nothing. So a step that is enqueued there leaves what it would write as it is.
At its end the kernels are loaded, in threads too: some versions of Triton call a C compiler for each signature then.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
import triton

# More would wait for Python's lock, and each needs memory while it compiles.
MAX_THREADS = 32
# What was asked for inside `side_by_side`, by key, and on which device it is to run (-1: none); None outside of it.
_asked: dict[Any, tuple[Any, int]] | None = None


def only_compiles() -> bool:
    """Whether launches are to compile and not to run."""
    return _asked is not None


def ask(key: Any, compiling: Callable[[], Any], device: int) -> None:
    """Compile what a launch needs, unless that was asked for before inside this `side_by_side`.

    Args:
        compiling: starts it, and gives what will be the kernel.
        device: index of the GPU that the launch is for; -1: there is none here.
    """
    assert _asked is not None
    if key not in _asked:
        _asked[key] = compiling(), device


@contextlib.contextmanager
def side_by_side() -> Iterator[bool]:
    """Compile what is launched inside, on as many cores as there are. Gives whether this Triton can; if not, nothing
    is changed. A kernel that does not compile is compiled again, and says why, where it is launched to run."""
    global _asked
    mode = getattr(triton, "AsyncCompileMode", None)
    interprets = triton.knobs.runtime.interpret
    if interprets or mode is None or "ignore_errors" not in inspect.signature(mode).parameters:
        yield False
        return
    with _without_collecting(), ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        asked: dict[Any, tuple[Any, int]] = {}
        with mode(pool, ignore_errors=True):
            _asked = asked
            try:
                yield True
            finally:
                _asked = None
        wait([pool.submit(_load, kernel, device) for kernel, device in asked.values() if device >= 0])


def _load(made: Any, device: int) -> None:
    """Load a kernel onto the GPU. One that fails does so again where it runs."""
    kernel = made.kernel if hasattr(made, "future") else made  # None: it did not compile
    if kernel is not None:
        torch.cuda.set_device(device)  # of this thread
        kernel.run  # noqa: B018  a property that loads it


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """No collection of garbage: Python 3.11 before 3.11.8 counts the depth of a source that it parses for all threads
    together, and fails where one parses while another does (gh-106905). Only a collection lets it change threads there.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

"""Compiling before anything runs, side by side: a first start has some eighty kernels to compile, half a second each.

Inside `side_by_side` a launch compiles its kernel in a pool of threads and does not run it; launches of binaries that
are compiled already (`nvrtc.Kernel`) do nothing. So a step that is enqueued there leaves what it would write as it is.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

_asked: set[Any] | None = None  # keys of the launches inside `side_by_side`; None outside of it


def only_compiles() -> bool:
    """Whether launches are to compile and not to run."""
    return _asked is not None


def is_new(key: Any) -> bool:
    """Whether no launch of this key was asked for before, inside this `side_by_side`."""
    assert _asked is not None
    if key in _asked:
        return False
    _asked.add(key)
    return True


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
    with _without_collecting(), ThreadPoolExecutor(os.cpu_count()) as pool, mode(pool, ignore_errors=True):
        _asked = set()
        try:
            yield True
        finally:
            _asked = None


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

"""What is compiled after start is named; a bench's own probes are not, and hide nothing that comes after them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from triton import knobs

from saddle.runner.compile_watch import CompileWatch


@pytest.fixture
def watch() -> Iterator[CompileWatch]:
    made = CompileWatch()
    yield made
    made.stop()


def compile_kernel(name: str) -> None:
    """What Triton does behind a compilation."""
    hook = knobs.runtime.jit_post_compile_hook
    if hook is not None:
        hook(fn=SimpleNamespace(name=name))


def test_a_pause_hides_its_own_kernels_alone(watch: CompileWatch) -> None:
    compile_kernel("warm-up")
    watch.start()
    compile_kernel("late")
    with pytest.raises(ValueError), watch.paused():
        compile_kernel("probe")
        raise ValueError
    compile_kernel("later")
    assert watch.names == ["late", "later"]


def test_a_pause_starts_nothing(watch: CompileWatch) -> None:
    with watch.paused():
        pass
    compile_kernel("before the start")
    assert not watch.names

"""Nothing compiles after start: a Triton kernel that does so anyway is named in the log, and counted for tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs

logger = logging.getLogger(__name__)


class CompileWatch:
    """Watches this process's Triton compilations from `start` on.

    Attributes:
        names: kernels that were compiled since.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def start(self) -> None:
        """Everything compiled from now on is late."""
        self.names.clear()
        knobs.runtime.jit_post_compile_hook = self._compiled

    def stop(self) -> None:
        knobs.runtime.jit_post_compile_hook = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is compiled within serves no step, such as a bench's own probes."""
        hook = knobs.runtime.jit_post_compile_hook
        self.stop()
        try:
            yield
        finally:
            knobs.runtime.jit_post_compile_hook = hook

    def _compiled(self, **details: Any) -> None:
        name = str(getattr(details.get("fn"), "name", "a kernel"))
        self.names.append(name)
        logger.warning("The kernel %s was compiled while serving: the step that needed it waited.", name)

"""Structured output that gets ready in its own thread: loading the compiler must not delay the first token.

The compiler takes a second to import and to learn the vocabulary, and most requests need none of it. So it is made
when the first request with a grammar comes, or a while after the start when there is nothing else to do, whichever is
first; such a request waits for it, all others never do. An engine whose steps are shorter than that thread holds the
interpreter's lock asks for it before it takes requests (`prepare`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from typing import Any, Protocol

from saddle.protocol import GrammarSpec

PREPARE_AFTER_S = 5.0
# How long to wait for quiet, and what counts as that: the pause between two requests of one client does not.
BUSY_S, LOOK_EVERY_S, NUM_IDLE_LOOKS = 60.0, 0.5, 2


class Backend(Protocol):
    """What is made later: see `engine.core.GrammarBackend`."""

    def compile(self, spec: GrammarSpec) -> Future[Any]: ...

    def fill(self, state: Any) -> bytes: ...

    def accept(self, state: Any, token_id: int) -> None: ...

    def close(self) -> None: ...


class DeferredBackend:
    """Stands for a backend that `make` builds, in a thread.

    Args:
        make: builds it; called at most once.
        after_s: seconds after which it is built although nobody asked for it.

    Attributes:
        is_busy: whether there is other work, which building would slow down; may be set later. Read by the thread.
    """

    is_busy: Callable[[], bool] | None = None

    def __init__(self, make: Callable[[], Backend], after_s: float = PREPARE_AFTER_S) -> None:
        self._make, self._after_s = make, after_s
        self._wanted = threading.Event()
        self._closed = False
        self._made: Future[Backend] = Future()
        self._thread = threading.Thread(target=self._run, name="grammar-start", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if not self._wanted.wait(self._after_s):
            self._wait_for_quiet()
        if self._closed:
            self._made.cancel()
            return
        try:
            self._made.set_result(self._make())
        except BaseException as error:  # whoever waits for it must hear of it
            self._made.set_exception(error)

    def _wait_for_quiet(self) -> None:
        """Wait until there was no other work for some looks, a request wants the backend, or it took too long."""
        num_idle, end_s = 0, time.monotonic() + BUSY_S
        while self.is_busy is not None and num_idle < NUM_IDLE_LOOKS and time.monotonic() < end_s:
            if self._wanted.wait(LOOK_EVERY_S):
                return
            num_idle = 0 if self.is_busy() else num_idle + 1

    def prepare(self) -> None:
        """Build it now, and wait until it is there. What goes wrong is told to the requests that want it."""
        self._wanted.set()
        wait([self._made])

    def compile(self, spec: GrammarSpec) -> Future[Any]:
        """As `XGrammarBackend.compile`, but all that goes wrong comes by the future."""
        self._wanted.set()
        state: Future[Any] = Future()

        def hand_over(compiled: Future[Any]) -> None:
            with suppress(InvalidStateError):  # the request may have been given up meanwhile
                if compiled.cancelled():
                    state.cancel()
                elif (error := compiled.exception()) is not None:
                    state.set_exception(error)
                else:
                    state.set_result(compiled.result())

        def compile_now(made: Future[Backend]) -> None:
            if made.cancelled() or made.exception() is not None:
                hand_over(made)
                return
            try:
                compiled = made.result().compile(spec)
            except Exception as error:
                compiled = Future()
                compiled.set_exception(error)
            compiled.add_done_callback(hand_over)

        self._made.add_done_callback(compile_now)
        return state

    def fill(self, state: Any) -> bytes:
        return self._made.result().fill(state)

    def accept(self, state: Any, token_id: int) -> None:
        self._made.result().accept(state, token_id)

    def close(self) -> None:
        """End it, made or not. Safe to call twice."""
        self._closed = True
        self._wanted.set()
        self._thread.join()
        if not self._made.cancelled() and self._made.exception() is None:
            self._made.result().close()

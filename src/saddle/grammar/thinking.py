"""Limits of thinking, which need no grammar and so no compiler: the backend in front of the one for grammars.

A request that only limits its thinking (`spec.unbound`) samples freely but for one token: once it has thought as much
as it may, the end of thinking is all that is left. It never waits for the compiler to be loaded, and an engine without
structured output has it too.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from saddle.errors import InvalidRequest
from saddle.grammar.deferred import DeferredBackend
from saddle.protocol import GrammarSpec


class Limit:
    """How far one request has thought. `end_id` ends its thinking, None once it has ended."""

    __slots__ = ("end_id", "num_thought", "room")

    def __init__(self, end_id: int | None, room: int | None) -> None:
        self.end_id, self.room, self.num_thought = end_id, room, 0


class ThinkingBackend:
    """Serves limits of thinking itself and hands all else on.

    Args:
        vocab_size: ids of the model, padding included.
        calls_id: the token that begins calls; it ends thinking too.
        grammars: for everything else; None where there is no structured output.
    """

    def __init__(self, vocab_size: int, calls_id: int, grammars: DeferredBackend | None) -> None:
        self._vocab_size, self._calls_id, self._grammars = vocab_size, calls_id, grammars
        self._num_bytes = (vocab_size + 31) // 32 * 4
        self._free = self._bits((1 << vocab_size) - 1)

    def _bits(self, ids: int) -> bytes:
        return ids.to_bytes(self._num_bytes, "little")

    def load_when_idle(self, is_busy: Callable[[], bool]) -> None:
        """Load the compiler without being asked only where there is no other work. `is_busy` is called by a thread."""
        if self._grammars is not None:
            self._grammars.is_busy = is_busy

    def prepare(self) -> None:
        """Load the compiler now, and wait until it is there."""
        if self._grammars is not None:
            self._grammars.prepare()

    def compile(self, spec: GrammarSpec) -> Future[Any]:
        """As `engine.core.GrammarBackend.compile`; a limit of thinking is there at once."""
        if spec.kind != "unbound":
            if self._grammars is None:
                raise InvalidRequest("This engine was started without structured output.", spec.param or "grammar")
            return self._grammars.compile(spec)
        if spec.after_token_id is not None and not 0 <= spec.after_token_id < self._vocab_size:
            raise InvalidRequest(f"There is no token {spec.after_token_id}.", spec.param)
        state: Future[Any] = Future()
        state.set_result(Limit(spec.after_token_id, spec.max_thinking_tokens))
        return state

    def fill(self, state: Any) -> bytes:
        """The ids that may come next: little-endian bits, 4 * ceil(vocab_size / 32) bytes."""
        if not isinstance(state, Limit):
            assert self._grammars is not None
            return self._grammars.fill(state)
        if state.end_id is not None and state.room is not None and state.num_thought >= state.room:
            return self._bits(1 << state.end_id)
        return self._free

    def accept(self, state: Any, token_id: int) -> None:
        """Advance by one generated id. Raises ValueError if a grammar does not allow it."""
        if not isinstance(state, Limit):
            assert self._grammars is not None
            self._grammars.accept(state, token_id)
        elif token_id in (state.end_id, self._calls_id):
            state.end_id = None
        else:
            state.num_thought += 1

    def close(self) -> None:
        """Safe to call twice."""
        if self._grammars is not None:
            self._grammars.close()

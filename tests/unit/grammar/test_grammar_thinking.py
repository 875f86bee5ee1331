"""Limits of thinking, without the compiler of grammars; all else is handed on to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from saddle.errors import InvalidRequest
from saddle.grammar import spec as build
from saddle.grammar.deferred import DeferredBackend
from saddle.grammar.thinking import ThinkingBackend
from tests.unit.grammar.test_grammar_deferred import NEVER_S, SPEC, WAIT_S, Made

VOCAB, END, CALLS = 70, 33, 5


def begun(backend: ThinkingBackend, room: int) -> Any:
    return backend.compile(build.unbound(END, room, param="x")).result(0)


def allowed(backend: ThinkingBackend, state: Any) -> list[int]:
    bits = backend.fill(state)
    assert len(bits) == 12
    return list(np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")))


@pytest.mark.parametrize("room", [0, 1, 3])
def test_thinking_ends_when_it_has_no_room_left(room: int) -> None:
    backend = ThinkingBackend(VOCAB, CALLS, None)
    state = begun(backend, room)
    for _ in range(room):
        assert allowed(backend, state) == list(range(VOCAB))
        backend.accept(state, 7)
    assert allowed(backend, state) == [END]
    backend.accept(state, END)
    for _ in range(9):
        assert allowed(backend, state) == list(range(VOCAB)), "free from then on"
        backend.accept(state, 7)


def test_a_call_ends_the_thinking() -> None:
    backend = ThinkingBackend(VOCAB, CALLS, None)
    state = begun(backend, 2)
    for token_id in (7, CALLS, 7, 7, 7):
        backend.accept(state, token_id)
    assert allowed(backend, state) == list(range(VOCAB))


def test_grammars_are_handed_on() -> None:
    made: list[Made] = []
    backend = ThinkingBackend(VOCAB, CALLS, DeferredBackend(lambda: made.append(Made()) or made[-1], NEVER_S))  # type: ignore[func-returns-value]
    begun(backend, 3)
    assert not made, "a limit does not load the compiler"
    state = backend.compile(SPEC).result(WAIT_S)
    assert backend.fill(state) == bytes(4)
    backend.accept(state, 3)
    backend.prepare()
    backend.close()
    assert (made[0].accepted, made[0].closed) == ([3], 1)


def test_without_structured_output() -> None:
    backend = ThinkingBackend(VOCAB, CALLS, None)
    backend.prepare()
    with pytest.raises(InvalidRequest, match="without structured output") as caught:
        backend.compile(build.json_object())
    assert caught.value.param == "response_format"
    with pytest.raises(InvalidRequest, match="no token 70"):
        backend.compile(build.unbound(VOCAB, 3, param="x"))
    backend.close()

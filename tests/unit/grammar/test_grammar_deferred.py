"""The backend that is made in a thread: when, once, and what becomes of requests that wait for it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from saddle.errors import Overloaded
from saddle.grammar import deferred
from saddle.grammar import spec as build
from saddle.grammar.deferred import DeferredBackend
from saddle.protocol import GrammarSpec

NEVER_S = 60.0
WAIT_S = 10.0
SPEC = build.choice(["yes"])


class Made:
    """A backend that says what it was told; `gate` holds up its making."""

    def __init__(self, gate: threading.Event | None = None, refuses: bool = False) -> None:
        if gate is not None:
            assert gate.wait(WAIT_S)
        self.refuses, self.closed = refuses, 0
        self.accepted: list[int] = []

    def compile(self, spec: GrammarSpec) -> Future[Any]:
        if self.refuses:
            raise Overloaded("Too many.", retry_after=1)
        state: Future[Any] = Future()
        state.set_result(("state", spec.source))
        return state

    def fill(self, state: Any) -> bytes:
        return bytes(4)

    def accept(self, state: Any, token_id: int) -> None:
        self.accepted.append(token_id)

    def close(self) -> None:
        self.closed += 1


def test_it_is_made_once_for_the_first_request() -> None:
    made: list[Made] = []

    def make() -> Made:
        made.append(Made())
        return made[-1]

    backend = DeferredBackend(make, NEVER_S)
    time.sleep(0.05)
    assert not made, "nobody asked"
    for _ in range(2):
        state = backend.compile(SPEC).result(WAIT_S)
        assert state == ("state", SPEC.source)
    backend.accept(state, 7)
    assert backend.fill(state) == bytes(4)
    backend.close()
    backend.close()
    assert [(one.accepted, one.closed) for one in made] == [([7], 2)]


def test_it_is_made_after_a_while_without_any_request() -> None:
    done = threading.Event()

    def make() -> Made:
        done.set()
        return Made()

    backend = DeferredBackend(make, 0.01)
    assert done.wait(WAIT_S)
    backend.close()


def test_requests_wait_for_it_without_blocking_the_caller() -> None:
    gate = threading.Event()
    backend = DeferredBackend(lambda: Made(gate), NEVER_S)
    began = time.perf_counter()
    waiting = [backend.compile(SPEC) for _ in range(3)]
    assert time.perf_counter() - began < 1
    assert not any(future.done() for future in waiting)
    waiting[1].cancel()
    gate.set()
    assert waiting[0].result(WAIT_S) == waiting[2].result(WAIT_S) == ("state", SPEC.source)
    assert waiting[1].cancelled()
    backend.close()


def test_a_refusal_and_a_failure_reach_those_who_wait() -> None:
    gate = threading.Event()
    backend = DeferredBackend(lambda: Made(gate, refuses=True), NEVER_S)
    waiting = backend.compile(SPEC)
    gate.set()
    with pytest.raises(Overloaded):
        waiting.result(WAIT_S)
    with pytest.raises(Overloaded):
        backend.compile(SPEC).result(WAIT_S)
    backend.close()

    def fail() -> Made:
        raise ImportError("no compiler")

    broken = DeferredBackend(fail, NEVER_S)
    for _ in range(2):  # waiting for it, and after it failed
        with pytest.raises(ImportError):
            broken.compile(SPEC).result(WAIT_S)
    broken.close()


def test_closed_before_it_was_made_it_never_is() -> None:
    made: list[Made] = []
    backend = DeferredBackend(lambda: made.append(Made()) or made[-1], NEVER_S)  # type: ignore[func-returns-value]
    began = time.perf_counter()
    backend.close()
    assert time.perf_counter() - began < 5
    assert not made


def test_prepared_it_is_there_and_a_failure_waits_for_those_who_ask() -> None:
    made: list[Made] = []
    backend = DeferredBackend(lambda: made.append(Made()) or made[-1], NEVER_S)  # type: ignore[func-returns-value]
    backend.prepare()
    assert len(made) == 1
    assert backend.fill(None) == bytes(4)
    backend.close()

    def fail() -> Made:
        raise ImportError("no compiler")

    broken = DeferredBackend(fail, NEVER_S)
    broken.prepare()
    with pytest.raises(ImportError):
        broken.compile(SPEC).result(WAIT_S)
    broken.close()


def test_it_waits_for_a_quiet_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of another thread's work in the first answers would be seen; a short pause between them is not quiet."""
    monkeypatch.setattr(deferred, "LOOK_EVERY_S", 0.01)
    made: list[Made] = []
    busy = iter([True] * 5 + [False] + [True] * 5 + [False] * 1000)
    looks: list[bool] = []

    def is_busy() -> bool:
        assert not made
        looks.append(next(busy))
        return looks[-1]

    backend = DeferredBackend(lambda: made.append(Made()) or made[-1], 0.05)  # type: ignore[func-returns-value]
    backend.is_busy = is_busy
    end = time.monotonic() + WAIT_S
    while not made and time.monotonic() < end:
        time.sleep(0.01)
    assert made
    assert looks == [True] * 5 + [False] + [True] * 5 + [False] * 2
    backend.close()


@pytest.mark.parametrize("asks", [True, False])
def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    monkeypatch.setattr(deferred, "BUSY_S", NEVER_S if asks else 0.2)
    monkeypatch.setattr(deferred, "LOOK_EVERY_S", 0.01)
    made: list[Made] = []
    backend = DeferredBackend(lambda: made.append(Made()) or made[-1], 0.01)  # type: ignore[func-returns-value]
    backend.is_busy = lambda: True
    time.sleep(0.1)
    assert not made
    if asks:
        assert backend.compile(SPEC).result(WAIT_S) == ("state", SPEC.source)
    else:
        time.sleep(0.4)
    assert made
    backend.close()

"""Runs that nobody waits for: they close what they hold, however early and however badly they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from saddle.parsing.events import Event, TextDelta
from saddle.server.generation import Generation
from saddle.server.responses_background import Run, offset_after
from saddle.server.responses_stream import Answer


class FakeGeneration:
    """Yields batches of events, or raises what is among them; then it waits for ever or ends."""

    def __init__(self, *batches: list[Event] | Exception, ends: bool = True) -> None:
        self.batches, self.ends, self.num_closed = batches, ends, 0

    async def events(self) -> AsyncGenerator[tuple[int, list[Event]], None]:
        for batch in self.batches:
            await asyncio.sleep(0)
            if isinstance(batch, Exception):
                raise batch
            yield 0, batch
        if not self.ends:
            await asyncio.Event().wait()

    def close(self) -> None:
        self.num_closed += 1


def start(generation: FakeGeneration) -> tuple[Run, list[str]]:
    ended: list[str] = []
    answer = Answer("resp_1", "1" * 32, {}, frames=True, queued=True)
    return Run(cast(Generation, generation), answer, lambda run: ended.append(run.answer.status)), ended


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_cancelled_before_it_ran() -> None:
    generation = FakeGeneration([TextDelta("a")], ends=False)
    run, ended = start(generation)
    run.cancel()
    run.cancel()
    await settle()
    assert (ended, generation.num_closed) == (["cancelled"], 1)
    assert run.frames.count(b"response.incomplete") == 2, "one event, which says its name twice"


@pytest.mark.parametrize("batches", [[], [[TextDelta("a")]], [[TextDelta("a")], RuntimeError("/usr/lib/secret")]])
async def test_events_that_break_off_are_a_failure(batches: list[Any]) -> None:
    generation = FakeGeneration(*batches)
    run, ended = start(generation)
    await settle()
    assert (ended, generation.num_closed) == (["failed"], 1)
    assert b"secret" not in run.frames


async def test_change_wakes_every_follower() -> None:
    generation = FakeGeneration([TextDelta("a")], ends=False)
    run, _ = start(generation)
    before = len(run.frames)
    await asyncio.wait_for(asyncio.gather(run.change(None), run.change(None)), 5)
    assert len(run.frames) > before
    await settle()
    await run.change(0.01)  # nothing more comes, and it returns all the same
    run.cancel()
    await settle()


def test_offsets() -> None:
    frames = b"event: a\ndata: 0\n\nevent: b\ndata: 1\n\nevent: c\ndata: 2\n\n"
    assert [frames[offset_after(frames, number) :][:8] for number in (-1, 0, 1, 2, 9)] == [
        b"event: a", b"event: b", b"event: c", b"", b"",
    ]  # fmt: skip

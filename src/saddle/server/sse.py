"""Answers that take a while: server-sent events with keep-alive comments, and work that ends with its client.

A client that goes away is noticed at once, by the connection and not by a failing write: the work is cancelled, which
closes the generation, which aborts it in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from saddle.parsing.events import Event, Failed
from saddle.server.generation import Generation
from saddle.server.replies import status_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
BROKEN = "The server failed while it wrote this answer."


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class GenerationFailed(Exception):
    """A choice of an answer that is not streamed ended in Failed; the message is for the client."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.status = status_of(failed)


class StreamEncoder(Protocol):
    """What an API needs to stream: bytes before, for each batch of a choice's events, and after."""

    def start(self) -> bytes: ...

    def encode(self, index: int, events: list[Event]) -> bytes: ...

    def finish(self) -> bytes: ...

    def failed(self, message: str) -> bytes: ...


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientGone when the client goes first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for running in (task, watch):
            if not running.done():
                running.cancel()
                await asyncio.wait({running})


async def whole(receive: Receive, generation: Generation) -> list[list[Event]]:
    """All events of every choice, for an answer in one piece.

    Raises:
        ClientGone: nobody waits any more; the generation was aborted.
        GenerationFailed: a choice ended in Failed; the others were aborted.
    """
    try:
        return await unless_gone(receive, _collect(generation))
    finally:
        generation.close()


async def _collect(generation: Generation) -> list[list[Event]]:
    choices: list[list[Event]] = [[] for _ in range(generation.num_choices)]
    async with contextlib.aclosing(generation.events()) as batches:
        async for index, events in batches:
            choices[index] += events
            if isinstance(events[-1], Failed):
                raise GenerationFailed(events[-1])
    return choices


class EventStream(Response):
    """Streams a generation. Status and first bytes go out at once: the engine has taken the request already."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, encoder: StreamEncoder, keep_alive_s: float, keep_alive: bytes = KEEP_ALIVE
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._generation, self._encoder = generation, encoder
        self._keep_alive_s = keep_alive_s if keep_alive_s > 0 else None
        self._keep_alive = keep_alive
        self._last_write_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._write(send))
        watch = asyncio.ensure_future(self._watch(receive, send))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.wait({work, watch})
            self._generation.close()
        if not work.cancelled():
            work.result()

    async def _write(self, send: Send) -> None:
        encoder = self._encoder
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send(send, encoder.start())
        try:
            async with contextlib.aclosing(self._generation.events()) as batches:
                async for index, events in batches:
                    data = encoder.encode(index, events)
                    if data:
                        await self._send(send, data)
        except Exception:
            logger.exception("%s: the stream broke", self._generation.job.request_id)
            await self._send(send, encoder.failed(BROKEN))
        await send({"type": "http.response.body", "body": encoder.finish(), "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._last_write_s = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Return when the client is gone; until then write a sign of life whenever nothing was written for a while."""
        gone = asyncio.ensure_future(_gone(receive))
        pause = self._keep_alive_s
        try:
            while not gone.done():
                await asyncio.wait({gone}, timeout=pause)
                if self._keep_alive_s is None or gone.done():
                    continue
                pause = self._last_write_s + self._keep_alive_s - time.monotonic()
                if pause <= 0:
                    await self._send(send, self._keep_alive)
                    pause = self._keep_alive_s
        finally:
            gone.cancel()

"""Responses that run without a client waiting for them: they are polled, followed, resumed and cancelled by id."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from saddle.server.generation import Generation
from saddle.server.responses_stream import Answer
from saddle.server.sse import BROKEN, HEADERS, KEEP_ALIVE, ClientGone, unless_gone

logger = logging.getLogger(__name__)


class Run:
    """A generation whose events become an answer, whoever looks.

    Args:
        on_end: called once, when the answer has ended and the generation is closed.

    Attributes:
        frames: all server-sent events so far; empty ones for an answer that writes none.
    """

    def __init__(self, generation: Generation, answer: Answer, on_end: Callable[[Run], None]) -> None:
        self.answer = answer
        self.frames = bytearray(answer.start())
        self._generation, self._on_end = generation, on_end
        self._changed = asyncio.Event()
        self._task = asyncio.ensure_future(self._work())
        self._task.add_done_callback(self._close)

    @property
    def is_over(self) -> bool:
        return self.answer.has_ended

    def cancel(self) -> None:
        """End the answer where it is and abort its generation; nothing if it has ended."""
        if not self.is_over:
            self._add(self.answer.cancel())
            self._task.cancel()

    async def change(self, timeout_s: float | None) -> None:
        """Wait until there are more frames, at most so long."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def _work(self) -> None:
        try:
            async with contextlib.aclosing(self._generation.events()) as batches:
                async for index, events in batches:
                    self._add(self.answer.encode(index, events))
        except Exception:
            logger.exception("%s: the response broke", self.answer.id)
            self._add(self.answer.failed(BROKEN))

    def _close(self, task: asyncio.Task[None]) -> None:
        self._generation.close()
        if not self.is_over:
            self._add(self.answer.failed(BROKEN))
        self._on_end(self)

    def _add(self, frames: bytes) -> None:
        self.frames += frames
        self._changed.set()
        self._changed = asyncio.Event()


def offset_after(frames: bytes | bytearray, sequence_number: int) -> int:
    """Where the frame behind that number begins. Frames are numbered from 0 and end in an empty line."""
    at = 0
    for _ in range(sequence_number + 1):
        found = frames.find(b"\n\n", at)
        if found < 0:
            return len(frames)
        at = found + 2
    return at


class Follow(Response):
    """Streams the frames of a run from a number on, those to come too. Its client may go and come back."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, keep_alive_s: float, after: int = -1) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._run, self._after = run, after
        self._keep_alive_s = keep_alive_s if keep_alive_s > 0 else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with contextlib.suppress(ClientGone):
            await unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        run = self._run
        at = offset_after(run.frames, self._after)
        while True:
            data = bytes(run.frames[at:])
            at += len(data)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            elif run.is_over:
                break
            else:
                await run.change(self._keep_alive_s)
                if at == len(run.frames) and not run.is_over:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

"""The asyncio side of the engine, and the only door to it for servers.

`EngineClient.start` spawns the engine process and returns at once; `state` tells how far it is. `submit` sends a
request and returns a `TokenStream` once the engine took it. Whatever happens to the engine process, kill -9
included, every open stream ends in one delta with a `finish_reason`: within one second, because the end of the
process closes a pipe that the event loop watches.

All methods belong to one event loop. Nothing here blocks it: sending never waits, and a reader that is slow has its
pending deltas merged into one, so that memory grows with tokens, never with messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import zmq

from saddle.engine.process import BuildCore, Child, spawn
from saddle.errors import (
    EngineDead,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    StartupError,
    Unavailable,
)
from saddle.protocol import (
    Abort,
    Accepted,
    Deltas,
    EngineFailed,
    EngineReady,
    EngineStats,
    Finish,
    FinishReason,
    FromEngine,
    Progress,
    Refused,
    ResetCache,
    Shutdown,
    Submit,
    ToEngine,
    TokenDelta,
    TokenRequest,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1


@dataclass(slots=True)
class EngineState:
    """How far the engine is. `ready` is set once it takes requests, `dead` once it will never again."""

    phase: str = "starting"
    share: float = 0.0
    note: str = ""
    ready: EngineReady | None = None
    dead: str | None = None
    startup_failed: bool = False  # `dead` is the message of a StartupError


def merge(first: TokenDelta, then: TokenDelta) -> TokenDelta:
    """Two deltas of one request as one. The lists of `first` are extended in place."""
    first.token_ids.extend(then.token_ids)
    logprobs = first.logprobs
    if then.logprobs is not None:
        logprobs = [*(logprobs or ()), *then.logprobs] if logprobs is None else logprobs
        if first.logprobs is not None:
            first.logprobs.extend(then.logprobs)
    return msgspec.structs.replace(
        first,
        finish_reason=then.finish_reason,
        stop_token_id=then.stop_token_id,
        error=then.error,
        logprobs=logprobs,
        prompt_logprobs=then.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
        num_cached_tokens=first.num_cached_tokens or then.num_cached_tokens,
        queued_s=then.queued_s if first.queued_s is None else first.queued_s,
        prefill_s=then.prefill_s if first.prefill_s is None else first.prefill_s,
    )


class TokenStream:
    """The deltas of one request, in order: an async iterator that ends after the delta with a `finish_reason`.

    For one reader. Deltas that come while nobody reads are merged, so a reader gets at most one delta a step.
    """

    __slots__ = ("_ended", "_pending", "_waiter", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._pending: TokenDelta | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False  # the last delta was handed out

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def __anext__(self) -> TokenDelta:
        if self._ended:
            raise StopAsyncIteration
        while self._pending is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delta, self._pending = self._pending, None
        self._ended = delta.finish_reason is not None
        return delta

    def _push(self, delta: TokenDelta) -> None:
        self._pending = delta if self._pending is None else merge(self._pending, delta)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def error_of(refused: Refused) -> RequestError:
    """The exception that a refusal stands for, by its status."""
    if refused.status == 404:
        return NotFound(refused.message, refused.param)
    if refused.status == 429:
        return Overloaded(refused.message, refused.param, RETRY_AFTER_S)
    if refused.status == 503:
        return Unavailable(refused.message, refused.param, RETRY_AFTER_S)
    return InvalidRequest(refused.message, refused.param)


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"The engine process was ended by {signal.Signals(-code).name}."
    return f"The engine process ended with exit code {code}."


class EngineClient:
    """One engine process, seen from the event loop that started it."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._streams: dict[str, TokenStream] = {}
        self._answers: dict[str, asyncio.Future[Accepted | Refused]] = {}
        self._settled = asyncio.Event()  # ready or dead
        self._died = asyncio.Event()
        self._stopping = False
        self.state = EngineState()
        self.stats = EngineStats()
        self._loop.add_reader(child.socket.fileno(), self._receive)
        self._loop.add_reader(child.process.sentinel, self._on_exit)
        self._loop.call_soon(self._receive)

    @classmethod
    async def start(cls, build: BuildCore, *, name: str = "saddle-engine") -> EngineClient:
        """Spawn the engine process and return at once; follow `state` or await `wait_ready`.

        Args:
            build: picklable; called in the engine process with a progress function; starts the executor and returns
                the core and what the executor found. A StartupError that it raises ends the process in order.
        """
        return cls(await asyncio.to_thread(spawn, build, name))

    # requests ----------------------------------------------------------------------------------------------------

    async def submit(self, request: TokenRequest) -> TokenStream:
        """Hand a request to the engine; returns when the engine took it, before it runs.

        Raises:
            RequestError: as the engine refused it (InvalidRequest, Overloaded, ...).
            Unavailable: the engine is loading, stopping or dead.
        """
        self._require_ready()
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequest(f"A request with the id {request_id!r} is running already.", "request_id")
        stream = self._streams[request_id] = TokenStream(request_id)
        answer = self._answers[request_id] = self._loop.create_future()
        try:
            self._send(Submit(request))
            refused = await answer
        except BaseException:
            self._drop(request_id)
            raise
        finally:
            self._answers.pop(request_id, None)
        if isinstance(refused, Refused):
            self._streams.pop(request_id, None)
            raise error_of(refused)
        return stream

    def abort(self, request_id: str) -> None:
        """Free a request whose reader is gone. Its stream ends with `FinishReason.ABORT`; unknown ids are fine."""
        self._end(TokenDelta(request_id=request_id, finish_reason=FinishReason.ABORT), Abort([request_id]))

    def finish(self, request_id: str, reason: FinishReason, num_tokens: int) -> None:
        """End a request well after `num_tokens` generated tokens (a stop string). Later tokens are dropped."""
        self._end(TokenDelta(request_id=request_id, finish_reason=reason), Finish(request_id, reason, num_tokens))

    def reset_cache(self) -> None:
        """Forget all cached blocks that no running request uses."""
        if self.state.dead is None:
            self._send(ResetCache())

    # the process -------------------------------------------------------------------------------------------------

    async def wait_ready(self) -> EngineReady:
        """Wait until the engine takes requests.

        Raises:
            StartupError: it cannot start; the message says what would work.
            EngineDead: its process ended.
        """
        await self._settled.wait()
        if self.state.ready is None or self.state.dead is not None:
            message = self.state.dead or "The engine process ended."
            raise StartupError(message) if self.state.startup_failed else EngineDead(message)
        return self.state.ready

    async def wait_dead(self) -> str:
        """Wait until the engine process has ended, and say why."""
        await self._died.wait()
        return self.state.dead or ""

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the engine process: in good order, or by force after `timeout_s` or while it loads.

        Open streams end with an error.
        """
        self._stopping = True
        if self._died.is_set():
            return
        if self.state.ready is None:
            self._child.process.kill()
        else:
            self._send(Shutdown())
        try:
            await asyncio.wait_for(self._died.wait(), timeout_s)
        except asyncio.TimeoutError:
            logger.warning("The engine did not stop within %.0f s and is killed.", timeout_s)
            self._child.process.kill()
            await self._died.wait()

    # inside ------------------------------------------------------------------------------------------------------

    def _require_ready(self) -> None:
        if self.state.dead is not None:
            raise Unavailable(self.state.dead)
        if self._stopping:
            raise Unavailable("The server is shutting down.", retry_after=RETRY_AFTER_S)
        if self.state.ready is None:
            raise Unavailable(f"The model is loading ({self.state.phase}).", retry_after=RETRY_AFTER_S)

    def _send(self, message: ToEngine) -> None:
        with contextlib.suppress(zmq.Again):  # nobody is there any more; the sentinel will say so
            self._child.socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        # Sending may swallow the edge that announces a message: look again.
        self._loop.call_soon(self._receive)

    def _end(self, last: TokenDelta, message: ToEngine) -> None:
        stream = self._streams.pop(last.request_id, None)
        if stream is not None:
            stream._push(last)
            if self.state.dead is None:
                self._send(message)

    def _drop(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None and self.state.dead is None:
            self._send(Abort([request_id]))

    def _receive(self) -> None:
        """Take every message that is there. The descriptor reports edges, so stop at nothing less."""
        while not self._child.socket.closed:
            try:
                data = self._child.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(self._decoder.decode(data))

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            self.stats = message.stats
            for delta in message.deltas:
                self._push(delta)
        elif isinstance(message, (Accepted, Refused)):
            answer = self._answers.get(message.request_id)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, Progress):
            self._child.hide_socket()
            self.state.phase, self.state.share, self.state.note = message.phase, message.share, message.note
        elif isinstance(message, EngineReady):
            self.state.phase, self.state.share, self.state.note = "ready", 1.0, ""
            self.state.ready = message
            self._settled.set()
        else:
            self._fail_all(message)

    def _push(self, delta: TokenDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is not None:
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]
            stream._push(delta)

    def _fail_all(self, failed: EngineFailed) -> None:
        """End everything that waits for the engine, once."""
        if self.state.dead is not None:
            return
        self.state.phase, self.state.dead, self.state.startup_failed = "dead", failed.message, failed.startup
        self._settled.set()
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream._push(TokenDelta(request_id=request_id, finish_reason=FinishReason.ERROR, error=failed.message))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(failed.message))

    def _on_exit(self) -> None:
        """The process ended: its sentinel is readable."""
        self._receive()
        self._loop.remove_reader(self._child.process.sentinel)
        self._loop.remove_reader(self._child.socket.fileno())
        code = self._child.close()
        self._fail_all(EngineFailed("The engine was stopped." if self._stopping else describe_exit(code)))
        self._died.set()

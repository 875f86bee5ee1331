"""A scripted engine and a real HTTP server around it, in the event loop of the test: no processes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp

from saddle.config import ServerConfig
from saddle.engine.client import EngineState, TokenStream
from saddle.errors import RequestError, Unavailable
from saddle.metrics import Metrics
from saddle.parsing.render import Renderer
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineReady, EngineStats, FinishReason, TokenDelta, TokenLogprobs, TokenRequest
from saddle.server.app import build_app
from saddle.server.serve import address, http_server, listen
from saddle.server.service import Service

NAME = "saddle-test"
Script = Callable[[TokenRequest], Iterable[TokenDelta]]


async def until(holds: Callable[[], bool], seconds: float = 5.0, pause_s: float = 0.005) -> None:
    """Wait until `holds()`."""
    end = time.monotonic() + seconds
    for _ in itertools.count():
        if holds():
            return
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(pause_s)


class FakeClient:
    """Answers each request with the deltas of a script; a script may raise a RequestError to refuse.

    A script that ends without a finish reason leaves its stream open.
    """

    def __init__(self, script: Script, max_model_len: int = 512, vocab_size: int = 1024) -> None:
        self.script = script
        self.state = EngineState(phase="ready", share=1.0, ready=EngineReady(max_model_len, 16, 64, vocab_size))
        self.stats = EngineStats(num_blocks=64, num_free_blocks=64)
        self.requests: list[TokenRequest] = []
        self.aborted: list[str] = []
        self.finished: list[tuple[str, FinishReason, int]] = []
        self.streams: dict[str, TokenStream] = {}
        self.pause_s = 0.0
        self._died = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, request: TokenRequest) -> TokenStream:
        if self.state.dead is not None:
            raise Unavailable(self.state.dead)
        await asyncio.sleep(0)
        self.requests.append(request)
        deltas = iter(self.script(request))
        stream = self.streams[request.request_id] = TokenStream(request.request_id)
        task = asyncio.ensure_future(self._play(stream, deltas))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _play(self, stream: TokenStream, deltas: Iterable[TokenDelta]) -> None:
        for delta in deltas:
            await asyncio.sleep(self.pause_s)
            # One delta a read: the stream would merge them.
            await until(lambda: stream._pending is None or stream.request_id not in self.streams, pause_s=0.0)
            if stream.request_id not in self.streams:
                return
            if delta.finish_reason is not None:
                del self.streams[stream.request_id]
            stream._push(delta)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        stream = self.streams.pop(request_id, None)
        if stream is not None:
            stream._push(TokenDelta(request_id=request_id, finish_reason=FinishReason.ABORT))

    def finish(self, request_id: str, reason: FinishReason, num_tokens: int) -> None:
        self.finished.append((request_id, reason, num_tokens))
        self.streams.pop(request_id, None)

    def die(self, message: str) -> None:
        self.state.dead, self.state.phase = message, "dead"
        for request_id, stream in list(self.streams.items()):
            del self.streams[request_id]
            stream._push(TokenDelta(request_id=request_id, finish_reason=FinishReason.ERROR, error=message))
        self._died.set()

    async def wait_ready(self) -> EngineReady:
        await until(lambda: self.state.ready is not None, 60)
        assert self.state.ready is not None
        return self.state.ready

    async def wait_dead(self) -> str:
        await self._died.wait()
        return self.state.dead or ""

    async def stop(self, timeout_s: float = 10.0) -> None:
        self.die("The engine was stopped.")


@dataclass
class Harness:
    """A running server: `http` sends to it."""

    client: FakeClient
    service: Service
    tokenizer: Tokenizer
    base: str
    http: aiohttp.ClientSession
    frames_seen: list[str] = field(default_factory=list)

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        """(status, JSON body)."""
        async with self.http.post(self.base + path, json=body, **kwargs) as reply:
            return reply.status, await reply.json(content_type=None)

    async def get(self, path: str, **kwargs: Any) -> tuple[int, str]:
        async with self.http.get(self.base + path, **kwargs) as reply:
            return reply.status, await reply.text()

    async def frames(self, path: str, body: Any) -> list[str]:
        """The SSE frames of a streamed answer, without `data: `."""
        async with self.http.post(self.base + path, json={**body, "stream": True}) as reply:
            text = await reply.text()
            assert reply.status == 200, text
            assert reply.headers["content-type"].startswith("text/event-stream")
        frames = text.split("\n\n")
        assert frames.pop() == ""
        return [frame.removeprefix("data: ") for frame in frames]


def words(tokenizer: Tokenizer, *pieces: str, eos: bool = True, **last: Any) -> Script:
    """A script that says the pieces, one delta each, and stops at EOS."""

    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        def sure(ids: list[int], asked: int | None) -> list[TokenLogprobs] | None:
            return None if asked is None else [TokenLogprobs(i, 0.0, 1, [(i, 0.0)]) for i in ids]

        prompt = sure(request.prompt_ids, request.params.prompt_logprobs)
        for number, piece in enumerate(pieces):
            ids = tokenizer.encode(piece)
            first: dict[str, Any] = {"queued_s": 0.001, "prefill_s": 0.002, "num_cached_tokens": 4,
                                     "prompt_logprobs": [None, *prompt[1:]] if prompt else None}  # fmt: skip
            yield TokenDelta(request_id=request.request_id, token_ids=ids, logprobs=sure(ids, request.params.logprobs),
                             **(first if number == 0 else {}))  # fmt: skip
        ids = [tokenizer.eos_id] if eos else []
        yield TokenDelta(request_id=request.request_id, token_ids=ids, logprobs=sure(ids, request.params.logprobs),
                         **{"finish_reason": FinishReason.STOP if eos else FinishReason.LENGTH, **last})  # fmt: skip

    return script


@contextlib.asynccontextmanager
async def running(tokenizer: Tokenizer, script: Script, config: ServerConfig | None = None,
                  defaults: dict[str, Any] | None = None) -> AsyncIterator[Harness]:  # fmt: skip
    config = config or ServerConfig(host="127.0.0.1", port=0, access_log=False)
    client = FakeClient(script, vocab_size=tokenizer.vocab_size)
    replay = ReplayStore(1 << 20)
    renderer = Renderer(tokenizer, None, "You are a helpful assistant.", replay, 1 << 20)
    service = Service(cast(Any, client), tokenizer, renderer, replay, config, Metrics(NAME),
                      model_names=(NAME, "alias"), defaults=defaults or {})  # fmt: skip
    sock = listen(config)
    server = http_server(build_app(service, config), config)
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    await until(lambda: server.started)
    try:
        async with aiohttp.ClientSession() as http:
            yield Harness(client, service, tokenizer, address(config, sock), http)
    finally:
        server.should_exit = True
        await serving
        service.close()
        sock.close()


@contextlib.contextmanager
def in_thread(tokenizer: Tokenizer, script: Script) -> Iterator[int]:
    """The port of a server in a thread, for tests that are not coroutines."""
    found: list[int] = []
    up, done = threading.Event(), threading.Event()

    async def main() -> None:
        async with running(tokenizer, script) as server:
            found.append(int(server.base.rsplit(":", 1)[1]))
            up.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert up.wait(10)
    yield found[0]
    done.set()
    thread.join()


def refuse(error: RequestError) -> Script:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        raise error

    return script

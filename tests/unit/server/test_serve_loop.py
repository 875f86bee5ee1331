"""Listening, draining, dying: the life of the API process, with a scripted engine in place of a process."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from saddle.config import ServerConfig
from saddle.errors import StartupError
from saddle.metrics import Metrics
from saddle.parsing.render import Renderer
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineStats, FinishReason, TokenDelta
from saddle.server.app import build_app
from saddle.server.progress import LOOK_EVERY_S
from saddle.server.serve import COLLECT_AFTER, address, listen, report_line, serve
from saddle.server.service import Service
from tests.unit.server.harness import NAME, FakeClient, running, until, words

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


class Running:
    """`serve` as a task of the test's loop."""

    def __init__(self, tokenizer: Tokenizer, script: Any, **fields: Any) -> None:
        self.config = ServerConfig(host="127.0.0.1", port=0, access_log=False, **fields)
        self.client = FakeClient(script, vocab_size=tokenizer.vocab_size)
        replay = ReplayStore(1 << 20)
        renderer = Renderer(tokenizer, None, "Hello.", replay, 1 << 20)
        client: Any = self.client
        self.service = Service(client, tokenizer, renderer, replay, self.config, Metrics(NAME), model_names=(NAME,),
                               defaults={})  # fmt: skip
        self.sock = listen(self.config)
        self.base = address(self.config, self.sock)
        app = build_app(self.service, self.config)
        self.task = asyncio.ensure_future(
            serve(app, self.service, self.client, self.config, self.sock)  # type: ignore[arg-type]
        )

    async def until_open(self) -> None:
        async with aiohttp.ClientSession() as http:
            for _ in range(200):
                try:
                    async with http.get(self.base + "/livez"):
                        return
                except aiohttp.ClientError:
                    await asyncio.sleep(0.01)
        raise AssertionError("the port did not open")


def slow(tokenizer: Tokenizer, release: asyncio.Event) -> Any:
    """One token at once; the end when released."""

    class Slow(FakeClient):
        async def _play(self, stream: Any, deltas: Iterable[TokenDelta]) -> None:
            stream._push(TokenDelta(request_id=stream.request_id, token_ids=tokenizer.encode("a")))
            await release.wait()
            if stream.request_id in self.streams:
                stream._push(TokenDelta(request_id=stream.request_id, finish_reason=FinishReason.LENGTH))

    return Slow


async def start_stream(http: aiohttp.ClientSession, base: str) -> aiohttp.ClientResponse:
    reply = await http.post(base + CHAT, json=HI)
    await reply.content.readany()
    return reply


async def test_sigterm_drains(tokenizer: Tokenizer) -> None:
    release = asyncio.Event()
    server = Running(tokenizer, lambda request: [])
    server.client.__class__ = slow(tokenizer, release)
    await server.until_open()
    async with aiohttp.ClientSession() as http:
        reply = await start_stream(http, server.base)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: server.service.draining)
        async with http.post(server.base + CHAT, json=HI) as refused:
            assert refused.status == 503
            assert "retry-after" in refused.headers
        release.set()
        rest = await reply.text()
        assert '"finish_reason":"length"' in rest
        assert rest.endswith("data: [DONE]\n\n")
    assert await asyncio.wait_for(server.task, 3) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(server.base.rsplit(":", 1)[1])), 1)


@pytest.mark.parametrize("how", ["second signal", "timeout"])
async def test_what_does_not_finish_is_ended_with_an_error(tokenizer: Tokenizer, how: str) -> None:
    server = Running(tokenizer, lambda request: [], shutdown_timeout_s=0.3 if how == "timeout" else 60)
    server.client.__class__ = slow(tokenizer, asyncio.Event())
    await server.until_open()
    async with aiohttp.ClientSession() as http:
        reply = await start_stream(http, server.base)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: server.service.draining)
        if how == "second signal":
            os.kill(os.getpid(), signal.SIGINT)
        rest = await reply.text()
    assert await asyncio.wait_for(server.task, 3) == 0
    assert time.monotonic() - began < 3
    assert "The engine was stopped." in rest
    assert rest.endswith("data: [DONE]\n\n")


async def test_engine_death_ends_the_process_with_a_code(tokenizer: Tokenizer) -> None:
    server = Running(tokenizer, lambda request: [])
    server.client.__class__ = slow(tokenizer, asyncio.Event())
    await server.until_open()
    async with aiohttp.ClientSession() as http:
        reply = await start_stream(http, server.base)
        began = time.monotonic()
        server.client.die("The engine process was ended by SIGKILL.")
        rest = await reply.text()
    assert time.monotonic() - began < 1
    assert json.loads(rest.split("\n\n")[-3].removeprefix("data: "))["error"]["message"].endswith("SIGKILL.")
    assert await asyncio.wait_for(server.task, 3) == 1


async def test_engine_that_cannot_start(tokenizer: Tokenizer) -> None:
    server = Running(tokenizer, words(tokenizer, "x"))
    server.client.state.ready, server.client.state.startup_failed = None, True
    await server.until_open()
    server.client.die("--max-model-len 9 does not fit; the largest is 4.")
    with pytest.raises(StartupError, match="largest is 4"):
        await asyncio.wait_for(server.task, 3)


async def test_nothing_is_collected_when_the_engine_is_ready(tokenizer: Tokenizer) -> None:
    """A collection of all that the start made takes 15 to 25 ms: it belongs to the time of loading."""
    full: list[float] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            full.append(time.monotonic())

    before = gc.get_threshold()
    gc.callbacks.append(watch)
    try:
        server = Running(tokenizer, words(tokenizer, "x"))
        ready, server.client.state.ready = server.client.state.ready, None
        await server.until_open()
        await until(lambda: bool(full))
        assert gc.get_freeze_count() and gc.get_threshold() == COLLECT_AFTER
        ready_s, server.client.state.ready = time.monotonic(), ready
        await asyncio.sleep(3 * LOOK_EVERY_S)
        assert max(full) < ready_s
    finally:
        gc.callbacks.remove(watch)
        gc.set_threshold(*before)
        gc.unfreeze()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(server.task, 3) == 0


async def test_idle_server_stops_at_once(tokenizer: Tokenizer) -> None:
    server = Running(tokenizer, words(tokenizer, "x"))
    await server.until_open()
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(server.task, 3) == 0
    assert time.monotonic() - began < 1


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"Port {port} of 127.0.0.1 is in use; choose another with --port"):
            listen(ServerConfig(host="127.0.0.1", port=port))


def test_address_that_is_not_ours() -> None:
    with pytest.raises(StartupError, match=r"Cannot listen on 192\.0\.2\.1"):
        listen(ServerConfig(host="192.0.2.1", port=0))


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "saddle.sock"
    config = ServerConfig(uds=str(path))
    listen(config).close()
    sock = listen(config)  # a socket left behind is replaced
    assert address(config, sock) == f"unix:{path}"
    sock.close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(StartupError, match="is a file already"):
        listen(config)
    assert path.read_text() == "precious"


def test_tls_files_that_cannot_be_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from saddle.server.serve import http_server

    config = ServerConfig(ssl_keyfile=str(tmp_path / "no.key"), ssl_certfile=str(tmp_path / "no.pem"))
    with pytest.raises(StartupError, match="--ssl-certfile"):
        http_server(None, config)  # type: ignore[arg-type]


def test_report_line() -> None:
    then = EngineStats(num_prompt_tokens=100, num_generated_tokens=10, num_cache_queries=100, num_cache_hits=0)
    now = EngineStats(
        num_prompt_tokens=300, num_generated_tokens=60, num_cache_queries=300, num_cache_hits=50, num_running=2,
        num_waiting=1, num_blocks=100, num_free_blocks=60, num_cached_blocks=20,
    )  # fmt: skip
    assert report_line(then, now, 10.0) == (
        "prompt 20.0 tok/s, generation 5.0 tok/s, running 2, waiting 1, KV usage 20.0%, prefix hit rate 25.0%"
    )




async def test_answers_are_not_delayed_by_the_network_stack(tokenizer: Tokenizer) -> None:
    """Header and body are two writes: with Nagle's algorithm on, each answer would wait 40 ms for an ACK."""
    async with running(tokenizer, words(tokenizer, "x")) as server:
        slowest = []
        for _ in range(3):
            began = time.monotonic()
            for _ in range(10):
                await server.post("/tokenize", {"prompt": "a"})
            slowest.append(time.monotonic() - began)
    assert min(slowest) < 0.3


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """(key, certificate) for 127.0.0.1, signed by itself."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        capture_output=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return key, certificate


async def test_tls(tokenizer: Tokenizer, certificate: tuple[Path, Path]) -> None:
    files = {"ssl_keyfile": str(certificate[0]), "ssl_certfile": str(certificate[1])}
    server = Running(tokenizer, words(tokenizer, "</think>", "safe"), **files)
    assert server.base.startswith("https://127.0.0.1:")
    trusted = ssl.create_default_context(cafile=str(certificate[1]))
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as http,
        http.post(server.base + CHAT, json=HI) as reply,
    ):
        assert '"content":"safe"' in await reply.text()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(server.task, 3) == 0


async def test_unix_socket_serves_and_goes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    server = Running(tokenizer, words(tokenizer, "</think>", "local"), uds=str(path))
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http,
        http.post("http://saddle" + CHAT, json=HI) as reply,
    ):
        assert '"content":"local"' in await reply.text()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(server.task, 3) == 0
    assert not path.exists()

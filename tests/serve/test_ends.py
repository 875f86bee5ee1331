"""How servers end: drained, and by kill -9 of either process under load. Nothing may be left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.serve.conftest import SCRIPTED
from tests.serve.processes import ServerProcess, left_behind, port_is_free, wait_for
from tests.unit.server.harness import until

CHAT = "/v1/chat/completions"
STREAMS = 8


def body(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "stream": True}


class Load:
    """Streams that read until their connection or the answer ends."""

    def __init__(self, http: aiohttp.ClientSession, base: str, text: str = "count 3000") -> None:
        self.http, self.base, self.text = http, base, text
        self.started = 0
        self.ended_s: list[float] = []
        self.last: list[str] = []

    async def one(self) -> None:
        lines: list[str] = []
        try:
            async with self.http.post(self.base + CHAT, json=body(self.text)) as reply:
                assert reply.status == 200
                self.started += 1
                async for line in reply.content:
                    if line.startswith(b"data: "):
                        lines = [*lines[-1:], line[6:].strip().decode()]
        except aiohttp.ClientError as error:
            lines = [type(error).__name__]
        self.ended_s.append(time.monotonic())
        self.last.append(" ".join(lines))

    async def start(self) -> list[asyncio.Task[None]]:
        tasks = [asyncio.ensure_future(self.one()) for _ in range(STREAMS)]
        await until(lambda: self.started == STREAMS, 20)
        await asyncio.sleep(0.1)
        return tasks


def start(folder: Path, *flags: str) -> ServerProcess:
    return ServerProcess([str(folder), "--step-s", "0.005", *flags], SCRIPTED)


async def test_kill_of_the_engine_process(tokenizer_folder: Path) -> None:
    before = left_behind()
    server = start(tokenizer_folder)
    try:
        async with aiohttp.ClientSession() as http:
            load = Load(http, server.base)
            tasks = await load.start()
            killed_s = time.monotonic()
            server.engine().kill()
            await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert max(load.ended_s) - killed_s < 1.0, "every stream ends within a second"
        for last in load.last:
            error, done = last.rsplit(" ", 1)
            assert done == "[DONE]"
            assert "SIGKILL" in json.loads(error)["error"]["message"]
        assert server.wait(5) == 1
        assert "SIGKILL" in server.log()
        assert server.leaves_no_process()
        assert port_is_free(server.port)
        assert left_behind() <= before
    finally:
        server.kill()


async def test_kill_of_the_api_process(tokenizer_folder: Path) -> None:
    before = left_behind()
    server = start(tokenizer_folder)
    try:
        async with aiohttp.ClientSession() as http:
            load = Load(http, server.base)
            tasks = await load.start()
            server.process.kill()
            await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert len(load.last) == STREAMS
        assert server.wait(5) == -signal.SIGKILL
        assert server.known_children, "the engine process was seen"
        assert server.leaves_no_process(5)
        assert port_is_free(server.port)
        assert left_behind() <= before
    finally:
        server.kill()


async def test_sigterm_lets_streams_finish(tokenizer_folder: Path) -> None:
    server = start(tokenizer_folder)
    try:
        async with aiohttp.ClientSession() as http:
            load = Load(http, server.base, "count 60")
            tasks = await load.start()
            server.signal(signal.SIGTERM)
            wait_for(lambda: "draining" in server.log(), 2, "draining")
            async with http.post(server.base + CHAT, json=body("hi")) as refused:
                assert refused.status == 503
                assert int(refused.headers["retry-after"]) >= 1
            assert server.status("/health") == 503
            assert server.status("/livez") == 200
            await asyncio.wait_for(asyncio.gather(*tasks), 20)
        for last in load.last:
            assert last.endswith("[DONE]")
            assert json.loads(last.rsplit(" ", 1)[0])["choices"][0]["finish_reason"] == "stop"
        assert server.wait(5) == 0
        assert server.leaves_no_process()
        assert port_is_free(server.port)
    finally:
        server.kill()


@pytest.mark.parametrize("how", ["second signal", "timeout"])
async def test_a_drain_that_is_cut_short(tokenizer_folder: Path, how: str) -> None:
    server = start(tokenizer_folder, "--shutdown-timeout", "0.5" if how == "timeout" else "60")
    try:
        async with aiohttp.ClientSession() as http:
            load = Load(http, server.base)
            tasks = await load.start()
            server.signal(signal.SIGTERM)
            wait_for(lambda: "draining" in server.log(), 2, "draining")
            if how == "second signal":
                server.signal(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert all("error" in last and last.endswith("[DONE]") for last in load.last), load.last
        assert server.wait(5) == 0
        assert server.leaves_no_process()
    finally:
        server.kill()


def test_port_in_use_is_one_line_and_a_code(tokenizer_folder: Path) -> None:
    first = start(tokenizer_folder)
    try:
        second = ServerProcess([str(tokenizer_folder)], port=first.port, ready=False)
        code = second.wait(30)
        lines = [line for line in second.log().splitlines() if line]
        second.kill()
    finally:
        assert first.stop() == 0
    assert code == 1
    assert lines == [f"saddle serve: Port {first.port} of 127.0.0.1 is in use; choose another with --port."]

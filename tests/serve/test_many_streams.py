"""Many clients at once, some of them rude: all end, none gets another one's text, no block is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.serve.conftest import SCRIPTED
from tests.serve.processes import ServerProcess

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def crowded(tokenizer_folder: Path) -> Iterator[ServerProcess]:
    """Too few blocks for 64 streams, so that some must give way, and steps that take their time."""
    server = ServerProcess([str(tokenizer_folder), "--blocks", "400", "--max-model-len", "2048", "--step-s", "0.002"],
                           SCRIPTED)  # fmt: skip
    yield server
    assert server.stop() == 0, server.log()
    assert server.leaves_no_process()


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], "stream": True, **fields}


async def streamed(http: aiohttp.ClientSession, text: str, **fields: Any) -> tuple[str, str | None]:
    """(content, finish_reason) of a stream that must end in [DONE]."""
    content, finish, last = "", None, ""
    async with http.post(CHAT, json=body(text, **fields)) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            last = line[6:].strip().decode()
            if last == "[DONE]":
                continue
            chunk = json.loads(last)
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                content += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
    assert last == "[DONE]"
    return content.strip(), finish


async def leave_early(http: aiohttp.ClientSession, text: str) -> None:
    reply = await http.post(CHAT, json=body(text))
    await reply.content.readany()
    reply.close()


async def too_long(http: aiohttp.ClientSession) -> tuple[int, str]:
    async with http.post(CHAT, json=body("word " * 3000)) as reply:
        return reply.status, (await reply.json())["error"]["message"]


async def test_sixty_four_streams(crowded: ServerProcess) -> None:
    """60 streams to the end, 3 clients that leave in the middle, one prompt that is too long."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(crowded.base, connector=connector, timeout=timeout) as http:
        texts = [f"count {30 + i}" if i % 2 else f"say this is the text of stream {i} " * 4 for i in range(60)]
        results: list[Any] = await asyncio.gather(
            *(streamed(http, text) for text in texts),
            *(leave_early(http, f"count {500 + i}") for i in range(3)),
            too_long(http),
        )
    for index, (text, (content, finish)) in enumerate(zip(texts, results[:60], strict=True)):
        wanted = " ".join(map(str, range(1, 31 + index))) if index % 2 else text.strip().upper()
        assert content == wanted, f"stream {index}"
        assert finish == "stop"
    status, message = results[-1]
    assert status == 400
    assert message.startswith("This model's maximum context length is 2048 tokens. However, your prompt contains ")
    samples = await asyncio.to_thread(crowded.wait_idle)
    assert samples["request_success_total{stop}"] == 60
    assert samples["request_success_total{abort}"] == 3
    assert samples["num_preemptions_total"] > 0, "the pool was meant to be too small"
    assert samples["kv_cache_blocks{total}"] == 400


async def test_a_client_that_leaves_frees_its_blocks_within_a_step(crowded: ServerProcess) -> None:
    before = crowded.metrics()
    async with aiohttp.ClientSession(crowded.base) as http:
        reply = await http.post(CHAT, json=body("count 400"))
        await reply.content.readany()
        assert crowded.metrics()["kv_cache_blocks{used}"] > 0
        steps = crowded.metrics()["engine_steps_total"]
        reply.close()
        after = await asyncio.to_thread(crowded.wait_idle, 2)
    assert after["request_success_total{abort}"] == before["request_success_total{abort}"] + 1
    # 2 ms a step: from the question above to the abort and one step after it pass few steps, not the 1,500 of the text.
    assert after["engine_steps_total"] - steps < 60


async def test_stop_string_frees_the_blocks_too(crowded: ServerProcess) -> None:
    async with aiohttp.ClientSession(crowded.base) as http:
        content, finish = await streamed(http, "count 400", stop=["11 12"])
    assert (content, finish) == ("1 2 3 4 5 6 7 8 9 10", "stop")
    assert (await asyncio.to_thread(crowded.wait_idle, 2))["kv_cache_blocks{used}"] == 0

"""What a token costs in the API process, all of it: from the engine's socket to the client's, parsers included.

256 streams at 10,000 tokens a second leave 100 us a token to one core. CPU time is measured, not wall time, so that
other work on the machine does not matter.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.serve.conftest import SCRIPTED
from tests.serve.processes import ServerProcess

STREAMS, NUMBERS = 128, 100
MOST_US = 60.0


@pytest.fixture(scope="module")
def wide(tokenizer_folder: Path) -> Iterator[ServerProcess]:
    flags = ["--rows", str(STREAMS), "--blocks", "20000", "--step-s", "0.012", "--fast"]
    server = ServerProcess([str(tokenizer_folder), *flags], SCRIPTED)
    yield server
    assert server.stop() == 0, server.log()


async def chunks_of(port: int) -> int:
    """Chunks of one stream, read with as little work as possible."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"messages": [{"role": "user", "content": f"count {NUMBERS}"}], "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    text = b""
    while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        data = await reader.read(1 << 16)
        assert data, text[-200:]
        text += data
    writer.close()
    return text.count(b"data: {")


async def test_a_token_costs_little(wide: ServerProcess) -> None:
    api = psutil.Process(wide.process.pid)
    before, tokens = api.cpu_times(), wide.metrics()["generation_tokens_total"]
    chunks = sum(await asyncio.gather(*(chunks_of(wide.port) for _ in range(STREAMS))))
    after = api.cpu_times()
    tokens = wide.metrics()["generation_tokens_total"] - tokens
    cost_us = (after.user + after.system - before.user - before.system) / tokens * 1e6
    assert chunks > 0.8 * tokens, "the stream was merged, so this measured something else"
    assert cost_us < MOST_US, f"{cost_us:.1f} us a token"
    print(f"{cost_us:.1f} us of CPU a token in the API process")

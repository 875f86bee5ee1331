"""Sub-agents started at once on one long prompt: it is computed once, whoever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.serve.conftest import SCRIPTED
from tests.serve.device import BLOCK_SIZE
from tests.serve.processes import ServerProcess

NUM_AGENTS = 8


@pytest.fixture(scope="module")
def roomy(tokenizer_folder: Path) -> Iterator[ServerProcess]:
    """Room for a long prompt, and steps slow enough that all agents are there before it is computed."""
    arguments = ["--blocks", "4096", "--max-model-len", "32768", "--step-s", "0.05"]
    server = ServerProcess([str(tokenizer_folder), *arguments], SCRIPTED)
    yield server
    assert server.stop() == 0, server.log()


async def test_a_long_prompt_is_computed_once(roomy: ServerProcess) -> None:
    rules = "".join(f"Rule {n}: keep file {n * 7919} as it is. " for n in range(640))
    system = f"You are one of several agents. {rules}"

    async def ask(http: aiohttp.ClientSession, number: int) -> dict[str, Any]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"say task {number}"}]
        async with http.post("/v1/chat/completions", json={"messages": messages}) as reply:
            assert reply.status == 200, await reply.text()
            return dict(await reply.json())

    before = roomy.metrics()
    async with aiohttp.ClientSession(roomy.base, timeout=aiohttp.ClientTimeout(total=120)) as http:
        answers = await asyncio.gather(*(ask(http, number) for number in range(NUM_AGENTS)))
    after = roomy.wait_idle()
    lengths = [answer["usage"]["prompt_tokens"] for answer in answers]
    assert min(lengths) > 20_000
    assert {answer["choices"][0]["message"]["content"].strip() for answer in answers} == {
        f"SAY TASK {number}" for number in range(NUM_AGENTS)
    }
    computed = after["iteration_tokens_total_sum"] - before["iteration_tokens_total_sum"]
    # One whole prompt; of the others the last block of what is shared, and their own question and answer.
    own = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert computed <= max(lengths) + own + NUM_AGENTS * 4 * BLOCK_SIZE, (computed, lengths)

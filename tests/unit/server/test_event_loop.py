"""What a single request may cost everybody else: nothing that it says keeps the event loop from the other requests.

Bodies are read in one go (a few milliseconds a megabyte); all work behind that runs on a thread, and takes time in
proportion to the body.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from saddle.parsing.tokenizer import Tokenizer
from saddle.server.anthropic_messages import to_turns
from saddle.server.anthropic_parts import Signer
from saddle.server.responses_items import Reader, Seal, as_items
from tests.unit.server.harness import running, words

MANY = 60_000
TEXT = {"type": "text", "text": "a few words, and then some more of them. " * 5}


@contextlib.asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """Seconds between the turns of an endless task of the event loop."""
    gaps: list[float] = []

    async def beat() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    task = asyncio.ensure_future(beat())
    yield gaps
    task.cancel()


def heavy_schema() -> dict[str, Any]:
    """One that takes some tenths of a second to check: each branch is held against all others."""
    return {"oneOf": [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]} for n in range(280)]}


HEAVY: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {"max_tokens": 1, "output_config": {"format": {"type": "json_schema", "schema": heavy_schema()}}}),
    ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": heavy_schema()}}}),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": heavy_schema()}}}),
    ("/tokenize", {"return_token_strs": True}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields"), HEAVY, ids=[path for path, _ in HEAVY])
async def test_others_are_answered_meanwhile(tokenizer: Tokenizer, path: str, fields: dict[str, Any]) -> None:
    content = "a b c " * (100_000 if path == "/tokenize" else 1)
    said = {"input" if path == "/v1/responses" else "messages": [{"role": "user", "content": content}]}
    shares = []
    async with running(tokenizer, words(tokenizer, "</think>", "\n\nyes")) as server:
        for _ in range(3):  # another program may have the core for a moment
            async with heartbeat() as gaps:
                began = time.perf_counter()
                status, reply = await server.post(path, {**said, **fields})
                took = time.perf_counter() - began
            assert status == 200, reply
            assert took > 0.05, "too light to show anything"
            shares.append(max(gaps) / took)
    assert min(shares) < 0.25, shares


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def ai(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


THOUGHT = {"type": "thinking", "thinking": TEXT["text"]}
LONG: list[list[dict[str, Any]]] = [
    [user([TEXT])] * MANY,
    [user("go"), *[ai([TEXT])] * MANY],
    [user("go"), ai([TEXT] * MANY)],
    [user("go"), ai([THOUGHT] * MANY + [TEXT])],
    [user("go"), *[{"role": "system", "content": TEXT["text"]}] * MANY],
]


@pytest.mark.parametrize("messages", LONG, ids=["users", "turns", "texts", "thoughts", "systems"])
def test_a_turn_of_very_many_messages(messages: list[dict[str, Any]]) -> None:
    """Putting its text together takes time as the text is long: with one copy a message it took a minute."""
    began = time.perf_counter()
    turns = to_turns(None, messages, Signer())
    assert time.perf_counter() - began < 2.5
    assert len(turns.messages) <= 2
    text = "".join(turn["content"] + turn.get("reasoning_content", "") for turn in turns.messages)
    assert text.count(str(TEXT["text"])) >= MANY


@pytest.mark.parametrize("item", [
    {"type": "message", "role": "assistant", "id": "msg_0123456789abcdef_1", "content": str(TEXT["text"])},
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": TEXT["text"]}]},
], ids=["message", "reasoning"])  # fmt: skip
def test_a_turn_of_very_many_items(item: dict[str, Any]) -> None:
    items = as_items([item] * (MANY // 3), "k")
    reader = Reader(Seal())
    for _ in range(3):  # as of three responses, one behind the other
        reader.add(items)
    began = time.perf_counter()
    [turn] = reader.messages
    assert time.perf_counter() - began < 1.0
    assert (turn["content"] + turn.get("reasoning_content", "")).count(str(TEXT["text"])) == MANY

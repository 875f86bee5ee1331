"""One timed request against a scripted server: what counts as a chunk, what counts as a success."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
import pytest

from saddle.bench import client
from saddle.bench.client import RequestOutput
from saddle.bench.sse import Splitter

USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def text(value: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "logprobs": None, "finish_reason": None}]}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


async def send(url: str, api: client.Api, body: dict[str, Any]) -> RequestOutput:
    output = RequestOutput(prompt_tokens=3)
    path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
    async with aiohttp.ClientSession() as session:
        await client.send(session, url + path, api, msgspec.json.encode(body), {}, output)
    return output


async def test_completion_times_and_counts(scripted: Callable[..., Any]) -> None:
    server = await scripted(lambda _: [0.05, text("a"), 0.1, text("b"), text(""), 0.15, USAGE])
    output = await send(server.url, "completions", client.completion_body("hi", 9))
    assert output.success, output.error
    assert (output.text, output.prompt_tokens, output.output_tokens) == ("ab", 7, 5)
    assert len(output.itl) == 2  # the usage chunk and [DONE] are not tokens
    assert 0.05 <= output.ttft < 0.1
    assert 0.1 <= output.itl[0] < 0.2
    assert output.latency == pytest.approx(output.ttft + sum(output.itl))
    assert output.latency < 0.25  # the pause before the usage chunk does not count
    assert server.bodies == [{
        "prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 9, "logprobs": None, "stream": True,
        "stream_options": {"include_usage": True},
    }]  # fmt: skip


@pytest.mark.parametrize(("chunk", "counted"), [
    (delta(role="assistant", content=""), None),
    (delta(content="x"), "x"),
    (delta(content=""), ""),
    (delta(reasoning="r", reasoning_content="r"), "r"),
    (delta(reasoning_content="r"), "r"),
    (delta(tool_calls=[{"index": 0}]), ""),
    (delta(tool_calls=[], content=None), None),
    (delta(function_call={"name": "f"}), ""),
    (delta(), None),
    (USAGE, None),
])  # fmt: skip
def test_chat_chunks_that_count(chunk: dict[str, Any], counted: str | None) -> None:
    decoded = msgspec.json.decode(json.dumps(chunk), type=client._Chunk)
    assert client.counted_text(decoded, "chat") == counted


async def test_chat_request(scripted: Callable[..., Any]) -> None:
    script = [delta(role="assistant", content=""), delta(reasoning="hm"), delta(content="yes"), delta(), USAGE]
    server = await scripted(lambda _: script)
    output = await send(server.url, "chat", client.chat_body("hi", 4))
    assert (output.success, output.text, len(output.itl)) == (True, "hmyes", 1)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert server.bodies[0]["max_completion_tokens"] == 4


@pytest.mark.parametrize(("script", "error"), [
    ([503], "HTTP 503: "),
    ([USAGE], "the stream held no token"),
    ([text("a"), {"error": {"message": "device lost"}}], "device lost"),
    ([text("a"), b"data: {broken\n\n"], "DecodeError"),
])  # fmt: skip
async def test_failures_say_why(scripted: Callable[..., Any], script: list[Any], error: str) -> None:
    server = await scripted(lambda _: script)
    output = await send(server.url, "completions", {})
    assert not output.success
    assert error in output.error


async def test_no_server() -> None:
    output = await send("http://127.0.0.1:9", "completions", {})
    assert not output.success
    assert "ClientConnectorError" in output.error


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_splitter_at_any_cut(step: int) -> None:
    stream = b'data: {"a":1}\n\n: ping\n\nevent: x\ndata:{"b":2}\r\n\r\ndata: [DONE]\n\ndata: cut'
    splitter = Splitter()
    found = [payload for at in range(0, len(stream), step) for payload in splitter.feed(stream[at : at + step])]
    assert found == [b'{"a":1}', b'{"b":2}', b"[DONE]"]

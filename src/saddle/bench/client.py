"""One streaming request to a server, timed.

The client shares its machine with the server that it measures, so a chunk costs one typed decode of the few fields
that count. Times are `time.perf_counter()` seconds.

A chunk is counted when it stands for tokens: on /v1/completions every chunk with a choice, on /v1/chat/completions
one whose delta holds content, reasoning, a tool call or a function call, or empty content without a role. The usage
chunk and [DONE] are not counted. These are the definitions of `vllm bench serve`, so that figures compare.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import msgspec

from saddle.bench.sse import Splitter

Api = Literal["completions", "chat"]


@dataclass(slots=True)
class RequestOutput:
    """What one request measured.

    prompt_tokens   the server's count, else the planned one
    output_tokens   the server's count; 0 when it sent no usage
    arrival, start  when the request was due and when it was sent
    ttft            seconds from start to the first counted chunk
    itl             seconds between successive counted chunks
    latency         seconds from start to the last counted chunk
    error           why it failed; empty for a success
    """

    prompt_tokens: int
    success: bool = False
    output_tokens: int = 0
    arrival: float = 0.0
    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def queued(self) -> float:
        """Seconds that the request waited in the client for a free slot."""
        return self.start - self.arrival


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")
    function_call: msgspec.Raw = msgspec.Raw(b"")


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode
_EMPTY = (b"", b"null", b"[]")


def completion_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    """The body of a /v1/completions request."""
    return {
        "prompt": prompt, "repetition_penalty": 1.0, "max_tokens": max_tokens, "logprobs": None, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def chat_body(prompt: str, max_tokens: int) -> dict[str, Any]:
    """The body of a /v1/chat/completions request with one user message."""
    return {
        "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
        "max_completion_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def counted_text(chunk: _Chunk, api: Api) -> str | None:
    """The text of a chunk that counts, None for one that does not."""
    if not chunk.choices:
        return None
    if api == "completions":
        return chunk.choices[0].text or ""
    delta = chunk.choices[0].delta
    if delta is None:
        return None
    text = delta.content or delta.reasoning or delta.reasoning_content
    if text:
        return text
    called = bytes(delta.tool_calls) not in _EMPTY or bytes(delta.function_call) not in _EMPTY
    return "" if called or (delta.content == "" and delta.role is None) else None


async def send(
    session: aiohttp.ClientSession, url: str, api: Api, body: bytes, headers: Mapping[str, str], output: RequestOutput
) -> None:
    """Send one request and fill `output`; a failure is recorded there, not raised."""
    output.start = time.perf_counter()
    try:
        async with session.post(url, data=body, headers=headers) as response:
            if response.status != 200:
                output.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return
            await _read(response.content, api, output)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, msgspec.MsgspecError) as error:
        output.error = f"{type(error).__name__}: {error}"
        return
    if not output.error and not output.latency:
        output.error = "the stream held no token"
    output.success = not output.error


async def _read(content: aiohttp.StreamReader, api: Api, output: RequestOutput) -> None:
    splitter = Splitter()
    last = 0.0
    texts: list[str] = []
    async for data in content.iter_any():
        for payload in splitter.feed(data):
            if payload == b"[DONE]":
                continue
            chunk = _decode(payload)
            if chunk.error is not None:
                output.error = f"error in the stream: {chunk.error}"
                continue
            text = counted_text(chunk, api)
            if text is not None:
                now = time.perf_counter()
                if last:
                    output.itl.append(now - last)
                else:
                    output.ttft = now - output.start
                last = now
                texts.append(text)
            if chunk.usage is not None:
                output.output_tokens = chunk.usage.completion_tokens or 0
                output.prompt_tokens = chunk.usage.prompt_tokens or output.prompt_tokens
    output.latency = last - output.start if last else 0.0
    output.text = "".join(texts)

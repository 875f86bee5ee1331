"""A scripted OpenAI server: it answers every request with the chunks of a script and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

WIDE = 0x110000
Chunks = Callable[[dict[str, Any]], Sequence[Any]]


@dataclass
class Scripted:
    """`chunks(body)` gives a response: dicts are sent as events, floats are pauses in seconds, bytes are sent raw, an
    int is an HTTP status instead of a stream."""

    chunks: Chunks
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    tokenizes: bool = True
    _now: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        script = self.chunks(body)
        if isinstance(script[0], int):
            return web.json_response({"error": {"message": "scripted"}}, status=script[0])
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in script:
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                raw = part if isinstance(part, bytes) else f"data: {json.dumps(part)}\n\n".encode()
                await response.write(raw)
        await response.write(b"data: [DONE]\n\n")
        self._now -= 1
        return response

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "served", "root": "/nowhere/checkpoint"}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        """Two characters of text are one token, so that the count differs from every usual tokenizer."""
        if not self.tokenizes:
            raise web.HTTPNotFound
        text = (await request.json())["prompt"]
        ids = [ord(a) * WIDE + ord(b) for a, b in zip(text[::2], text[1::2] + " ", strict=False)]
        return web.json_response({"count": len(ids), "max_model_len": 100, "tokens": ids})

    async def detokenize(self, request: web.Request) -> web.Response:
        ids = (await request.json())["tokens"]
        return web.json_response({"prompt": "".join(chr(token // WIDE) + chr(token % WIDE) for token in ids)})


@pytest.fixture
async def scripted() -> AsyncIterator[Callable[[Chunks], Any]]:
    """A function that starts a server for a script and returns it."""
    servers: list[TestServer] = []

    async def start(chunks: Chunks) -> Scripted:
        script = Scripted(chunks)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/completions", script.answer)
        app.router.add_post("/v1/chat/completions", script.answer)
        app.router.add_get("/v1/models", script.models)
        app.router.add_post("/tokenize", script.tokenize)
        app.router.add_post("/detokenize", script.detokenize)
        server = TestServer(app)
        await server.start_server()
        servers.append(server)
        script.url = str(server.make_url("")).rstrip("/")
        return script

    yield start
    for server in servers:
        await server.close()

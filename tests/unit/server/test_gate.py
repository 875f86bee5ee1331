"""Keys, body limits, request ids, CORS, root path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from saddle.config import ServerConfig
from saddle.parsing.tokenizer import Tokenizer
from tests.unit.server.harness import running, words

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def config(**fields: Any) -> ServerConfig:
    return ServerConfig(host="127.0.0.1", port=0, access_log=False, **fields)


async def test_keys(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x"), config(api_keys=("one", "tw\u00f6"))) as server:

        async def status(headers: dict[str, str], path: str = "/v1/models") -> int:
            return (await server.get(path, headers=headers))[0]

        assert await status({}) == 401
        assert await status({"Authorization": "Bearer one"}) == 200
        assert await status({"Authorization": "bearer one"}) == 200
        assert await status({"Authorization": "Bearer tw\u00f6"}) == 200
        assert await status({"x-api-key": "one"}) == 200
        assert await status({"Authorization": "Bearer wrong", "x-api-key": "one"}) == 200
        for wrong in ("Bearer on", "Bearer onee", "Bearer", "Basic one", "one", "Bearer one two"):
            assert await status({"Authorization": wrong}) == 401, wrong
        for path in ("/livez", "/health", "/ping", "/version", "/load", "/metrics", "/"):
            assert await status({}, path) == 200, path
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            assert (await server.post(path, {}))[0] == 401, path
        async with server.http.post(server.base + CHAT, json=HI) as reply:
            assert reply.headers["www-authenticate"] == "Bearer"
            assert (await reply.json())["error"]["type"] == "AuthenticationError"
        assert not server.client.requests


async def test_root_path_does_not_open_the_guarded_routes(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x"), config(api_keys=("k",), root_path="/api")) as server:
        root = server.base.removesuffix("/api")
        for path in ("/v1/models", "/api/v1/models", "//v1/models", "/api//v1/models"):
            async with server.http.get(root + path) as reply:
                assert reply.status in (401, 404), path
        async with server.http.get(root + "/v1/models", headers={"x-api-key": "k"}) as reply:
            assert reply.status == 200


async def test_body_limit_with_and_without_a_length(tokenizer: Tokenizer) -> None:
    async def chunked(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 100):
            yield b" " * 100

    async with running(tokenizer, words(tokenizer, "x"), config(max_body_bytes=1000)) as server:
        for data in (b" " * 1001, chunked(2000)):
            async with server.http.post(server.base + CHAT, data=data,
                                        headers={"content-type": "application/json"}) as reply:  # fmt: skip
                body = await reply.json()
                assert reply.status == 413
                assert body["error"]["type"] == "RequestTooLargeError"
                assert "1000 bytes" in body["error"]["message"]
        assert (await server.post(CHAT, HI))[0] == 200


@pytest.mark.parametrize(("given", "kept"), [("my-id.1", True), ("x" * 200, False), ("a b", False), ("", False)])
async def test_request_ids(tokenizer: Tokenizer, given: str, kept: bool) -> None:
    headers = {"X-Request-Id": given}
    async with (
        running(tokenizer, words(tokenizer, "x")) as server,
        server.http.post(server.base + CHAT, json=HI, headers=headers) as reply,
    ):
        shown, answer = reply.headers["x-request-id"], (await reply.json())["id"]
    assert answer == f"chatcmpl-{shown}"
    assert (shown == given) == kept


async def test_cors_is_off_unless_asked_for(tokenizer: Tokenizer) -> None:
    ask = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    script = words(tokenizer, "x")
    async with (
        running(tokenizer, script) as server,
        server.http.post(server.base + CHAT, json=HI, headers=ask) as reply,
    ):
        assert "access-control-allow-origin" not in reply.headers
    allowing = config(allowed_origins=("http://a.example",), api_keys=("k",))
    async with (
        running(tokenizer, script, allowing) as server,
        server.http.options(server.base + CHAT, headers=ask) as reply,
    ):
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "http://a.example"

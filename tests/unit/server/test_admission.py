"""Who is let in, who is told to come back, and what happens to the engine's requests when somebody leaves."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Iterable

import aiohttp
import pytest

from saddle import parsing
from saddle.config import ServerConfig
from saddle.errors import InvalidRequest, Overloaded
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineStats, TokenDelta, TokenRequest
from saddle.server import service
from saddle.server.sse import ClientGone, whole
from tests.unit.server.harness import Harness, refuse, running, until, words

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def one_token_then_silence(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        yield TokenDelta(request_id=request.request_id, token_ids=tokenizer.encode("a"))

    return script


async def load(server: Harness) -> int:
    _, text = await server.get("/load")
    return int(json.loads(text)["server_load"])


async def test_loading_server_says_how_far_it_is(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        state = server.client.state
        ready, state.ready, state.phase, state.share, state.note = state.ready, None, "loading weights", 0.25, "shard 2"
        assert (await server.get("/livez"))[0] == 200
        status, text = await server.get("/health")
        assert status == 503
        assert json.loads(text) == {
            "status": "loading", "message": "The model is loading: loading weights, 25%.", "phase": "loading weights",
            "progress": 0.25, "note": "shard 2",
        }  # fmt: skip
        async with server.http.post(server.base + CHAT, json=HI) as reply:
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert "25%" in (await reply.json())["error"]["message"]
        assert (await server.get("/v1/models"))[0] == 503
        state.ready = ready
        assert (await server.get("/health"))[0] == 200
        assert (await server.post(CHAT, HI))[0] == 200


async def test_draining_and_dead_servers_refuse(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        server.service.draining = True
        async with server.http.post(server.base + CHAT, json=HI) as reply:
            assert reply.status == 503
            assert "retry-after" in reply.headers
            assert "shutting down" in (await reply.json())["error"]["message"]
        assert json.loads((await server.get("/health"))[1])["status"] == "draining"
        server.service.draining = False
        server.client.die("The engine process was ended by SIGKILL.")
        status, body = await server.post(CHAT, HI)
        assert (status, body["error"]["message"]) == (503, "The engine process was ended by SIGKILL.")
        assert json.loads((await server.get("/health"))[1])["status"] == "dead"
        assert (await server.get("/livez"))[0] == 200


async def test_prompt_that_is_too_long(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, body = await server.post(TEXT, {"prompt": [5] * 512})
        fits, _ = await server.post(TEXT, {"prompt": [5] * 511, "max_tokens": 100})
        _, page = await server.get("/metrics")
        (request,) = server.client.requests
    assert status == 400
    assert body["error"] == {
        "message": "This model's maximum context length is 512 tokens. However, your prompt contains 512 input tokens, "
        "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
        "type": "BadRequestError",
        "param": "input_tokens",
        "code": 400,
    }
    assert (fits, request.params.max_tokens) == (200, 1)
    assert 'reason="prompt_too_long"} 1.0' in page


async def test_a_prompt_that_is_far_too_long_is_not_counted_to_its_end(tokenizer: Tokenizer) -> None:
    """A minute's work for an answer that its beginning decides, on one of two threads, holds up everybody."""
    encoded: list[int] = []
    encode = tokenizer.encode

    def counted(text: str, allow_special: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(text, allow_special)

    long = "word " * 4_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "encode", counted)
        patch.setattr(parsing.tokenizer, "FAR_CHARS", 10_000)
        async with running(tokenizer, words(tokenizer, "x")) as server:
            for path, body in ((TEXT, {"prompt": long}), (CHAT, {"messages": [{"role": "user", "content": long}]}),
                               ("/v1/responses", {"input": long}),
                               ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": long}]})):
                status, refused = await server.post(path, body)
                assert status == 400
                wanted = r"(prompt is too long: |contains at least )\d{4} (tokens > 512|input tokens)"
                assert re.search(wanted, refused["error"]["message"])
            status, _ = await server.post(TEXT, {"prompt": long, "truncate_prompt_tokens": 5})
            assert status == 200
            _, page = await server.get("/metrics")
    assert sorted(size for size in encoded if size > 1000) == [10_000] * 4 + [20_000]
    assert 'reason="prompt_too_long"} 4.0' in page


@pytest.mark.parametrize(("path", "body"), [
    ("/tokenize", {"prompt": "LONG"}), ("/tokenize", {"messages": [{"role": "user", "content": "LONG"}]}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "LONG"}]}),
    ("/v1/responses/input_tokens", {"input": "LONG"}), (TEXT, {"prompt": "LONG", "truncate_prompt_tokens": 5}),
])  # fmt: skip
async def test_what_is_counted_or_cut_has_a_limit_too(
    tokenizer: Tokenizer, path: str, body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of characters: encoding 20 MB to their end takes ten seconds and gigabytes."""
    monkeypatch.setattr(service, "FAR_CHARS", 0)

    def of_length(length: int) -> dict[str, object]:
        return dict(json.loads(json.dumps(body).replace("LONG", "x" * length)))

    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, refused = await server.post(path, of_length(512 * 32 + 1))
        assert status == 400
        assert re.search(r"prompt is too long: 16\d{3} characters > 16384 maximum", refused["error"]["message"])
        assert (await server.post(path, of_length(512 * 30)))[0] == 200


async def test_queue_limit(tokenizer: Tokenizer) -> None:
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, max_queued_requests=2)
    async with running(tokenizer, words(tokenizer, "x"), config) as server:
        server.client.stats = EngineStats(num_waiting=2)
        async with server.http.post(server.base + CHAT, json=HI) as reply:
            assert reply.status == 429
            assert "retry-after" in reply.headers
            assert "limit is 2" in (await reply.json())["error"]["message"]
        assert 'admission_rejections_total{engine="0",model_name="saddle-test",reason="queue_full"} 1.0' in (
            await server.get("/metrics")
        )[1]
        server.client.stats = EngineStats(num_waiting=1)
        assert (await server.post(CHAT, HI))[0] == 200


async def test_queue_limit_of_the_engine(tokenizer: Tokenizer) -> None:
    error = Overloaded("2 requests are waiting already.", retry_after=1)
    async with (
        running(tokenizer, refuse(error)) as server,
        server.http.post(server.base + CHAT, json=HI) as reply,
    ):
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert (await reply.json())["error"]["type"] == "RateLimitError"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_request(tokenizer: Tokenizer, stream: bool) -> None:
    async with running(tokenizer, one_token_then_silence(tokenizer)) as server:
        async with aiohttp.ClientSession() as session:
            asking = asyncio.ensure_future(session.post(server.base + CHAT, json={**HI, "n": 3, "stream": stream}))
            await until(lambda: len(server.client.requests) == 3)
            assert await load(server) == 1
            if stream:
                reply = await asking
                await reply.content.readany()
                reply.close()
            else:
                asking.cancel()
        await until(lambda: len(server.client.aborted) == 3)
        assert sorted(server.client.aborted) == sorted(request.request_id for request in server.client.requests)
        assert await load(server) == 0
        _, page = await server.get("/metrics")
    assert 'finished_reason="abort",model_name="saddle-test"} 3.0' in page


async def test_a_client_that_leaves_before_it_is_taken(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        taken = asyncio.Event()

        async def never(request: TokenRequest) -> None:
            taken.set()
            await asyncio.Event().wait()

        server.client.submit = never  # type: ignore[method-assign,assignment]
        async with aiohttp.ClientSession() as session:
            asking = asyncio.ensure_future(session.post(server.base + CHAT, json=HI))
            await taken.wait()
            asking.cancel()
        await until(lambda: server.service.num_in_flight == 0)
        assert len(server.client.aborted) == 1


async def test_one_refused_choice_refuses_all(tokenizer: Tokenizer) -> None:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        if request.request_id.endswith("-2"):
            raise InvalidRequest("no room for this one", param="n")
        return []

    async with running(tokenizer, script) as server:
        status, body = await server.post(CHAT, {**HI, "n": 3})
        assert (status, body["error"]["param"]) == (400, "n")
        assert len(server.client.streams) == 0, "the others were aborted"
        assert await load(server) == 0


async def test_refusal_by_the_engine_is_told(tokenizer: Tokenizer) -> None:
    error = InvalidRequest("prompt needs 99 blocks, there are 64", param="prompt")
    async with running(tokenizer, refuse(error)) as server:
        status, body = await server.post(CHAT, {**HI, "stream": True})
    assert (status, body["error"]["param"]) == (400, "prompt")
    assert body["error"]["message"] == "prompt needs 99 blocks, there are 64"


async def test_engine_death_ends_every_stream(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, one_token_then_silence(tokenizer)) as server:
        streams = [asyncio.ensure_future(server.frames(CHAT, HI)) for _ in range(8)]
        wholes = [asyncio.ensure_future(server.post(CHAT, HI)) for _ in range(2)]
        await until(lambda: len(server.client.requests) == 10)
        server.client.die("The engine process was ended by SIGKILL.")
        for frames in await asyncio.gather(*streams):
            assert frames[-1] == "[DONE]"
            assert json.loads(frames[-2])["error"]["message"] == "The engine process was ended by SIGKILL."
        for status, body in await asyncio.gather(*wholes):
            assert (status, body["error"]["message"]) == (500, "The engine process was ended by SIGKILL.")
        assert server.service.num_in_flight == 0


async def test_ids_that_repeat_do_not_collide(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        replies = await asyncio.gather(*(server.post(CHAT, {**HI, "request_id": "same"}) for _ in range(4)))
        ids = [request.request_id for request in server.client.requests]
    assert {reply["id"] for _, reply in replies} == {"chatcmpl-same"}
    assert len(set(ids)) == 4


async def test_what_the_server_itself_breaks_is_a_500_without_details(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import saddle.server.openai as api

    def broken(*args: object) -> bytes:
        raise KeyError("/secret/path")

    monkeypatch.setattr(api, "to_response", broken)
    monkeypatch.setattr(api.ChatStream, "encode", broken)
    async with running(tokenizer, one_token_then_silence(tokenizer)) as server:
        frames = await server.frames(CHAT, HI)
        await until(lambda: len(server.client.aborted) == 1)
        server.client.script = words(tokenizer, "x")
        status, body = await server.post(CHAT, HI)
    assert frames[-1] == "[DONE]"
    assert "secret" not in frames[-2]
    assert json.loads(frames[-2])["error"]["code"] == 500
    assert status == 500
    assert "secret" not in json.dumps(body)


async def test_a_client_that_is_gone_before_the_answer_begins() -> None:
    class Opened:
        closed = False
        num_choices = 1

        async def events(self) -> AsyncGenerator[None, None]:
            await asyncio.Event().wait()
            yield

        def close(self) -> None:
            self.closed = True

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    generation = Opened()
    with pytest.raises(ClientGone):
        await whole(gone, generation)  # type: ignore[arg-type]
    assert generation.closed


async def test_a_request_that_takes_too_long_ends_with_an_error(tokenizer: Tokenizer) -> None:
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, request_timeout_s=0.2)
    async with running(tokenizer, one_token_then_silence(tokenizer), config) as server:
        began = time.monotonic()
        frames = await server.frames(CHAT, {**HI, "n": 2})
        status, body = await server.post(CHAT, HI)
        assert 0.35 < time.monotonic() - began < 2
        errors = [json.loads(frame)["error"]["message"] for frame in frames if '"error"' in frame]
        assert errors == ["The request took longer than the 0.2 s that it may."] * 2
        assert frames[-1] == "[DONE]"
        assert (status, body["error"]["message"]) == (504, errors[0])
        assert len(server.client.aborted) == 3
        server.client.script = words(tokenizer, "x")
        assert (await server.post(CHAT, HI))[0] == 200
        await asyncio.sleep(0.3)  # the timer of a request that ended does nothing
        assert len(server.client.aborted) == 3


@pytest.mark.parametrize(("path", "body", "kind", "code"), [
    (CHAT, HI, "TimeoutError", 504), (TEXT, {"prompt": "x"}, "TimeoutError", 504),
    ("/v1/responses", {"input": "hi"}, "TimeoutError", None),
    ("/v1/messages", {**HI, "max_tokens": 9}, "timeout_error", None),
])  # fmt: skip
async def test_a_timeout_in_the_shape_of_each_api(
    tokenizer: Tokenizer, path: str, body: dict[str, object], kind: str, code: int | None
) -> None:
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, request_timeout_s=0.1)
    async with running(tokenizer, one_token_then_silence(tokenizer), config) as server:
        status, refused = await server.post(path, body)
        frames = await server.frames(path, body)
    assert (status, refused["error"]["type"]) == (504, kind)
    [told] = [frame for frame in frames if "longer than the 0.1 s" in frame]
    error = json.loads(told[told.index("{") :])
    if path == "/v1/responses":
        assert error["response"]["error"]["code"] == "server_error"
    else:
        assert (error["error"]["type"], error["error"].get("code")) == (kind, code)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_the_time_of_a_request_runs_before_the_engine_takes_it(
    tokenizer: Tokenizer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while a grammar is compiled. What was submitted is taken back."""
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, request_timeout_s=0.1)
    async with running(tokenizer, words(tokenizer, "x"), config) as server:

        async def never(request: TokenRequest) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(server.client, "submit", never)
        status, refused = await server.post(path, {**HI, "max_tokens": 5, "stream": True})
        assert (status, refused["error"]["message"]) == (504, "The request took longer than the 0.1 s that it may.")
        assert len(server.client.aborted) == 1
        assert server.service.num_in_flight == 0

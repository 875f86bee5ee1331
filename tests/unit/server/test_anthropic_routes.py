"""Anthropic's routes over HTTP: what reaches the engine, what is refused and how, pings, counting."""

from __future__ import annotations

import json
from typing import Any

import pytest

from saddle.config import ServerConfig
from saddle.errors import InvalidRequest, Overloaded, Unavailable
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineReady, FinishReason, TokenDelta, TokenRequest
from tests.unit.server.harness import Script, refuse, running, words

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: dict[str, Any] = {"max_tokens": 64, "messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
TOOL = {"name": "ls", "description": "List.", "input_schema": SCHEMA}
OTHER = {"name": "cp", "input_schema": {"type": "object", "properties": {}}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
FORM = {"type": "json_schema", "schema": SCHEMA}


async def sent(tokenizer: Tokenizer, *bodies: dict[str, Any]) -> list[TokenRequest]:
    """The requests that the engine got."""
    async with running(tokenizer, words(tokenizer, "x</think>", "{}")) as server:
        server.client.state.ready = EngineReady(2048, 16, 64, tokenizer.vocab_size)
        for fields in bodies:
            status, reply = await server.post(PATH, {**HI, **fields})
            assert status == 200, (fields, reply)
        return server.client.requests


CONSTRAINED: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, None, ""),
    ({"tools": [TOOL]}, None, ""),
    ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, None, ""),
    ({"tools": [TOOL], "tool_choice": {"type": "none"}}, None, ""),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "text_or_tools",
     '"stop_after_first": true'),
    ({"tools": [{**TOOL, "strict": True}]}, "text_or_tools", "path"),
    ({"tools": [TOOL, OTHER], "tool_choice": {"type": "any"}}, "tools", "cp"),
    ({"tools": [TOOL, OTHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, "tools",
     '"stop_after_first": true'),
    ({"tools": [SEARCH, TOOL, OTHER], "tool_choice": {"type": "tool", "name": "ls"}}, "tools", "path"),
    ({"output_config": {"format": FORM}}, "json_schema", "path"),
    ({"output_format": FORM}, "json_schema", "path"),
    ({"output_config": {"format": FORM, "effort": "high"}, "tools": [TOOL]}, "answer_or_tools", "ls"),
    ({"output_config": {"effort": "max"}}, None, ""),
    ({"thinking": {"type": "adaptive"}}, None, ""),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, None, ""),
    ({"thinking": {"type": "enabled", "budget_tokens": 20}}, "unbound", ""),
    ({"thinking": {"type": "disabled"}}, "unbound", ""),
]  # fmt: skip


async def test_what_is_constrained(tokenizer: Tokenizer) -> None:
    requests = await sent(tokenizer, *(fields for fields, _, _ in CONSTRAINED))
    for request, (fields, kind, inside) in zip(requests, CONSTRAINED, strict=True):
        grammar = request.grammar
        assert (grammar.kind if grammar else None) == kind, fields
        if grammar is not None:
            assert inside in grammar.source, fields
            assert grammar.after_token_id == tokenizer.end_think_id, fields


async def test_thinking_has_a_limit(tokenizer: Tokenizer) -> None:
    kinds = [{"type": "disabled"}, {"type": "enabled", "budget_tokens": 20}]
    requests = await sent(tokenizer, *({"thinking": kind} for kind in kinds))
    assert [request.grammar and request.grammar.max_thinking_tokens for request in requests] == [0, 20]


async def test_only_the_tool_that_must_be_called_is_in_the_grammar(tokenizer: Tokenizer) -> None:
    [request] = await sent(tokenizer, {"tools": [TOOL, OTHER], "tool_choice": {"type": "tool", "name": "cp"}})
    assert request.grammar is not None
    assert "cp" in request.grammar.source
    assert "ls" not in request.grammar.source


async def test_sampling_and_the_rest_reach_the_engine(tokenizer: Tokenizer) -> None:
    [request] = await sent(tokenizer, {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["END"],
                                     "cache_salt": "s", "priority": 3})  # fmt: skip
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (0.5, 0.9, 7, ("END",))
    assert (params.max_tokens, request.cache_salt, request.priority) == (64, "s", 3)


async def test_defaults_of_the_checkpoint(tokenizer: Tokenizer) -> None:
    defaults = {"temperature": 0.7, "top_k": 40, "max_tokens": 5}
    async with running(tokenizer, words(tokenizer, "x"), defaults=defaults) as server:
        await server.post(PATH, {**HI, "top_k": 3})
        params = server.client.requests[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 3, 64)


async def test_prompt_of_the_model(tokenizer: Tokenizer) -> None:
    """Everything that makes the prompt is in it; what this server has no use for is not."""
    body = {
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.6d8;"},
                   {"type": "text", "text": "You are C.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                     {"role": "system", "content": "Skills: none."}],
        "tools": [{**TOOL, "strict": True}, SEARCH],
    }  # fmt: skip
    [request] = await sent(tokenizer, body)
    text = tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
    assert "]~b]system\nYou are C.\n\n# Tools" in text
    assert '<tool>{"name": "ls", "description": "List.", "parameters": {"type": "object"' in text
    assert "]~b]user\nhi\n\n<system-reminder>\nSkills: none.\n</system-reminder>[e~[" in text
    assert text.endswith("]~b]ai\n<think>\n")
    for absent in ("billing", "web_search", "cache_control", "strict"):
        assert absent not in text


async def test_an_answer_is_continued(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "B)")) as server:
        messages = [*HI["messages"], {"role": "assistant", "content": "The best answer is ("}]
        _, reply = await server.post(PATH, {**HI, "messages": messages})
        [request] = server.client.requests
    assert tokenizer.decode(request.prompt_ids, skip_special_tokens=False).endswith("]~b]ai\nThe best answer is (")
    assert reply["content"] == [{"type": "text", "text": "B)"}]


async def test_whole_message_and_its_headers(tokenizer: Tokenizer) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "mid-conversation-system-2026-04-07,x",
               "x-request-id": "r-1"}  # fmt: skip
    async with (
        running(tokenizer, words(tokenizer, "I think.", "</think>", "\n\nHello")) as server,
        server.http.post(server.base + PATH + "?beta=true", json=HI, headers=headers) as reply,
    ):
        assert reply.status == 200
        assert reply.headers["request-id"] == reply.headers["x-request-id"] == "r-1"
        body = await reply.json()
    assert body["id"] == "msg_r-1"
    assert body["model"] == "saddle-test"
    assert [block["type"] for block in body["content"]] == ["thinking", "text"]
    assert body["content"][1]["text"] == "Hello"
    assert body["usage"]["cache_read_input_tokens"] == 4
    assert body["usage"]["input_tokens"] + 4 == len(server.client.requests[0].prompt_ids)


async def test_stream_says_first_what_was_cached(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "I think.", "</think>", "\n\nHello")) as server:
        frames = await server.frames(PATH, HI)
    events = [frame.partition("\n")[0].removeprefix("event: ") for frame in frames]
    assert events[:3] == ["ping", "message_start", "content_block_start"]
    assert events[-2:] == ["message_delta", "message_stop"]
    start, end = (json.loads(frames[place].partition("data: ")[2]) for place in (1, -2))
    assert start["message"]["usage"]["cache_read_input_tokens"] == 4
    for field in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
        assert start["message"]["usage"][field] == end["usage"][field]


async def test_pings_while_nothing_comes(tokenizer: Tokenizer) -> None:
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, sse_keep_alive_s=0.02)
    async with running(tokenizer, words(tokenizer, "</think>Hello"), config) as server:
        server.client.pause_s = 0.2
        frames = await server.frames(PATH, HI)
    assert frames.index('event: ping\ndata: {"type":"ping"}') == 0
    num_before = next(place for place, frame in enumerate(frames) if "message_start" in frame)
    assert num_before >= 3
    assert not any(frame.startswith(":") for frame in frames), "pings, not comments"


async def test_tool_choice_none_mutes_calls(tokenizer: Tokenizer) -> None:
    said = ["</think>No.", "<minimax:tool_call>\n<invoke name=\"ls\">\n</invoke>\n</minimax:tool_call>"]
    async with running(tokenizer, words(tokenizer, *said)) as server:
        _, reply = await server.post(PATH, {**HI, "tools": [TOOL], "tool_choice": {"type": "none"}})
        _, loud = await server.post(PATH, {**HI, "tools": [TOOL]})
    assert [block["type"] for block in reply["content"]] == ["text"]
    assert reply["stop_reason"] == "end_turn"
    assert [block["type"] for block in loud["content"]] == ["text", "tool_use"]


async def test_context_management_says_that_nothing_was_applied(tokenizer: Tokenizer) -> None:
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, reply = await server.post(PATH, {**HI, "context_management": edits})
        _, plain = await server.post(PATH, HI)
        _, count = await server.post(COUNT, {"messages": HI["messages"], "context_management": edits})
    assert reply["context_management"] == {"applied_edits": []}
    assert "context_management" not in plain
    assert count["context_management"] == {"original_input_tokens": count["input_tokens"]}


async def test_counting(tokenizer: Tokenizer) -> None:
    body = {"messages": HI["messages"], "system": "You are C.", "tools": [TOOL], "thinking": {"type": "adaptive"},
            "tool_choice": {"type": "auto"}, "model": "saddle-test"}  # fmt: skip
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, reply = await server.post(COUNT + "?beta=true", body)
        assert not server.client.requests
        await server.post(PATH, {**body, "max_tokens": 9})
        [request] = server.client.requests
    assert status == 200
    assert reply == {"input_tokens": len(request.prompt_ids)}


async def test_what_is_ignored_is_in_the_log_once(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    foreign = [*HI["messages"], {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": "EqQB"}, {"type": "text", "text": "so"}]},
        {"role": "user", "content": "on"}]  # fmt: skip
    with caplog.at_level("INFO", logger="saddle.server.anthropic_routes"):
        async with running(tokenizer, words(tokenizer, "x")) as server:
            for _ in range(3):
                assert (await server.post(PATH, {**HI, "tools": [SEARCH], "messages": foreign}))[0] == 200
    notes = [record.message for record in caplog.records if "Messages API" in record.message]
    assert len(notes) == 2
    assert any("web_search_20250305" in note for note in notes)
    assert any("signatures of thinking" in note for note in notes)


# ---------------------------------------------------------------------------------------------------------------
# refusals

MESSAGE = HI["messages"][0]
CASES: list[tuple[dict[str, Any], int, str, str]] = [
    ({"messages": None}, 400, "invalid_request_error", "messages: Input should be a valid array"),
    ({"messages": []}, 400, "invalid_request_error", "messages: List should have at least 1 item"),
    ({"messages": ["hi"]}, 400, "invalid_request_error", "messages.0: Input should be"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error",
     "messages.0.role must be one of user, assistant, system"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error",
     "messages.0.content.0 is an image: this model reads text only"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, 400,
     "invalid_request_error", "messages.0.content.0.tool_use_id is 'x', but no message before it"),
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens: Input should be a valid integer"),
    ({"max_tokens": -1}, 400, "invalid_request_error", "max_tokens: Input should be greater than or equal to 0"),
    ({"max_tokens": "9"}, 400, "invalid_request_error", "max_tokens: Input should be a valid integer"),
    ({"model": "claude-3"}, 404, "not_found_error", "The model `claude-3` does not exist. Valid names: `saddle-test`"),
    ({"system": 5}, 400, "invalid_request_error", "system must be a string or a list of blocks"),
    ({"system": [{"type": "image"}]}, 400, "invalid_request_error", "system.0 is an image"),
    ({"temperature": 3}, 400, "invalid_request_error", "temperature must be between 0 and 2"),
    ({"top_p": 0}, 400, "invalid_request_error", "top_p must be above 0"),
    ({"top_k": -5}, 400, "invalid_request_error", "top_k must be a positive integer"),
    ({"stop_sequences": "x"}, 400, "invalid_request_error", "stop_sequences: Input should be a valid array"),
    ({"stop_sequences": ["a", ""]}, 400, "invalid_request_error", "stop_sequences.1 must be a non-empty string"),
    ({"stop_sequences": ["a"] * 17}, 400, "invalid_request_error", "stop_sequences must be at most 16 strings"),
    ({"thinking": {"type": "sometimes"}}, 400, "invalid_request_error", "thinking.type must be adaptive, enabled or"),
    ({"thinking": "enabled"}, 400, "invalid_request_error", "thinking.type must be adaptive, enabled or disabled"),
    ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking.budget_tokens must be a positive"),
    ({"thinking": {"type": "adaptive", "display": "loud"}}, 400, "invalid_request_error", "thinking.display must be"),
    ({"tools": [{"name": "x"}]}, 400, "invalid_request_error", "tools.0.input_schema must be a JSON schema"),
    ({"tools": [TOOL, TOOL]}, 400, "invalid_request_error", "tools.1.name is 'ls' again"),
    ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice 'any' needs tools"),
    ({"tools": [SEARCH], "tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice 'any' needs tool"),
    ({"tools": [TOOL], "tool_choice": "any"}, 400, "invalid_request_error", "tool_choice.type must be auto, any, tool"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name must be the"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "cp"}}, 400, "invalid_request_error",
     "tool_choice.name must be one of ls"),
    ({"tools": [TOOL, SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}}, 400, "invalid_request_error",
     "tool_choice.name: 'web_search' is of type 'web_search_20250305', which this server does not offer"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, 400, "invalid_request_error",
     "tool_choice.disable_parallel_tool_use must be true or false"),
    ({"tools": [SEARCH, {**OTHER, "strict": True, "input_schema": {"type": "object", "not": {}}}]}, 400,
     "invalid_request_error", "tools.1.input_schema"),
    ({"output_config": 1}, 400, "invalid_request_error", "output_config must be an object"),
    ({"output_config": {"effort": "huge"}}, 400, "invalid_request_error", "output_config.effort must be one of low"),
    ({"output_config": {"format": {"type": "xml"}}}, 400, "invalid_request_error", "output_config.format.type must be"),
    ({"output_config": {"format": {"type": "json_schema"}}}, 400, "invalid_request_error",
     "output_config.format.schema must be a JSON schema"),
    ({"output_format": {"type": "json_schema", "schema": {"type": "object", "not": {}}}}, 400, "invalid_request_error",
     "output_format.schema"),
    ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error", "mcp_servers is not supported"),
    ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, 404, "not_found_error",
     "thread: this server keeps no conversation; send the whole"),
    ({"thread": {"type": "fork"}}, 400, "invalid_request_error", "thread.type must be create or continue"),
    ({"cache_salt": ""}, 400, "invalid_request_error", "cache_salt: String should have at least 1 character"),
    ({"stream": "yes"}, 400, "invalid_request_error", "stream: Input should be a valid boolean"),
    ({"messages": [{"role": "user", "content": "long " * 400}]}, 400, "invalid_request_error",
     "prompt is too long: "),
]  # fmt: skip


def right(body: Any, kind: str, part: str) -> bool:
    error = body.get("error", {})
    return (body.get("type"), error.get("type")) == ("error", kind) and error["message"].startswith(part)


async def test_bad_requests(tokenizer: Tokenizer) -> None:
    wrong = []
    async with running(tokenizer, words(tokenizer, "x")) as server:
        for fields, status, kind, part in CASES:
            got, reply = await server.post(PATH, {**HI, **fields})
            if got != status or not right(reply, kind, part) or not reply["request_id"]:
                wrong.append((fields, got, reply))
        assert not server.client.requests, "the engine saw a bad request"
    assert not wrong, "\n".join(map(str, wrong))


async def test_threads_are_begun_and_never_found(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        assert (await server.post(PATH, {**HI, "thread": {"type": "create"}}))[0] == 200
        going_on = {"type": "continue", "previous_message_id": "msg_1"}
        _, reply = await server.post(PATH, {**HI, "messages": [TOO_LITTLE], "thread": going_on})
    assert reply["error"]["details"] == {"error_code": "thread_not_found"}


TOO_LITTLE = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "x"}]}


async def test_context_too_long_in_words_that_agents_know(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        messages = [{"role": "user", "content": "long " * 400}]
        _, reply = await server.post(PATH, {**HI, "messages": messages})
        _, count = await server.post(COUNT, {"messages": messages})
    assert reply["error"]["message"] == f"prompt is too long: {count['input_tokens']} tokens > 512 maximum"


async def test_counting_refuses_the_same_and_needs_no_limit(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, reply = await server.post(COUNT, {"messages": [{"role": "robot"}]})
        assert (status, right(reply, "invalid_request_error", "messages.0.role must be")) == (400, True)
        status, reply = await server.post(COUNT, {})
        assert (status, right(reply, "invalid_request_error", "messages: Field required")) == (400, True)
        status, reply = await server.post(PATH, {"messages": HI["messages"]})
        assert (status, right(reply, "invalid_request_error", "max_tokens: Field required")) == (400, True)


async def test_errors_of_the_server_in_this_shape(tokenizer: Tokenizer) -> None:
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, api_keys=("k",), max_body_bytes=2000)
    async with running(tokenizer, words(tokenizer, "x"), config) as server:
        key = {"x-api-key": "k"}
        assert (await server.post(PATH, HI, headers=key))[0] == 200
        assert (await server.post(PATH, HI, headers={"Authorization": "Bearer k"}))[0] == 200
        status, reply = await server.post(PATH, HI)
        assert (status, right(reply, "authentication_error", "A valid API key")) == (401, True)
        status, reply = await server.post(COUNT, HI, headers={"x-api-key": "wrong"})
        assert (status, right(reply, "authentication_error", "A valid API key")) == (401, True)
        status, reply = await server.post(PATH, {**HI, "system": "x" * 3000}, headers=key)
        assert (status, right(reply, "request_too_large", "The body is larger")) == (413, True)
        status, text = await server.get(PATH, headers=key)
        assert (status, right(json.loads(text), "invalid_request_error", "GET /v1/messages:")) == (405, True)
        status, text = await server.get(PATH + "/batches", headers=key)
        assert (status, right(json.loads(text), "not_found_error", "GET /v1/messages/batches:")) == (404, True)
        status, text = await server.get("/v1/messagesx", headers=key)
        assert json.loads(text)["error"]["code"] == 404, "another route has the other shape"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("Full.", retry_after=7), 429, "rate_limit_error"),
        (Unavailable("Loading.", retry_after=7), 503, "overloaded_error"),
        (InvalidRequest("Wrong."), 400, "invalid_request_error"),
    ],
)
async def test_refusals_of_the_engine(tokenizer: Tokenizer, error: Any, status: int, kind: str) -> None:
    async with (
        running(tokenizer, refuse(error)) as server,
        server.http.post(server.base + PATH, json={**HI, "stream": True}) as reply,
    ):
        body = await reply.json()
        assert (reply.status, right(body, kind, error.message)) == (status, True)
        assert reply.headers.get("retry-after") == (str(error.retry_after) if error.retry_after else None)
        assert body["request_id"] == reply.headers["request-id"]


def fails(tokenizer: Tokenizer, *pieces: str) -> Script:
    def script(request: TokenRequest) -> Any:
        for piece in pieces:
            yield TokenDelta(request_id=request.request_id, token_ids=tokenizer.encode(piece))
        yield TokenDelta(request_id=request.request_id, finish_reason=FinishReason.ERROR, error="The step failed.")

    return script


async def test_failures(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, fails(tokenizer, "I")) as server:
        status, reply = await server.post(PATH, HI)
        assert (status, right(reply, "api_error", "The step failed.")) == (500, True)
        frames = await server.frames(PATH, HI)
    assert frames[-1].startswith("event: error\n")
    assert right(json.loads(frames[-1].partition("data: ")[2]), "api_error", "The step failed.")
    assert not any("message_stop" in frame for frame in frames)


async def test_head_of_the_root(tokenizer: Tokenizer) -> None:
    async with (
        running(tokenizer, words(tokenizer, "x")) as server,
        server.http.head(server.base + "/") as reply,
    ):
        assert reply.status == 200


async def test_the_document_knows_the_routes(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, text = await server.get("/openapi.json")
    paths = json.loads(text)["paths"]
    body = paths[PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "max_tokens"} <= set(body["required"])
    assert "max_tokens" not in paths[COUNT]["post"]["requestBody"]["content"]["application/json"]["schema"]["required"]
    error = paths[PATH]["post"]["responses"]["400"]["content"]["application/json"]["schema"]
    assert error["required"] == ["type", "error"]

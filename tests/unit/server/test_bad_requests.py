"""Every bad body is a 400 (or the status named) that names the field and says what would be right."""

from __future__ import annotations

from typing import Any

import pytest

from saddle.parsing.tokenizer import Tokenizer
from tests.unit.server.harness import running, words

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BIG = 10**9


def strict(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}


# route, body, status, param, part of the message
CASES: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (CHAT, {}, 400, "messages", "Field required"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
    (CHAT, {"messages": "hi"}, 400, "messages", "valid array"),
    (CHAT, {"messages": ["hi"]}, 400, "messages.0", "an object"),
    (CHAT, {"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages.0.role", "robot"),
    (CHAT, {"messages": [{"content": "hi"}]}, 400, "messages.0.role", "role"),
    (CHAT, {"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}, 400, "messages.0.role",
     "no assistant message"),
    (CHAT, {"messages": HI, "model": "gpt-4"}, 404, "model", "Valid names: `saddle-test`"),
    (CHAT, {"messages": HI, "temperature": 2.5}, 400, "temperature", "between 0 and 2"),
    (CHAT, {"messages": HI, "temperature": "hot"}, 400, "temperature", "valid number"),
    (CHAT, {"messages": HI, "temperature": -1}, 400, "temperature", "between 0 and 2"),
    (CHAT, {"messages": HI, "top_p": 0}, 400, "top_p", "above 0 and at most 1"),
    (CHAT, {"messages": HI, "top_k": -2}, 400, "top_k", "positive integer"),
    (CHAT, {"messages": HI, "top_k": 2**64}, 400, "top_k", "below 2**31"),
    (CHAT, {"messages": HI, "priority": 2**64}, 400, "priority", "64-bit"),
    (CHAT, {"messages": HI, "top_k": 1.5}, 400, "top_k", "valid integer"),
    (CHAT, {"messages": HI, "min_p": 1.1}, 400, "min_p", "in"),
    (CHAT, {"messages": HI, "presence_penalty": 3}, 400, "presence_penalty", "between -2 and 2"),
    (CHAT, {"messages": HI, "frequency_penalty": -3}, 400, "frequency_penalty", "between -2 and 2"),
    (CHAT, {"messages": HI, "repetition_penalty": 0}, 400, "repetition_penalty", "above 0"),
    (CHAT, {"messages": HI, "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, 400, "max_completion_tokens", "at least 1"),
    (CHAT, {"messages": HI, "max_tokens": 4, "min_tokens": 5}, 400, "min_tokens", "at most max_tokens"),
    (CHAT, {"messages": HI, "n": 0}, 400, "n", "between 1 and 128"),
    (CHAT, {"messages": HI, "n": 2, "temperature": 0}, 400, "n", "temperature is 0"),
    (CHAT, {"messages": HI, "stop": [""]}, 400, "stop", "non-empty"),
    (CHAT, {"messages": HI, "stop": [1]}, 400, "stop.0", "valid string"),
    (CHAT, {"messages": HI, "stop": ["a"] * 17}, 400, "stop", "at most 16"),
    (CHAT, {"messages": HI, "stop_token_ids": [BIG]}, 400, "stop_token_ids", "token ids from 0 to"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, 400, "logit_bias.x", "token ids to numbers"),
    (CHAT, {"messages": HI, "logit_bias": {str(BIG - 1): 1}}, 400, "logit_bias", "token ids from 0 to"),
    (CHAT, {"messages": HI, "logit_bias": {"1": 101}}, 400, "logit_bias.1", "between -100 and 100"),
    (CHAT, {"messages": HI, "allowed_token_ids": []}, 400, "allowed_token_ids", "not empty"),
    (CHAT, {"messages": HI, "bad_words": ["ok", " "]}, 400, "bad_words.1", "non-empty"),
    (CHAT, {"messages": HI, "bad_words": ["ok"] * 257}, 400, "bad_words", "at most 256 words"),
    (CHAT, {"messages": HI, "bad_words": ["o" * 257]}, 400, "bad_words", "of 256 characters"),
    (CHAT, {"messages": [{}] * 100_001}, 400, "messages", "at most 100000 items"),
    (CHAT, {"messages": HI, "tools": [TOOL] * 2049}, 400, "tools", "at most 2048 items"),
    ("/tokenize", {"messages": HI, "tools": [TOOL] * 2049}, 400, "tools", "at most 2048 items"),
    (CHAT, {"messages": HI, "seed": 2**63}, 400, "seed", "64-bit"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs", "logprobs to be true"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "at most 20"),
    (CHAT, {"messages": HI, "logprobs": 3}, 400, "logprobs", "valid boolean"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, 400, "stream_options", "stream to be true"),
    (CHAT, {"messages": HI, "stream": True, "prompt_logprobs": 1}, 400, "prompt_logprobs", "stream: true"),
    (CHAT, {"messages": HI, "stream": True, "stream_options": {"include_usage": "yes"}}, 400,
     "stream_options.include_usage", "valid boolean"),
    (CHAT, {"messages": HI, "tools": []}, 400, "tools", "not be empty"),
    (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {}}]}, 400, "tools.0.function.name", "name"),
    (CHAT, {"messages": HI, "tool_choice": "auto"}, 400, "tool_choice", "needs tools"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, 400, "tool_choice", "needs tools"),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400,
     "tool_choice", "'g', which is not among tools"),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "any"}, 400, "tool_choice", '"none", "auto", "required"'),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, 400, "tool_choice", "names a"),
    (CHAT, {"messages": HI, "tools": ["f"], "tool_choice": "required"}, 400, "tools.0", "an object"),
    (CHAT, {"messages": HI, "tools": [{"function": "f"}], "parallel_tool_calls": False}, 400, "tools.0", "an object"),
    (CHAT, {"messages": HI, "tools": [strict({"type": "object", "properties": {"x": {"not": {}}}})]}, 400,
     "tools.0.function.parameters.properties.x.not", "not"),
    (CHAT, {"messages": HI, "tools": [strict({"type": "array"})], "tool_choice": "required"}, 400,
     "tools.0.function.parameters.type", "object"),
    (CHAT, {"messages": HI, "response_format": "json"}, 400, "response_format.type", "json_schema or structural_tag"),
    (CHAT, {"messages": HI, "response_format": {"type": "xml"}}, 400, "response_format.type", "got 'xml'"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "schema"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, 400,
     "response_format.json_schema.schema.type", "x"),
    (CHAT, {"messages": HI, "response_format": {"type": "structural_tag"}}, 400, "response_format.format", "object"),
    (CHAT, {"messages": HI, "structured_outputs": []}, 400, "structured_outputs", "an object with one of"),
    (CHAT, {"messages": HI, "structured_outputs": {}}, 400, "structured_outputs", "exactly one of"),
    (CHAT, {"messages": HI, "structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, "structured_outputs", "got 2"),
    (CHAT, {"messages": HI, "structured_outputs": {"json": "{"}}, 400, "structured_outputs.json", "must be JSON"),
    (CHAT, {"messages": HI, "structured_outputs": {"choice": "a"}}, 400, "structured_outputs.choice", "a list"),
    (CHAT, {"messages": HI, "structured_outputs": {"grammar": "a"}}, 400, "structured_outputs.grammar", "rule root"),
    (CHAT, {"messages": HI, "structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, 400,
     "structured_outputs.whitespace_pattern", "leave it out"),
    (CHAT, {"messages": HI, "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, 400,
     "structured_outputs", "give one"),
    (CHAT, {"messages": HI, "structured_outputs": {"regex": "a"}, "min_tokens": 5}, 400, "min_tokens", "combined with"),
    (CHAT, {"messages": HI, "structured_outputs": {"regex": "a"}, "bad_words": ["a"]}, 400, "bad_words", "combined"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}, "ignore_eos": True}, 400, "ignore_eos",
     "response_format"),
    (CHAT, {"messages": HI, "thinking_token_budget": 5, "allowed_token_ids": [1]}, 400, "allowed_token_ids",
     "thinking_token_budget"),
    (CHAT, {"messages": HI, "thinking_token_budget": -2}, 400, "thinking_token_budget", "0 or more"),
    (CHAT, {"messages": HI, "thinking_token_budget": 5, "reasoning_effort": "none"}, 400, "thinking_token_budget",
     "reasoning_effort none"),
    (CHAT, {"messages": HI, "guided_json": {"type": "object"}}, 400, "guided_json", "structured_outputs.json"),
    (CHAT, {"messages": HI, "guided_json": {}}, 400, "guided_json", "structured_outputs.json"),
    (TEXT, {"prompt": "a", "guided_regex": "a"}, 400, "guided_regex", "structured_outputs.regex"),
    (TEXT, {"prompt": "a", "guided_choice": ["a"]}, 400, "guided_choice", "structured_outputs.choice"),
    (TEXT, {"prompt": "a", "guided_grammar": "a"}, 400, "guided_grammar", "structured_outputs.grammar"),
    (TEXT, {"prompt": "a", "structured_outputs": {"regex": "a{99999}"}}, 400, "structured_outputs.regex", "repeats"),
    (CHAT, {"messages": HI, "chat_template": "{{ messages }}"}, 400, "chat_template", "--chat-template"),
    (CHAT, {"messages": HI, "reasoning_effort": "huge"}, 400, "reasoning_effort", "one of none"),
    (CHAT, {"messages": HI, "continue_final_message": True}, 400, "continue_final_message", "role assistant"),
    (CHAT, {"messages": HI, "request_id": ""}, 400, "request_id", "at least 1 character"),
    (CHAT, {"messages": HI, "cache_salt": ""}, 400, "cache_salt", "at least 1 character"),
    (CHAT, {"messages": HI, "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", "-1 or from 1"),
    (CHAT, {"messages": HI, "stream": True, "stream_interval": 5}, 400, "stream_interval", "must be 1"),
    (CHAT, {"messages": HI, "use_beam_search": True}, 400, "use_beam_search", "not supported"),
    (TEXT, {}, 400, "prompt", "prompt must be"),
    (TEXT, {"prompt": []}, 400, "prompt", "not empty"),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt", "prompt must be"),
    (TEXT, {"prompt": ["a", 1]}, 400, "prompt.1", "prompt must be"),
    (TEXT, {"prompt": [BIG]}, 400, "prompt", "token ids from 0 to"),
    (TEXT, {"prompt": [[1], [BIG]]}, 400, "prompt.1", "token ids from 0 to"),
    (TEXT, {"prompt": ""}, 400, "prompt", "no tokens"),
    (TEXT, {"prompt": "a", "best_of": 3}, 400, "best_of", "use n"),
    (TEXT, {"prompt": "a", "suffix": "b"}, 400, "suffix", "fill-in-the-middle"),
    (TEXT, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "at most 20"),
    (TEXT, {"prompt": "a", "logprobs": -1}, 400, "logprobs", "0 or more"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    (TEXT, {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, 400, "echo", "stream: true"),
    ("/tokenize", {}, 400, "prompt", "either prompt or messages"),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model", "does not exist"),
    ("/detokenize", {"tokens": [BIG]}, 400, "tokens", "token ids from 0 to"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens.0", "greater than or equal to 0"),
]  # fmt: skip


async def test_bad_bodies_are_refused_by_field(tokenizer: Tokenizer) -> None:
    wrong = []
    async with running(tokenizer, words(tokenizer, "x")) as server:
        for route, body, status, param, part in CASES:
            got_status, reply = await server.post(route, body)
            error = reply.get("error", {})
            if not (
                got_status == error.get("code") == status and error["param"] == param and part in error["message"]
            ):
                wrong.append((route, body, got_status, reply))
        assert not server.client.requests, "the engine saw a bad request"
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("data", "content_type", "part"),
    [
        (b"{", "application/json", "Invalid JSON"),
        (b"", "application/json", "Invalid JSON"),
        (b"[" * 100_000, "application/json", "recursion limit"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", "Invalid JSON"),
        (b"messages=hi", "application/x-www-form-urlencoded", "must be application/json"),
        (b'"text"', "application/json", "an object"),
    ],
)
async def test_what_is_no_json_object(tokenizer: Tokenizer, data: bytes, content_type: str, part: str) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        headers = {"content-type": content_type}
        async with server.http.post(server.base + CHAT, data=data, headers=headers) as reply:
            body = await reply.json()
    assert reply.status == 400
    assert part in body["error"]["message"]


async def test_ten_errors_at_most_and_short(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, reply = await server.post(CHAT, {"messages": ["x" * 10_000] * 30})
    message = reply["error"]["message"]
    assert message.count("an object") == 10
    assert "and 20 more" in message
    assert len(message) < 2500


async def test_unknown_fields_are_ignored(tokenizer: Tokenizer) -> None:
    extra = {"store": False, "metadata": {"a": 1}, "user": "me", "service_tier": "auto", "guided_json": None, "zzz": 1}
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, _ = await server.post(CHAT, {"messages": HI, **extra})
    assert status == 200


async def test_nulls_mean_absent(tokenizer: Tokenizer) -> None:
    names = ["temperature", "top_p", "top_k", "n", "stop", "max_tokens", "tools", "tool_choice", "logprobs", "seed",
             "response_format", "stream_options", "model", "logit_bias", "reasoning_effort"]  # fmt: skip
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, _ = await server.post(CHAT, {"messages": HI, **dict.fromkeys(names)})
    assert status == 200


async def test_unknown_routes_and_methods_have_the_error_shape(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        async with server.http.get(server.base + "/v1/nothing") as reply:
            assert (reply.status, (await reply.json())["error"]["type"]) == (404, "NotFoundError")
        async with server.http.get(server.base + CHAT) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (405, 405)


async def test_the_client_library_sees_the_field(tokenizer: Tokenizer) -> None:
    import openai

    async with running(tokenizer, words(tokenizer, "x")) as server:
        client = openai.AsyncOpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="saddle-test", messages=HI, temperature=9)  # type: ignore[arg-type]
        await client.close()
    assert caught.value.param == "temperature"
    assert "between 0 and 2" in str(caught.value)



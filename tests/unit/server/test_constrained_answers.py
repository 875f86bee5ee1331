"""What structured output, required calls and thinking budgets become: a grammar in the request, and a clean answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from saddle.config import ServerConfig
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec
from tests.unit.server.harness import running, words

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "write", "parameters": {
    "type": "object", "properties": {"path": {"type": "string"}}}}}  # fmt: skip
OTHER = {"type": "function", "function": {"name": "read"}}
STRICT = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
JSON = {"type": "json_object"}
FOO = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"foo": {}}}}}


async def sent(tokenizer: Tokenizer, route: str, body: dict[str, Any]) -> GrammarSpec | None:
    """The grammar of the request that the engine got."""
    async with running(tokenizer, words(tokenizer, "</think>", "\n\n{}")) as server:
        status, reply = await server.post(route, body)
        assert status == 200, reply
        [request] = server.client.requests
        return request.grammar


@pytest.mark.parametrize(
    ("fields", "kind", "inside"),
    [
        ({}, None, ""),
        ({"response_format": {"type": "text"}}, None, ""),
        ({"response_format": JSON}, "json_schema", "object"),
        ({"response_format": FOO}, "json_schema", "foo"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": "ab"}}},
         "structural_tag", "ab"),
        ({"structured_outputs": {"json": {"type": "integer"}}}, "json_schema", "integer"),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "json_schema", "integer"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", "object"),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", "yes"),
        ({"structured_outputs": {"grammar": 'root ::= "x"'}}, "grammar", "root"),
        ({"structured_outputs": {"structural_tag": '{"format": {"type": "regex", "pattern": "ab"}}'}},
         "structural_tag", "ab"),
        ({"tools": [TOOL]}, None, ""),
        ({"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}, None, ""),
        ({"tools": [TOOL], "tool_choice": "none"}, None, ""),
        ({"tools": [STRICT], "tool_choice": "none"}, None, ""),
        ({"tools": [STRICT]}, "text_or_tools", "path"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "text_or_tools", '"stop_after_first": true'),
        ({"tools": [TOOL, OTHER], "tool_choice": "required"}, "tools", "read"),
        ({"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "write"}}}, "tools",
         "write"),
        ({"tools": [TOOL], "response_format": JSON}, "answer_or_tools", "write"),
        ({"tools": [TOOL], "response_format": JSON, "tool_choice": "none"}, "json_schema", "object"),
        ({"tools": [TOOL], "response_format": JSON, "tool_choice": "required"}, "tools", "write"),
        ({"thinking_token_budget": 7}, "unbound", ""),
        ({"thinking_token_budget": -1}, None, ""),
        ({"reasoning_effort": "high"}, None, ""),
        ({"reasoning_effort": "none"}, "unbound", ""),
    ],
)  # fmt: skip
async def test_chat_fields_become_a_grammar(
    tokenizer: Tokenizer, fields: dict[str, Any], kind: str | None, inside: str
) -> None:
    grammar = await sent(tokenizer, CHAT, {"messages": HI, **fields})
    if kind is None:
        assert grammar is None
        return
    assert grammar is not None
    assert (grammar.kind, grammar.after_token_id) == (kind, tokenizer.end_think_id)
    assert inside in grammar.source
    budgets = {7: 7, None: 0 if fields.get("reasoning_effort") == "none" else None}
    assert grammar.max_thinking_tokens == budgets[fields.get("thinking_token_budget")]


async def test_a_named_tool_is_the_only_one(tokenizer: Tokenizer) -> None:
    named = {"type": "function", "function": {"name": "write"}}
    grammar = await sent(tokenizer, CHAT, {"messages": HI, "tools": [TOOL, OTHER], "tool_choice": named})
    assert grammar is not None
    assert "read" not in grammar.source
    assert '"stop_after_first": true' in grammar.source


async def test_without_thinking_the_first_token_is_bound(tokenizer: Tokenizer) -> None:
    half = [*HI, {"role": "assistant", "content": "I say: "}]
    body = {"messages": half, "continue_final_message": True, "response_format": JSON, "thinking_token_budget": 3}
    grammar = await sent(tokenizer, CHAT, body)
    assert grammar is not None
    assert (grammar.kind, grammar.after_token_id, grammar.max_thinking_tokens) == ("json_schema", None, None)
    assert await sent(tokenizer, CHAT, {**body, "response_format": None}) is None, "there is no thinking to limit"


async def test_completions_are_bound_where_their_prompt_leaves_them(tokenizer: Tokenizer) -> None:
    body = {"structured_outputs": {"choice": ["yes"]}, "thinking_token_budget": 9}
    plain = await sent(tokenizer, TEXT, {"prompt": "Well?", **body})
    thinks = await sent(tokenizer, TEXT, {"prompt": "Well?<think>", **body})
    assert plain is not None and thinks is not None
    assert (plain.after_token_id, plain.max_thinking_tokens) == (None, None)
    assert (thinks.after_token_id, thinks.max_thinking_tokens) == (tokenizer.end_think_id, 9)


async def test_the_empty_line_is_no_part_of_the_answer(tokenizer: Tokenizer) -> None:
    script = words(tokenizer, "hm", "</think>", "\n", "\n", '\n{"a"', ": 1}")
    async with running(tokenizer, script) as server:
        _, plain = await server.post(CHAT, {"messages": HI})
        _, bound = await server.post(CHAT, {"messages": HI, "response_format": JSON})
        frames = await server.frames(CHAT, {"messages": HI, "response_format": JSON})
    assert plain["choices"][0]["message"]["content"] == '\n\n\n{"a": 1}'
    assert bound["choices"][0]["message"]["content"] == '\n{"a": 1}', "two newlines and no more"
    assert bound["choices"][0]["message"]["reasoning"] == "hm"
    deltas = [json.loads(frame)["choices"][0]["delta"] for frame in frames[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == '\n{"a": 1}'


async def test_an_answer_that_was_cut_off_in_its_lead_is_empty(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "hm</think>", "\n\n", eos=False)) as server:
        _, reply = await server.post(CHAT, {"messages": HI, "response_format": JSON})
        frames = await server.frames(CHAT, {"messages": HI, "response_format": JSON})
    assert (reply["choices"][0]["message"]["content"] or "") == ""
    assert reply["choices"][0]["finish_reason"] == "length"
    deltas = [json.loads(frame)["choices"][0]["delta"] for frame in frames[:-1]]
    assert [delta["content"] for delta in deltas if "content" in delta] == [""]


async def test_text_with_its_thinking_keeps_the_empty_line(tokenizer: Tokenizer) -> None:
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, reasoning_parser=None)
    async with running(tokenizer, words(tokenizer, "hm</think>", "\n\n{}"), config) as server:
        _, reply = await server.post(CHAT, {"messages": HI, "response_format": JSON})
    assert reply["choices"][0]["message"]["content"] == "hm</think>\n\n{}"


async def test_only_the_first_empty_line_is_dropped(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "hm</think>\n\na", "\n\nb", "\n\nc")) as server:
        body = {"messages": HI, "structured_outputs": {"regex": "[abc\\n]+"}}
        _, reply = await server.post(CHAT, body)
    assert reply["choices"][0]["message"]["content"] == "a\n\nb\n\nc"


async def test_completions_keep_all_their_text(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "\n\nhm", "</think>", "\n\nyes")) as server:
        body = {"prompt": "Well?<think>", "structured_outputs": {"choice": ["yes"]}}
        _, reply = await server.post(TEXT, body)
    assert reply["choices"][0]["text"].startswith("\n\nhm")
    assert reply["choices"][0]["text"].endswith("\n\nyes")


async def test_a_named_tool_finishes_with_stop(tokenizer: Tokenizer) -> None:
    call = '<invoke name="write">\n<parameter name="path">a</parameter>\n</invoke>\n'
    script = words(tokenizer, "</think>\n\n\n", "<minimax:tool_call>\n", call, "</minimax:tool_call>")
    named = {"type": "function", "function": {"name": "write"}}
    async with running(tokenizer, script) as server:
        reasons = []
        for choice in ("required", named):
            body = {"messages": HI, "tools": [TOOL], "tool_choice": choice}
            _, reply = await server.post(CHAT, body)
            frames = await server.frames(CHAT, body)
            message = reply["choices"][0]["message"]
            assert message["content"] is None, "newlines in front of a call are no answer"
            assert [c["function"]["name"] for c in message["tool_calls"]] == ["write"]
            last = json.loads(frames[-2])["choices"][0]["finish_reason"]
            reasons.append((reply["choices"][0]["finish_reason"], last))
    assert reasons == [("tool_calls", "tool_calls"), ("stop", "stop")]


FLAT = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
ANTHROPIC = {"name": "write", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(("route", "body", "is_banned"), [
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "none"}, True),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "none", "thinking_token_budget": 5}, True),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "none", "response_format": JSON}, False),
    (CHAT, {"messages": HI, "tools": [TOOL]}, False), (CHAT, {"messages": HI, "tool_choice": "none"}, False),
    ("/v1/responses", {"input": "hi", "tools": [FLAT], "tool_choice": "none"}, True),
    ("/v1/responses", {"input": "hi", "tools": [FLAT]}, False),
    ("/v1/messages", {"messages": HI, "max_tokens": 9, "tools": [ANTHROPIC], "tool_choice": {"type": "none"}}, True),
    ("/v1/messages", {"messages": HI, "max_tokens": 9, "tools": [ANTHROPIC]}, False),
])  # fmt: skip
async def test_none_keeps_calls_from_being_begun(
    tokenizer: Tokenizer, route: str, body: dict[str, Any], is_banned: bool
) -> None:
    async with running(tokenizer, words(tokenizer, "</think>", "\n\n{}")) as server:
        status, reply = await server.post(route, body)
        assert status == 200, reply
        [request] = server.client.requests
    assert request.params.bad_words_ids == (((tokenizer.calls_id,),) if is_banned else ())

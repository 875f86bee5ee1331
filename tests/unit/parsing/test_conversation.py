"""What clients send, made into what the template takes; what cannot be is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from saddle.errors import InvalidRequest
from saddle.parsing.conversation import normalise

USER = {"role": "user", "content": "hi"}


def call(call_id: str, name: str = "f", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **fields}


def last(*messages: dict[str, Any]) -> dict[str, Any]:
    return normalise(list(messages)).messages[-1]


@pytest.mark.parametrize(("content", "text"), [
    (None, ""), ("x", "x"), ([], ""), (["a", "b"], "ab"),
    ([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"text": "c"}], "abc"),
    ([{"type": "refusal", "refusal": "no"}, {"type": "output_text", "text": "!"}], "no!"),
])  # fmt: skip
def test_content_becomes_text(content: Any, text: str) -> None:
    for role in ("user", "system", "assistant"):
        made = normalise([{"role": role, "content": content}]).messages
        assert [message["content"] for message in made] == ([text] if text or role != "system" else [])
    assert last(assistant(tool_calls=[call("1")]), {"role": "tool", "tool_call_id": "1", "content": content}) == {
        "role": "tool", "tool_call_id": "1", "content": text,
    }  # fmt: skip


def test_system_messages_become_one_in_front() -> None:
    made = normalise([
        {"role": "system", "content": "a"}, USER, {"role": "developer", "content": "b"},
        {"role": "system", "content": ""},
        {"role": "system", "content": [{"type": "text", "text": "c"}], "current_date": "today"},
    ]).messages  # fmt: skip
    assert made == [{"role": "system", "content": "a\n\nb\n\nc", "current_date": "today"}, USER]


@pytest.mark.parametrize("arguments", ['{"a": [1, "é"]}', {"a": [1, "é"]}])
def test_arguments_become_objects(arguments: Any) -> None:
    made = last(assistant(tool_calls=[call("1", arguments=arguments)]))
    assert made["tool_calls"] == [{"id": "1", "function": {"name": "f", "arguments": {"a": [1, "é"]}}}]


@pytest.mark.parametrize("arguments", [None, "", "{}"])
def test_no_arguments(arguments: Any) -> None:
    assert last(assistant(tool_calls=[call("1", arguments=arguments)]))["tool_calls"][0]["function"]["arguments"] == {}


def test_flat_calls_and_tools_are_wrapped() -> None:
    flat = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    made = normalise([assistant(tool_calls=[{"id": "1", "name": "f", "arguments": "{}"}])], [flat])
    assert made.messages[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert made.tools == [{"type": "function", "function": function}]
    assert normalise([USER], [{"type": "function", "function": function}]).tools == made.tools
    assert normalise([USER], []).tools is None


@pytest.mark.parametrize("fields", [
    {"reasoning_content": "r"}, {"reasoning": "r"}, {"reasoning_content": "\nr\n"},
    {"reasoning": "r\n", "content": "\n\nc"}, {"reasoning_details": [{"type": "reasoning.text", "text": "r"}]},
    {"reasoning_content": None, "reasoning": "r"}, {"content": "<think>\nr\n</think>\n\nc"},
    {"content": "r</think>c"}, {"content": "<think>r</think>\n\nc"},
    {"reasoning_content": "", "content": "<think>r</think>c"},
])  # fmt: skip
def test_thinking_in_every_form(fields: dict[str, Any]) -> None:
    made = last(USER, assistant(**{"content": "c", **fields}))
    assert (made["reasoning_content"], made["content"]) == ("r", "c")


def test_thinking_in_parts_is_joined() -> None:
    details = [{"text": "a"}, {"summary": "b"}, {"type": "reasoning.encrypted", "data": "x"}]
    assert last(assistant(reasoning_details=details))["reasoning_content"] == "ab"


def test_the_newline_before_calls_is_the_templates() -> None:
    assert last(assistant(content="\n\nI will.\n", tool_calls=[call("1")]))["content"] == "I will."
    assert last(assistant(content="\n\nDone.\n"))["content"] == "Done.\n"


def test_results_follow_the_order_of_calls() -> None:
    def result(call_id: str | None) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": call_id, "content": f"r{call_id}"}

    made = normalise([
        USER, assistant(tool_calls=[call("1"), call("2"), call("3")]), result("9"), result("3"), result("1"),
        result("2"),
        assistant(tool_calls=[call("2"), call("1")]), result("1"), result("2"),
    ]).messages  # fmt: skip
    assert [m["content"] for m in made if m["role"] == "tool"] == ["r1", "r2", "r3", "r9", "r2", "r1"]
    unnamed = normalise([assistant(tool_calls=[call("1"), call("2")]), result(None), {**result(None), "content": "b"}])
    assert [m["content"] for m in unnamed.messages[1:]] == ["rNone", "b"]


def test_what_came_in_is_not_changed() -> None:
    message = assistant(content="\n\nx\n", tool_calls=[call("1", arguments={"a": 1})], reasoning="r\n")
    tools = [{"name": "f", "strict": True}]
    before = repr((message, tools))
    normalise([message], tools)
    assert repr((message, tools)) == before


@pytest.mark.parametrize(("messages", "param"), [
    (["x"], "messages.0"), ([USER, {"content": "x"}], "messages.1.role"), ([{"role": "critic"}], "messages.0.role"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type"),
    ([{"role": "user", "content": ["a", {"type": "text"}]}], "messages.0.content.1.text"),
    ([{"role": "user", "content": [5]}], "messages.0.content.0"),
    ([{"role": "tool", "content": "x"}], "messages.0.role"), ([assistant(), {"role": "tool"}], "messages.1.role"),
    ([assistant(reasoning=5)], "messages.0.reasoning"),
    ([assistant(reasoning_details="x")], "messages.0.reasoning_details"),
    ([assistant(tool_calls={})], "messages.0.tool_calls"), ([assistant(tool_calls=["x"])], "messages.0.tool_calls.0"),
    ([assistant(tool_calls=[{"function": {"name": ""}}])], "messages.0.tool_calls.0.function.name"),
    ([assistant(tool_calls=[{"function": "x"}])], "messages.0.tool_calls.0.function"),
    ([USER, assistant(tool_calls=[call("1"), call("2", arguments="{")])], "messages.1.tool_calls.1.function.arguments"),
    ([assistant(tool_calls=[call("1", arguments="[1]")])], "messages.0.tool_calls.0.function.arguments"),
    ([assistant(tool_calls=[call("1", arguments="[" * 200_000)])], "messages.0.tool_calls.0.function.arguments"),
    ([assistant(tool_calls=[{**call("1"), "id": {}}])], "messages.0.tool_calls.0.id"),
    ([assistant(tool_calls=[call("1")]), {"role": "tool", "tool_call_id": [1]}], "messages.1.tool_call_id"),
])  # fmt: skip
def test_refused_messages(messages: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise(messages)
    assert caught.value.param == param and param in caught.value.message and len(caught.value.message) < 300


@pytest.mark.parametrize(("tools", "param"), [
    (["x"], "tools.0"), ([{"function": {"name": "f"}}, {"type": "function"}], "tools.1.function.name"),
    ([{"function": 5}], "tools.0.function"), ([{"function": {"name": 5}}], "tools.0.function.name"),
    ([{"function": {"name": "f", "parameters": "x"}}], "tools.0.function.parameters"),
    ([{"type": "custom", "custom": {"name": "f"}}], "tools.0.type"), ([{"type": 5, "name": "f"}], "tools.0.type"),
])  # fmt: skip
def test_refused_tools(tools: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise([USER], tools)
    assert caught.value.param == param and param in caught.value.message

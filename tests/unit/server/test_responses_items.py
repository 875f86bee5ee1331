"""Items that come in: which of them are one turn of the model, what is left out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saddle.errors import InvalidRequest
from saddle.server.responses_items import Reader, Seal, as_items, call_item, message_item, reasoning_item, text_part

A, B = "a" * 32, "b" * 32
SEAL = Seal(b"k" * 32)


def read(*items: Any, given: Any = None) -> Reader:
    reader = Reader(SEAL)
    reader.add(as_items(list(items) if given is None else given, "0" * 32))
    return reader


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def think(text: str, key: str | None = None, number: int = 0) -> dict[str, Any]:
    item = reasoning_item(f"rs_{key}_{number}", text, "completed", summary=False, sealed=None)
    return item if key else {name: value for name, value in item.items() if name != "id"}


def say(text: str, key: str | None = None, number: int = 1) -> dict[str, Any]:
    item = message_item(f"msg_{key}_{number}", [text_part(text)], "completed")
    return item if key else {name: value for name, value in item.items() if name != "id"}


def call(call_id: str, key: str | None = None, number: int = 2, **fields: Any) -> dict[str, Any]:
    item = call_item(f"fc_{key}_{number}", call_id, "f", '{"x": 1}', "completed") | fields
    return item if key else {name: value for name, value in item.items() if name != "id"}


def result(call_id: str, text: str = "done") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def turn(content: str = "", *calls: str, **fields: Any) -> dict[str, Any]:
    made = [{"id": call_id, "function": {"name": "f", "arguments": {"x": 1}}} for call_id in calls]
    return {"role": "assistant", "content": content, "tool_calls": made, **fields}


def tool(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "done"}


def test_text_is_a_message_of_the_user() -> None:
    assert read(given="hi").messages == [user("hi")]
    assert as_items("hi", "k") == [{"role": "user", "content": [{"type": "input_text", "text": "hi"}],
                                    "type": "message", "id": "in_k_0"}]  # fmt: skip


@pytest.mark.parametrize("key", [A, None])
def test_thinking_text_and_calls_are_one_turn(key: str | None) -> None:
    reader = read(user("go"), think("Hm", key), say("Now.", key), call("c1", key), call("c2", key, 3),
                  result("c1"), result("c2"), think("So", key and B), say("Ready", key and B))  # fmt: skip
    assert reader.messages == [
        user("go"), turn("Now.", "c1", "c2", reasoning_content="Hm"), tool("c1"), tool("c2"),
        turn("Ready", reasoning_content="So"),
    ]  # fmt: skip
    assert reader.ignored == []


def test_thinking_begins_a_turn() -> None:
    assert read(think("Hm"), call("c1"), think("So"), call("c2")).messages == [
        turn("", "c1", reasoning_content="Hm"), turn("", "c2", reasoning_content="So"),
    ]  # fmt: skip


def test_turns_without_thinking_are_told_by_what_is_between() -> None:
    assert read(user("go"), call("c1"), result("c1"), call("c2"), result("c2")).messages == [
        user("go"), turn("", "c1"), tool("c1"), turn("", "c2"), tool("c2"),
    ]  # fmt: skip


def test_a_message_of_the_user_ends_a_turn() -> None:
    assert read(say("a"), user("go"), call("c1")).messages == [turn("a"), user("go"), turn("", "c1")]


def test_calls_of_one_response_are_one_turn_even_with_results_between() -> None:
    mixed = [think("Hm", A), call("c1", A), result("c1"), call("c2", A, 3), result("c2")]
    assert read(*mixed).messages == [turn("", "c1", "c2", reasoning_content="Hm"), tool("c1"), tool("c2")]


def test_messages_in_a_row() -> None:
    """Of one response they are one text; of nobody knows which response they are turns of their own."""
    assert read(say("a", A), say("b", A, 2)).messages == [turn("ab")]
    assert read(say("a"), say("b")).messages == [turn("a"), turn("b")]
    assert read(say("a", A), say("b", B)).messages == [turn("a"), turn("b")]
    assert read(say("a"), call("c1"), say("b")).messages == [turn("ab", "c1")], "text behind a call is of its turn"


def test_where_thinking_is_read_from() -> None:
    def text(**fields: Any) -> tuple[Any, list[str]]:
        reader = read({"type": "reasoning", **fields}, say("x"))
        return reader.messages[0]["reasoning_content"], reader.ignored

    content, summary = [{"type": "reasoning_text", "text": "content"}], [{"type": "summary_text", "text": "summary"}]
    assert text(encrypted_content=SEAL.close("sealed"), content=content, summary=summary) == ("sealed", [])
    assert text(encrypted_content=Seal(b"x").close("other"), content=content) == ("content", [])
    assert text(encrypted_content=None, content=content, summary=summary) == ("content", [])
    assert text(encrypted_content=None, content=None, summary=summary) == ("summary", [])
    assert text(encrypted_content="gAAAAAB", summary=[]) == ("", ["reasoning.encrypted_content"])
    assert text(summary=[summary[0], summary[0]]) == ("summary\n\nsummary", [])


@given(st.text())
def test_seal(text: str) -> None:
    sealed = SEAL.close(text)
    assert SEAL.open(sealed) == text
    assert Seal(b"other").open(sealed) is None
    for number in (0, len(sealed) // 2, len(sealed) - 6):
        changed = sealed[:number] + ("A" if sealed[number] != "A" else "B") + sealed[number + 1 :]
        assert SEAL.open(changed) is None


@pytest.mark.parametrize("sealed", ["", "saddle1.", "saddle1.é", "saddle1.A", "saddle1.AAAA", "x" * 100])
def test_seal_of_nobody(sealed: str) -> None:
    assert SEAL.open(sealed) is None


def test_calls_of_other_kinds_are_calls() -> None:
    reader = read({"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "*** Begin"},
                  {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
                  {"type": "local_shell_call", "call_id": "c2", "action": {"type": "exec", "command": ["ls"]}},
                  {"type": "local_shell_call_output", "id": "c2", "output": "done"})  # fmt: skip
    calls = [call["function"] for message in reader.messages for call in message.get("tool_calls", ())]
    assert calls == [{"name": "patch", "arguments": {"input": "*** Begin"}},
                     {"name": "local_shell", "arguments": {"type": "exec", "command": ["ls"]}}]  # fmt: skip
    assert [message["content"] for message in reader.messages if message["role"] == "tool"] == ["done", "done"]


def test_foreign_items_are_left_out_and_listed() -> None:
    reader = read(user("go"), {"type": "web_search_call", "id": "ws_1"}, {"type": "mcp_call"},
                  {"type": "web_search_call", "id": "ws_2"})  # fmt: skip
    assert reader.messages == [user("go")]
    assert reader.ignored == ["web_search_call", "mcp_call"]


def test_a_call_that_was_cut_off_was_never_made() -> None:
    assert read(think("Hm"), call("c1", status="incomplete", arguments='{"x')).messages == [
        turn(reasoning_content="Hm")
    ]


def test_results_may_be_parts() -> None:
    reader = read(call("c1"), {**result("c1"), "output": [{"type": "input_text", "text": "do"},
                                                          {"type": "input_text", "text": "ne"}]})  # fmt: skip
    assert reader.messages[1] == tool("c1")


WRONG: list[tuple[Any, str, str]] = [
    (None, "input", "missing"),
    (5, "input", "string or a list"),
    ({"role": "user"}, "input", "string or a list"),
    (["hi"], "input.0", "must be an object"),
    ([{}], "input.0.type", "one of message"),
    ([{"type": "song"}], "input.0.type", "'song'"),
    ([{"type": ["message"]}], "input.0.type", "one of message"),
    ([{"type": {}, "role": "user"}], "input.0.type", "one of message"),
    ([{"id": "msg_1"}], "input.0.type", "previous_response_id"),
    ([{"type": "item_reference", "id": "msg_1"}], "input.0.type", "not supported"),
    ([{"role": "tool", "content": "x"}], "input.0.role", "one of user"),
    ([{"role": "user", "content": 5}], "input.0.content", "string or a list"),
    ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input.0.content.0.type", "text"),
    ([{"type": "reasoning", "summary": "x"}], "input.0.summary", "list of parts"),
    ([{"type": "reasoning", "encrypted_content": 5}], "input.0.encrypted_content", "a string"),
    ([{"type": "function_call", "name": "f", "arguments": "{}"}], "input.0.call_id", "non-empty string"),
    ([{"type": "function_call", "call_id": "c", "arguments": "{}"}], "input.0.name", "non-empty string"),
    ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}], "input.0.arguments", "JSON object"),
    ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}], "input.0.arguments", "JSON object"),
    ([user("x"), result("c")], "input.1.call_id", "no call with call_id 'c'"),
    ([call("c"), {**result("c"), "output": 7}], "input.1.output", "string or a list"),
    ([user("x")] * 20_001, "input", "at most 20000"),
]


@pytest.mark.parametrize(("given", "param", "part"), WRONG)
def test_what_is_refused(given: Any, param: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Reader(SEAL).add(as_items(given, "k"))
    assert caught.value.param == param
    assert part in caught.value.message

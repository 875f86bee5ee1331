"""Anthropic's messages become the turns that M2's template renders, and nothing of them is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from saddle.errors import InvalidRequest
from saddle.parsing.conversation import normalise
from saddle.parsing.render import Renderer
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer
from saddle.server.anthropic_messages import Turns, to_functions, to_turns
from saddle.server.anthropic_parts import Signer

SIGNER = Signer(b"k" * 32)
CALL = {"type": "tool_use", "id": "c1", "name": "ls", "input": {"path": "/"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "bin"}
REMINDER = "<system-reminder>\nBe brief.\n</system-reminder>"


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else [*content]}


def ai(*content: Any) -> dict[str, Any]:
    return {**user(*content), "role": "assistant"}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def turns(*messages: dict[str, Any], system: Any = None) -> list[dict[str, Any]]:
    return to_turns(system, messages, SIGNER).messages


def test_strings_and_blocks_are_the_same() -> None:
    assert turns(user("hi")) == turns(user(text("hi", cache_control={"type": "ephemeral"})))
    assert turns(user("hi")) == [{"role": "user", "content": "hi"}]
    assert turns(user("hi"), system="S") == turns(user("hi"), system=[text("S", cache_control={"type": "ephemeral"})])


def test_blocks_of_a_user_are_lines_and_those_of_the_model_one_text() -> None:
    found = turns(user(text("a"), text("b")), ai(text("one "), text("two")), user("c"))
    assert [turn["content"] for turn in found] == ["a\nb", "one two", "c"]


def test_empty_texts_are_none() -> None:
    found = turns(user(text(""), text("a")), ai(text("")), user(text("b"), text("")))
    assert [turn["content"] for turn in found] == ["a", "", "b"]


def test_several_blocks_of_thinking_are_one() -> None:
    first, second = ({"type": "thinking", "thinking": thinking} for thinking in "ab")
    found = turns(user("x"), ai(first, text("so"), second, CALL), user(RESULT))
    assert found[1]["reasoning_content"] == "a\nb"


def test_messages_of_one_role_in_a_row_are_one_turn() -> None:
    split = turns(user("a"), user("b"), ai(text("x")), ai(CALL), user(RESULT), user("c"), user("d"))
    whole = turns(user(text("a"), text("b")), ai(text("x"), CALL), user(RESULT, text("c"), text("d")))
    assert split == whole
    assert [turn["role"] for turn in split] == ["user", "assistant", "tool", "user"]


def test_system_texts_are_paragraphs_and_a_leading_system_message_joins_them() -> None:
    found = turns(system("S2"), user("hi"), system=[text("S0"), text("S1")])
    assert found[0] == {"role": "system", "content": "S0\n\nS1\n\nS2"}
    assert len(found) == 2


@pytest.mark.parametrize(
    "given",
    [
        [text("x-anthropic-billing-header: cc_version=2.1.197.6d8; cc_entrypoint=sdk-cli;"), text("You are C.")],
        [text("x-anthropic-billing-header: cc_version=2.1.197.b24;\nYou are C.")],
        "x-anthropic-billing-header: cch=1;\n\nYou are C.",
        "You are C.",
    ],
)
def test_billing_header_is_dropped(given: Any) -> None:
    assert turns(user("hi"), system=given)[0] == {"role": "system", "content": "You are C."}
    assert turns(system(given), user("hi"))[0] == {"role": "system", "content": "You are C."}


def test_billing_header_alone_leaves_no_system_turn() -> None:
    assert turns(user("hi"), system="x-anthropic-billing-header: cch=1;") == [{"role": "user", "content": "hi"}]


def test_system_message_stays_behind_the_user_text_before_it() -> None:
    found = turns(user("hi"), system("Be brief."), system=None)
    assert found == [{"role": "user", "content": f"hi\n\n{REMINDER}"}]
    assert turns(user("hi"), system(REMINDER)) == found, "marked already"


def test_system_message_stays_behind_the_results_before_it() -> None:
    found = turns(user("hi"), ai(CALL), user(RESULT), system("Be brief."))
    assert [turn["role"] for turn in found] == ["user", "assistant", "tool"], "no user turn: the loop goes on"
    assert found[-1]["content"] == f"bin\n\n{REMINDER}"


def test_system_message_between_a_call_and_its_result_waits_for_it() -> None:
    assert turns(user("hi"), ai(CALL), system("Be brief."), user(RESULT)) == turns(
        user("hi"), ai(CALL), user(RESULT), system("Be brief.")
    )


def test_system_message_behind_an_answer_comes_with_the_next_user_text() -> None:
    found = turns(user("hi"), ai("x"), system("Be brief."), user("go on"))
    assert found[-1] == {"role": "user", "content": f"go on\n\n{REMINDER}"}
    found = turns(user("hi"), ai("x"), system("Be brief."))
    assert found[-1] == {"role": "user", "content": REMINDER}


def test_reminders_beside_results_belong_to_them_and_other_text_is_the_users() -> None:
    found = turns(user("hi"), ai(CALL), user(text(REMINDER), RESULT))
    assert found[-1] == {"role": "tool", "tool_call_id": "c1", "content": f"bin\n\n{REMINDER}"}
    found = turns(user("hi"), ai(CALL), user(text("stop that"), RESULT, text(REMINDER)))
    assert [turn["role"] for turn in found[-2:]] == ["tool", "user"]
    assert found[-1]["content"] == "stop that"


def test_a_call_and_its_result() -> None:
    found = turns(user("hi"), ai({"type": "thinking", "thinking": "hm", "signature": "?"}, text("so"), CALL),
                  user({**RESULT, "content": [text("a"), text("b")]}))  # fmt: skip
    assert found[1] == {
        "role": "assistant",
        "content": "so",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "ls", "arguments": {"path": "/"}}}],
    }
    assert found[2] == {"role": "tool", "tool_call_id": "c1", "content": "a\nb"}


@pytest.mark.parametrize(
    ("content", "shown"),
    [("no such file", "Error: no such file"), ("<tool_error>x</tool_error>", "<tool_error>x</tool_error>"),
     (None, "Error: ")],
)  # fmt: skip
def test_a_failed_call_says_so(content: Any, shown: str) -> None:
    found = turns(user("hi"), ai(CALL), user({**RESULT, "content": content, "is_error": True}))
    assert found[-1]["content"] == shown


def test_documents_and_search_results_are_text() -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    nested = {"type": "document", "source": {"type": "content", "content": [text("E")]}}
    search = {"type": "search_result", "source": "u", "title": "t", "content": [text("F")]}
    (found,) = turns(user(document, nested, search))
    assert found["content"] == (
        "<document>\nT\nD\n</document>\n<document>\nE\n</document>\n<search_result>\nt\nu\nF\n</search_result>"
    )


def test_blocks_of_other_servers_are_left_out_and_noted() -> None:
    found = to_turns(None, [user("hi"), ai({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                                           {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
                                           {"type": "redacted_thinking", "data": "x"}, text("so")), user("on")],
                     SIGNER)  # fmt: skip
    assert found.messages[1] == {"role": "assistant", "content": "so"}
    assert found.ignored == {"server_tool_use", "web_search_tool_result", "redacted_thinking"}


def thought(signature: str, thinking: str = "Deep.") -> Turns:
    block = {"type": "thinking", "thinking": thinking, "signature": signature}
    return to_turns(None, [user("hi"), ai(block, CALL), user(RESULT)], SIGNER)


def test_thinking_counts_whoever_wrote_it_and_it_is_known_who_did() -> None:
    own, foreign = thought(SIGNER.sign("Deep.")), thought("EqQBCgIYAhIM")
    assert own.messages == foreign.messages
    assert (own.num_foreign, foreign.num_foreign) == (0, 1)
    assert thought(SIGNER.sign("Deep."), "Deep.\n").num_foreign == 0, "white space around it does not matter"
    assert thought(SIGNER.sign("Deep."), "Deep!").num_foreign == 1
    assert thought(Signer(b"x" * 32).sign("Deep.")).num_foreign == 1


def test_a_sealed_signature_brings_the_thinking_back() -> None:
    sealed = SIGNER.seal("Deep. ü")
    assert thought(sealed, "").messages[1]["reasoning_content"] == "Deep. ü"
    others = Signer(b"x" * 32).seal("Deep.")
    for wrong in (others, sealed[:-6] + "AAAA", "saddle1s.", "saddle1s.!", "", SIGNER.sign("")):
        assert "reasoning_content" not in thought(wrong, "").messages[1], wrong
    assert "Deep" not in sealed


def test_an_answer_to_go_on_with() -> None:
    found = to_turns(None, [user("hi"), ai("The best answer is (")], SIGNER)
    assert found.ends_with_answer
    for empty in (ai(""), ai(), ai(text(""))):
        assert not to_turns(None, [user("hi"), empty], SIGNER).ends_with_answer


@pytest.mark.parametrize(
    ("messages", "path", "part"),
    [
        ([{"role": "robot", "content": "x"}], "messages.0.role", "one of user, assistant, system"),
        ([user(text("x")), {"role": "user", "content": 5}], "messages.1.content", "a string or a list of blocks"),
        ([user("x", 5)], "messages.0.content.0", "an object with a type"),
        ([user({"type": "text", "text": None})], "messages.0.content.0.text", "a string"),
        ([user({"type": "image", "source": {}})], "messages.0.content.0", "reads text only"),
        ([user({"type": "document", "source": {"type": "base64"}})], "messages.0.content.0.source", "reads text only"),
        ([user({"type": "document"})], "messages.0.content.0.source", "an object"),
        ([user({"type": "hologram"})], "messages.0.content.0.type", "'hologram', which has no place here"),
        ([user({"type": "tool_use"})], "messages.0.content.0.type", "no place here"),
        ([user(RESULT)], "messages.0.content.0.tool_use_id", "no message before it has a tool_use"),
        ([user("x"), ai(CALL), user({**RESULT, "tool_use_id": ""})], "messages.2.content.0.tool_use_id", "the id of"),
        ([user("x"), ai(CALL), user({**RESULT, "content": [{"type": "image"}]})], "messages.2.content.0.content.0",
         "reads text only"),
        ([user("x"), ai(RESULT)], "messages.1.content.0.type", "no place here"),
        ([user("x"), ai({**CALL, "input": "{}"})], "messages.1.content.0.input", "an object"),
        ([user("x"), ai({**CALL, "id": None})], "messages.1.content.0.id", "a non-empty string"),
        ([user("x"), ai({**CALL, "name": ""})], "messages.1.content.0.name", "a non-empty string"),
        ([user("x"), ai({"type": "thinking", "thinking": 1})], "messages.1.content.0.thinking", "a string"),
        ([user("x"), ai(CALL)], "messages.1", "the next message must bring its tool_result"),
        ([system([{"type": "image"}])], "messages.0.content.0", "reads text only"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_as_it_was_sent(messages: list[Any], path: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_turns(None, messages, SIGNER)
    assert caught.value.param == path
    assert caught.value.message.startswith(path)
    assert part in caught.value.message


def test_turns_are_fit_for_the_template(tokenizer: Tokenizer) -> None:
    """Rendered, everything that was said is in its place."""
    found = turns(user(text("first")), system("Rule."), ai({"type": "thinking", "thinking": "T"}, text("A"), CALL),
                  user(RESULT, text(REMINDER)), system="Lead.")  # fmt: skip
    renderer = Renderer(tokenizer, None, "X", ReplayStore(1 << 20), 1 << 20)
    function = to_functions([TOOL]).functions[0]
    rendered = renderer.render(normalise(found, [{"type": "function", "function": function}]))
    parts = [
        "Lead.",
        '"name": "ls"',
        "first\n\n<system-reminder>\nRule.",
        "<think>\nT\n</think>\n\nA\n<minimax:tool_call>",
        '<invoke name="ls">\n<parameter name="path">/</parameter>',
        f"<response>bin\n\n{REMINDER}</response>",
    ]
    places = [rendered.text.index(part) for part in parts]
    assert places == sorted(places)
    assert rendered.text.endswith("]~b]ai\n<think>\n")


TOOL: dict[str, Any] = {
    "name": "ls",
    "description": "List.",
    "input_schema": {"type": "object"},
    "cache_control": {"type": "ephemeral"},
}


def test_tools() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    found = to_functions([search, TOOL, {**TOOL, "name": "cp", "type": "custom", "strict": True}])
    assert found.functions == [
        {"name": "ls", "description": "List.", "parameters": {"type": "object"}},
        {"name": "cp", "description": "List.", "parameters": {"type": "object"}, "strict": True},
    ]
    assert found.places == [1, 2]
    assert found.ignored == {"web_search": "web_search_20250305"}


@pytest.mark.parametrize(
    ("tools", "path", "part"),
    [
        ([{"input_schema": {}}], "tools.0.name", "a non-empty string"),
        ([TOOL, {"name": "x"}], "tools.1.input_schema", "a JSON schema (an object)"),
        ([TOOL, TOOL], "tools.1.name", "must be unique"),
        ([{**TOOL, "description": 3}], "tools.0.description", "a string"),
    ],
)
def test_wrong_tools(tools: list[Any], path: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_functions(tools)
    assert caught.value.param == path
    assert part in caught.value.message

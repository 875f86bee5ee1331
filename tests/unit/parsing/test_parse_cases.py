"""What M2's output means, case by case; each case whole, token by token and in random deltas."""

from __future__ import annotations

import json
from typing import Any

import pytest

from saddle.parsing.arguments import Arguments
from saddle.parsing.events import Done, Event, Failed, ReasoningDelta, TextDelta, ToolArgs, ToolEnd, ToolStart
from saddle.parsing.fold import Completion, fold
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, SamplingParams, TokenDelta
from tests.unit.parsing.parsing_support import LENGTH, block, call, calls_of, cut, feed, parser, read, tool

TEXT, INTEGER = {"type": "string"}, {"type": "integer"}
TOOLS = [
    tool("weather", city=TEXT, days=INTEGER),
    tool("write", path=TEXT, mode=INTEGER, content=TEXT),
    tool("maybe", name={"anyOf": [TEXT, {"type": "null"}]}, data={"anyOf": [{"type": "object"}, {"type": "null"}]},
         kind={"type": "string", "enum": ["none", "some"]}),
    tool("ping"),
]  # fmt: skip
SPLITS = [None, [1] * 4000, 1, 2, 3]


def in_all_splits(tokenizer: Tokenizer, text: str, **options: Any) -> Completion:
    """The answer, which no split changes."""
    answers = [read(tokenizer, text, split=split, **{"tools": TOOLS, **options}) for split in SPLITS]
    for answer in answers[1:]:
        assert (answer.reasoning, answer.content, calls_of(answer), answer.usage, answer.finish_reason) == (
            answers[0].reasoning, answers[0].content, calls_of(answers[0]), answers[0].usage, answers[0].finish_reason)
    return answers[0]


# (text behind `</think>`, content, calls)
ANSWERS: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "plain": ("Hello world", "Hello world", []),
    "leading lines stay": ("\n\nHello\n", "\n\nHello\n", []),
    "only white space": ("\n\n", "\n\n", []),
    "content before a call": ("Let me check. " + block(call("weather", city="Seattle")), "Let me check. ",
                              [("weather", {"city": "Seattle"})]),
    "white space before a call": ("\n\n" + block(call("weather", city="Seattle")), "",
                                  [("weather", {"city": "Seattle"})]),
    "types": (block(call("weather", city="5", days="5")), "", [("weather", {"city": "5", "days": 5})]),
    "the same tool twice": (block(call("weather", city="A"), call("weather", city="B")), "",
                            [("weather", {"city": "A"}), ("weather", {"city": "B"})]),
    "two tools": (block(call("ping"), call("weather", city="B")), "", [("ping", {}), ("weather", {"city": "B"})]),
    "two blocks": (block(call("ping")) + "\n" + block(call("ping")), "", [("ping", {}), ("ping", {})]),
    "text between blocks": (block(call("ping")) + "\nand " + block(call("ping")) + " done\n", "\nand  done\n",
                            [("ping", {}), ("ping", {})]),
    "text after a block": (block(call("ping")) + "\n\nafter \n", "\n\nafter \n", [("ping", {})]),
    "no parameters": (block('<invoke name="ping"></invoke>'), "", [("ping", {})]),
    "string or null": (block(call("maybe", name="Alice", data="null")), "",
                       [("maybe", {"name": "Alice", "data": None})]),
    "null or string": (block(call("maybe", name="null", data='{"a": [1]}')), "",
                       [("maybe", {"name": None, "data": {"a": [1]}})]),
    "none is no null": (block(call("maybe", name="nil", kind="none")), "",
                        [("maybe", {"name": "nil", "kind": "none"})]),
    "white space of a value": (block(call("write", content="  a\n\tb \n")), "",
                               [("write", {"content": "  a\n\tb \n"})]),
    "empty value": (block(call("write", content="")), "", [("write", {"content": ""})]),
    "entities": (block(call("write", content="Tom &amp; J &lt;b&gt;")), "",
                 [("write", {"content": "Tom &amp; J &lt;b&gt;"})]),
    "braces in a value": (block(call("write", content="a}b{", path='"\\')), "",
                          [("write", {"content": "a}b{", "path": '"\\'})]),
    "look-alikes": (block(call("write", content="</p> </param <parameter\t< para </invok <invoke")), "",
                    [("write", {"content": "</p> </param <parameter\t< para </invok <invoke"})]),
    "tags in a value": (block(call("write", content="<think>x</think><minimax:tool_call></minimax:tool_call>")), "",
                        [("write", {"content": "<think>x</think><minimax:tool_call></minimax:tool_call>"})]),
    "unicode": ("日本語 🎉 " + block(call("write", content="naïve 🎉\u2028日本")), "日本語 🎉 ",
                [("write", {"content": "naïve 🎉\u2028日本"})]),
    "single quotes": (block("<invoke name='weather'><parameter name='city'>A</parameter></invoke>"), "",
                      [("weather", {"city": "A"})]),
    "no quotes": (block("<invoke name=weather><parameter name=city>A</parameter></invoke>"), "",
                  [("weather", {"city": "A"})]),
    "spaces": (block('<invoke name= "weather" >< parameter  name = "city" >A</parameter></invoke>'), "",
               [("weather", {"city": "A"})]),
    "name with an angle": (block(call("write", **{"a>b": "1"})), "", [("write", {"a>b": "1"})]),
    "value without its end": (block('<invoke name="write"><parameter name="path">/a<parameter name="mode">6'
                                    "</parameter></invoke>"), "", [("write", {"path": "/a", "mode": 6})]),
    "call without its end": (block('<invoke name="ping">\n<invoke name="weather">'), "",
                             [("ping", {}), ("weather", {})]),
    "end of a call in a value": (block('<invoke name="write"><parameter name="path">/a</invoke>'), "",
                                 [("write", {"path": "/a"})]),
    "end of a value in a value": (block(call("write", content="a</parameter>b")), "", [("write", {"content": "a"})]),
    "a name twice": (block('<invoke name="write"><parameter name="path">a</parameter>'
                           '<parameter name="path">b</parameter></invoke>'), "", [("write", {"path": "b"})]),
    "parameter that is not in the schema": (block(call("weather", other="5")), "", [("weather", {"other": "5"})]),
    "call without a block": ("x " + call("ping") + "\n" + call("weather", city="A") + "rest", "x \nrest",
                             [("ping", {}), ("weather", {"city": "A"})]),
    "end of thinking twice": ("a</think>b", "ab", []),
    "end of a block alone": ("a</minimax:tool_call>b", "ab", []),
    "opening tag in an answer": ("a<think>b", "a<think>b", []),
    "tool that was not offered": (block(call("other", a="1", b="x", c="true", d="[1]", e="trued", f='"s"')), "",
                                  [("other", {"a": 1, "b": "x", "c": True, "d": [1], "e": "trued", "f": "s"})]),
    "a block with no call is text": (block("{}"), "<minimax:tool_call>\n{}</minimax:tool_call>", []),
    "an empty block": ("a" + block(""), "a", []),
    "half of a markup before a tag": ("a<in" + block(call("ping")), "a<in", [("ping", {})]),
    "a tag in a name": (block('<invoke name="<think>"></invoke>'), "", [("<think>", {})]),
    "a name without an end": ("<invoke name=" + "x" * 2000 + ">", "<invoke name=" + "x" * 2000 + ">", []),
    "a name without an end in a block": (block("<invoke name=" + "x" * 2000), block("<invoke name=" + "x" * 2000), []),
    "a parameter's name without an end": (block('<invoke name="ping"><parameter name=' + "x" * 2000 + "</invoke>"), "",
                                          [("ping", {})]),
    "text that spells markup": ("a < b <in <invoke nam", "a < b <in <invoke nam", []),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_answer(tokenizer: Tokenizer, case: str) -> None:
    text, content, calls = ANSWERS[case]
    answer = in_all_splits(tokenizer, "Hm.\n</think>" + text)
    assert answer.reasoning == "Hm."
    assert answer.content == content
    assert [(name, json.loads(arguments)) for name, arguments in calls_of(answer)] == calls
    assert all(made.is_complete for made in answer.tool_calls)
    assert answer.finish_reason is FinishReason.STOP


# (text, reasoning, content, number of thinking tokens given by the text that counts)
THINKING = {
    "closed": ("a\nb \n</think>\n\nc", "a\nb", "\n\nc", "a\nb \n"),
    "not closed": ("a b", "a b", "", "a b"),
    "closed at once": ("</think>c", "", "c", ""),
    "opened again": ("<think>a</think>c", "a", "c", "a"),
    "a call inside": ("Let me.\n" + block(call("ping")), "Let me.", "", "Let me.\n"),
    "spelt call inside": ("<invoke name=x>", "<invoke name=x>", "", "<invoke name=x>"),
    "nothing": ("", "", "", ""),
}


@pytest.mark.parametrize("case", THINKING)
def test_thinking(tokenizer: Tokenizer, case: str) -> None:
    text, reasoning, content, counted = THINKING[case]
    answer = in_all_splits(tokenizer, text)
    assert (answer.reasoning, answer.content) == (reasoning, content)
    assert answer.usage is not None
    assert answer.usage.num_reasoning_tokens == len(tokenizer.encode(counted))
    assert answer.usage.num_completion_tokens == len(tokenizer.encode(text)) + 1
    assert answer.usage.num_prompt_tokens == 7


def test_tags_count_as_tokens_only(tokenizer: Tokenizer) -> None:
    """Ordinary tokens that spell a tag are text, in thinking and in an answer."""
    spelt = tokenizer.encode("</think>", allow_special=False)
    assert tokenizer.end_think_id not in spelt and tokenizer.decode(spelt) == "</think>"
    ids = [*tokenizer.encode("a"), *spelt, tokenizer.end_think_id, *spelt, tokenizer.eos_id]
    answer = fold(feed(parser(tokenizer), cut(ids, [1] * 99)))
    assert (answer.reasoning, answer.content) == ("a</think>", "</think>")


def test_thinking_that_the_prompt_did_not_open(tokenizer: Tokenizer) -> None:
    answer = in_all_splits(tokenizer, "\n<think>a\n</think>b", starts_in_reasoning=False)
    assert (answer.reasoning, answer.content) == ("a", "b")
    assert answer.usage is not None and answer.usage.num_reasoning_tokens == 2
    answer = in_all_splits(tokenizer, "b" + block(call("ping")), starts_in_reasoning=False)
    assert (answer.reasoning, answer.content, calls_of(answer)) == ("", "b", [("ping", "{}")])


@pytest.mark.parametrize(("text", "content"), [
    ("a\n</think>\n\nb", "<think>a\n</think>\n\nb"),
    ("a b", "<think>a b"),
    ("</think>c", "<think></think>c"),
    ("<think>a</think>c", "<think>a</think>c"),
    ("a\n</think>\n\n" + block(call("ping")) + "z", "<think>a\n</think>z"),
    ("a" + block(call("ping")), "<think>a"),
    ("", ""),
])  # fmt: skip
def test_append_think(tokenizer: Tokenizer, text: str, content: str) -> None:
    answer = in_all_splits(tokenizer, text, reasoning_parser="minimax_m2_append_think")
    assert (answer.reasoning, answer.content) == ("", content)
    assert len(answer.tool_calls) == text.count("<invoke")


@pytest.mark.parametrize(("reasoning_parser", "tool_parser", "reasoning", "content"), [
    (None, "minimax_m2", "", "<think>a\n</think>b"),
    ("minimax_m2", None, "a", "b" + block(call("ping"))),
    (None, None, "", "<think>a\n</think>b" + block(call("ping"))),
])  # fmt: skip
def test_parsers_off(tokenizer: Tokenizer, reasoning_parser: Any, tool_parser: Any, reasoning: str,
                     content: str) -> None:  # fmt: skip
    answer = in_all_splits(tokenizer, "<think>a\n</think>b" + block(call("ping")), reasoning_parser=reasoning_parser,
                           tool_parser=tool_parser)  # fmt: skip
    assert (answer.reasoning, answer.content) == (reasoning, content)
    assert len(answer.tool_calls) == (tool_parser is not None)


def test_without_offered_tools(tokenizer: Tokenizer) -> None:
    """Values are text when nothing is known; bare markup is text, a block is a call all the same."""
    text = "</think>" + call("f", a="5") + block(call("weather", city="Seattle", days="5"))
    answer = in_all_splits(tokenizer, text, tools=None)
    assert answer.content == call("f", a="5")
    assert calls_of(answer) == [("weather", '{"city": "Seattle", "days": "5"}')]


def test_muted_calls(tokenizer: Tokenizer) -> None:
    text = "</think>a" + block(call("weather", city="b"), call("ping")) + "c"
    answer = in_all_splits(tokenizer, text, mute_calls=True)
    assert (answer.content, answer.tool_calls) == ("ac", [])


def test_special_tokens_never_show(tokenizer: Tokenizer) -> None:
    answer = in_all_splits(tokenizer, "a]~b]b</think>c]!d~[d[e~[e" + block(call("weather", city="]~b]f")))
    assert (answer.reasoning, answer.content) == ("ab", "cde")
    assert calls_of(answer) == [("weather", '{"city": "f"}')]


CUT = "</think>" + block(call("write", path="/a", mode="6", content="abc"), call("ping"))


def test_a_call_that_was_cut_off_is_never_whole(tokenizer: Tokenizer) -> None:
    """Cut at every token: the same text streamed and folded, and JSON only of calls that ended."""
    ids = tokenizer.encode(CUT)
    seen = set()
    for length in range(len(ids)):
        stream = parser(tokenizer, tools=TOOLS)
        events = feed(stream, cut(ids[:length], [1] * 999), LENGTH)
        answer = fold(events)
        assert answer.finish_reason is LENGTH
        assert answer == fold_without_ids(answer, feed(parser(tokenizer, tools=TOOLS), [ids[:length]], LENGTH))
        assert answer.content == ""
        assert stream.turn() is None
        for made in answer.tool_calls:
            seen.add(made.arguments)
            if not made.is_complete:
                with pytest.raises(ValueError):
                    json.loads(made.arguments)
        ends = [event.index for event in events if isinstance(event, ToolEnd)]
        assert ends == [n for n, made in enumerate(answer.tool_calls) if made.is_complete]
    whole = '{"path": "/a", "mode": 6, "content": "abc"}'
    assert {"", '{"path": "', '{"path": "/a"', '{"path": "/a", "mode": 6', whole, "{}"} <= seen


def fold_without_ids(like: Completion, events: list[Event]) -> Completion:
    """A fold, with the ids of the calls of another one: those are random."""
    names = iter([made.id for made in like.tool_calls])
    return fold([ToolStart(e.index, next(names), e.name) if isinstance(e, ToolStart) else e for e in events])


def test_a_call_whose_markup_was_left_open_at_the_end(tokenizer: Tokenizer) -> None:
    """Between parameters the model's own end completes a call; inside a value nothing does."""
    text = '</think><minimax:tool_call><invoke name="weather"><parameter name="city">A</parameter>'
    [made] = in_all_splits(tokenizer, text).tool_calls
    assert (made.arguments, made.is_complete) == ('{"city": "A"}', True)
    [made] = in_all_splits(tokenizer, text.removesuffix("</parameter>")).tool_calls
    assert (made.arguments, made.is_complete) == ('{"city": "A', False)


def test_strings_stream_and_other_values_wait(tokenizer: Tokenizer) -> None:
    stream = parser(tokenizer, tools=TOOLS)

    def step(text: str) -> list[Event]:
        return stream.feed(TokenDelta(request_id="r", token_ids=tokenizer.encode(text)))

    assert step("x") == [ReasoningDelta("x")]
    assert step("\n") == []
    assert step("</think>Let me. ") == [TextDelta("Let me. ")]
    assert step("<minimax:tool_call>") == step('\n<invoke name="wri') == []
    [start] = step('te">\n')
    assert isinstance(start, ToolStart) and (start.index, start.name) == (0, "write")
    assert step('<parameter name="path">/a') == [ToolArgs(0, '{"path": "/a')]
    assert step("/b.py</para") == [ToolArgs(0, "/b.py")]
    assert step('meter>\n<parameter name="mode">6') == [ToolArgs(0, '"')]
    assert step("44</parameter>\n") == [ToolArgs(0, ', "mode": 644')]
    assert step('<parameter name="content">line1\n"q" <b') == [ToolArgs(0, ', "content": "line1\\n\\"q\\" <b')]
    assert step("r> </p") == [ToolArgs(0, "r> ")]
    assert step("> end") == [ToolArgs(0, "</p> end")]
    assert step("</parameter>\n") == [ToolArgs(0, '"')]
    assert step("</invoke>\n") == [ToolArgs(0, "}"), ToolEnd(0)]


def test_indices_and_ids(tokenizer: Tokenizer) -> None:
    text = "</think>" + block(call("ping"), call("other")) + block(call("ping"))
    events = feed(parser(tokenizer, tools=TOOLS), cut(tokenizer.encode(text), 5))
    starts = [event for event in events if isinstance(event, ToolStart)]
    assert [start.index for start in starts] == [0, 1, 2]
    assert len({start.call_id for start in starts}) == 3 and all(start.call_id for start in starts)


def test_ends(tokenizer: Tokenizer) -> None:
    """Exactly one Done or Failed, the last event; nothing afterwards."""
    ids = tokenizer.encode("ab")
    kinds: list[tuple[FinishReason, type[Done] | type[Failed]]] = [
        (FinishReason.LENGTH, Done), (FinishReason.ABORT, Done), (FinishReason.STOP, Done),
        (FinishReason.ERROR, Failed),
    ]  # fmt: skip
    for reason, last in kinds:
        stream = parser(tokenizer)
        assert [type(event) for event in stream.feed(TokenDelta(request_id="r", token_ids=ids))] == [ReasoningDelta]
        [end] = stream.feed(TokenDelta(request_id="r", finish_reason=reason, error="broke", num_cached_tokens=3))
        assert isinstance(end, (Done, Failed)) and type(end) is last
        assert end.usage.num_completion_tokens == 2 and end.usage.num_cached_tokens == 3
        assert end.message == "broke" if isinstance(end, Failed) else reason is end.finish_reason
        assert stream.feed(TokenDelta(request_id="r", token_ids=ids, finish_reason=reason)) == []


def test_a_stop_token_is_named_and_hidden(tokenizer: Tokenizer) -> None:
    x = tokenizer.encode("x")[0]
    delta = TokenDelta(request_id="r", token_ids=[*tokenizer.encode("ab"), x], finish_reason=FinishReason.STOP,
                       stop_token_id=x)  # fmt: skip
    answer = fold(parser(tokenizer).feed(delta))
    assert (answer.reasoning, answer.stop) == ("ab", x)
    assert answer.usage is not None and answer.usage.num_completion_tokens == 3
    shown = parser(tokenizer, params=SamplingParams(include_stop_str_in_output=True, stop_token_ids=(x,)))
    assert fold(shown.feed(delta)).reasoning == "abx"


def test_a_last_token_that_is_no_end_is_text(tokenizer: Tokenizer) -> None:
    delta = TokenDelta(request_id="r", token_ids=tokenizer.encode("ab"), finish_reason=FinishReason.STOP)
    assert fold(parser(tokenizer).feed(delta)).reasoning == "ab"


def test_broken_utf8_at_the_end_is_not_lost(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert fold(feed(parser(tokenizer), [ids[:1]], LENGTH)).reasoning == "\ufffd"
    answer = fold(feed(parser(tokenizer), [[ids[0], tokenizer.end_think_id, ids[1]]], LENGTH))
    assert (answer.reasoning, answer.content) == ("\ufffd", "\ufffd")


@pytest.mark.parametrize(("method", "rest"), [
    ("add", "/a</parameter>\n</invoke>\n</minimax:tool_call>z"),
    ("begin", '"path">/a</parameter>\n</invoke>\n</minimax:tool_call>z'),
    ("end", "</parameter>\n</invoke>\n</minimax:tool_call>z"),
    ("close", "</invoke>\n</minimax:tool_call>z"),
])  # fmt: skip
def test_a_failing_parser_degrades_to_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, method: str,
                                           rest: str) -> None:  # fmt: skip
    def broken(*_: Any) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr(Arguments, method, broken)
    text = "</think>a" + block(call("write", path="/a")) + "z"
    answer = in_all_splits(tokenizer, text)
    assert answer.content.replace("a", "", 1).lstrip("\n") == rest
    assert answer.finish_reason is FinishReason.STOP and answer.error is None


def test_a_parser_that_fails_at_a_tag_degrades_to_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr(Arguments, "close", broken)
    answer = in_all_splits(tokenizer, '</think>a<minimax:tool_call><invoke name="ping"></inv</minimax:tool_call>z')
    assert answer.content == "a</inv</minimax:tool_call>z"
    assert answer.finish_reason is FinishReason.STOP and answer.error is None

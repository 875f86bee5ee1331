"""Stop strings: on the raw text, wherever deltas are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saddle.parsing.events import Tokens
from saddle.parsing.fold import fold
from saddle.parsing.stops import Segment, StopStrings
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, SamplingParams, TokenDelta, TokenLogprobs
from tests.unit.parsing.parsing_support import LENGTH, block, call, cut, feed, parser, tool

OPTIONS = {"tools": [tool("f", a={"type": "string"})]}


@pytest.mark.parametrize(("text", "stops", "reasoning", "content", "found"), [
    ("one two three", ["two"], "one ", "", "two"),
    ("one two three", ["three", "two"], "one ", "", "two"),
    ("abcabd", ["abd"], "abc", "", "abd"),
    ("a\n\n</think>b", ["\n\n"], "a", "", "\n\n"),
    ("a</think>b END c", [" END"], "a", "b", " END"),
    ("a</think>b", ["</think>"], "a", "", "</think>"),
    ("a</think>b", ["k>b"], "a", "", "k>b"),
    ("a</think>bc", ["a</think>b"], "", "", "a</think>b"),
    ("日本語テスト</think>", ["テ"], "日本語", "", "テ"),
    ("a</think>b EN", ["END"], "a", "b EN", None),
    ("aaab", ["aab"], "a", "", "aab"),
    ("xab", ["abc", "ab"], "x", "", "ab"),
])  # fmt: skip
@pytest.mark.parametrize("split", [None, [1] * 99, 4])
def test_where_it_stops(tokenizer: Tokenizer, text: str, stops: list[str], reasoning: str, content: str,
                        found: str | None, split: int | list[int] | None) -> None:  # fmt: skip
    params = SamplingParams(stop=tuple(stops))
    stream = parser(tokenizer, params=params)
    answer = fold(feed(stream, cut([*tokenizer.encode(text), tokenizer.eos_id], split)))
    assert (answer.reasoning, answer.content, answer.stop) == (reasoning, content, found)
    assert answer.finish_reason is FinishReason.STOP
    assert answer.usage is not None
    if found is None:
        assert stream.stopped_by_text is None
    else:
        # The tokens up to the one that completed the string.
        num = next(n for n in range(99) if found in tokenizer.decode(tokenizer.encode(text)[:n]))
        assert stream.stopped_by_text == (FinishReason.STOP, num)
        assert answer.usage.num_completion_tokens == num == len(stream.generated_ids)
        assert stream.turn() is None


def test_the_string_itself_on_request(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("two",), include_stop_str_in_output=True)
    stream = parser(tokenizer, params=params)
    assert fold(feed(stream, [tokenizer.encode("one two three")], LENGTH)).reasoning == "one two"
    assert stream.generated_text == "one two"


def test_text_that_may_begin_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    stream = parser(tokenizer, params=SamplingParams(stop=("END",)), reasoning_parser=None, tool_parser=None)
    seen = [fold(stream.feed(TokenDelta(request_id="r", token_ids=[i]))).content for i in tokenizer.encode("xENENxE")]
    assert seen == ["x", "", "", "EN", "", "ENx", ""]
    [text, _] = stream.feed(TokenDelta(request_id="r", finish_reason=LENGTH))
    assert fold([text]).content == "E"


def test_after_a_stop_nothing_follows(tokenizer: Tokenizer) -> None:
    stream = parser(tokenizer, params=SamplingParams(stop=("b",)))
    ids = tokenizer.encode("abc")
    events = stream.feed(TokenDelta(request_id="r", token_ids=ids))
    assert fold(events).stop == "b"
    assert stream.feed(TokenDelta(request_id="r", token_ids=ids)) == []
    assert stream.feed(TokenDelta(request_id="r", finish_reason=LENGTH)) == []


def test_min_tokens_come_first(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("b",), min_tokens=2)
    answer = fold(feed(parser(tokenizer, params=params), [tokenizer.encode("abcb")], LENGTH))
    assert (answer.reasoning, answer.stop) == ("abc", "b")


def test_a_stop_inside_a_call_leaves_it_open(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("</think>" + block(call("f", a="x STOP y")))
    answer = fold(feed(parser(tokenizer, params=SamplingParams(stop=(" STOP",)), **OPTIONS), cut(ids, 3)))
    [made] = answer.tool_calls
    assert (made.arguments, made.is_complete, answer.finish_reason) == ('{"a": "x', False, FinishReason.STOP)


def test_tokens_end_where_the_text_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b STOP c")
    logprobs = [TokenLogprobs(i, -1.0, 1, []) for i in ids]
    stream = parser(tokenizer, params=SamplingParams(stop=("STOP",)), want_tokens=True)
    events = stream.feed(TokenDelta(request_id="r", token_ids=ids, logprobs=logprobs))
    assert isinstance(events[0], Tokens)
    assert events[0].token_ids == ids[: tokenizer.decode(ids).index(" c")] == stream.generated_ids
    assert events[0].logprobs == logprobs[: len(events[0].token_ids)]


@given(st.text("ab<", max_size=30), st.lists(st.text("ab<", min_size=1, max_size=5), max_size=3))
def test_found_at_the_first_chance_and_nothing_lost(text: str, stops: list[str]) -> None:
    """Against a plain search: the shortest beginning of the text that holds a stop string, cut where that begins."""
    ends = [n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
    expected = text if not ends else text[: min(text[: ends[0]].find(s) for s in stops if s in text[: ends[0]])]
    scanner = StopStrings(stops, include=False)
    passed, found, at = "", None, 0
    while at < len(text) and found is None:
        # One character a segment, as tokens that complete a string decide where the text ends.
        segments, found = scanner.push(Segment(text[at]))
        passed += "".join(segment.text for segment in segments)
        assert text.startswith(passed)
        at += 1
    if found is None:
        passed += "".join(segment.text for segment in scanner.flush())
    assert passed == expected
    assert (found is not None) == bool(ends)



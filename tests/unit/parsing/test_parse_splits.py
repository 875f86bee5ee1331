"""However a generation is cut into deltas, the answer is the same; and reading it takes linear time."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from saddle.parsing.fold import fold
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, SamplingParams
from tests.unit.parsing.parsing_support import LENGTH, STOP, block, call, calls_of, cut, feed, parser, tool

TOOLS = [
    tool("f", a={"type": "string"}, n={"type": "integer"}, o={"type": ["string", "null"]}),
    tool("g", x={"type": "object"}),
]
PARTS = [
    "<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="f">', "<invoke name='g'>",
    '<invoke name="h">', "<invoke name=", '<parameter name="a">', '<parameter name="n">', '<parameter name="x">',
    '<parameter name="o">', "</parameter>", "</invoke>", "<", ">", '"', "'", "</", "</param", "<invoke", "< parameter ",
    "\n", " ", "x", "5", "null", "true", '{"k": [1, "}"]}', "héé", "日本語", "🎉👩‍👩‍👧", "\\", "]~b]", "[e~[", "the",
]  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=25), st.integers(0, 2**32),
       st.sampled_from(["minimax_m2", "minimax_m2_append_think", None]), st.booleans(),
       st.lists(st.sampled_from(["\n", "x", "</in", "é日", "k>"]), max_size=2),
       st.sampled_from([STOP, LENGTH]))  # fmt: skip
def test_any_output_in_any_split(
    tokenizer: Tokenizer, parts: list[str], seed: int, reasoning_parser: Any, starts_in_reasoning: bool,
    stops: list[str], reason: FinishReason,
) -> None:  # fmt: skip
    ids = tokenizer.encode("".join(parts))
    params = SamplingParams(stop=tuple(stops))

    def answer(split: object) -> tuple[object, ...]:
        stream = parser(tokenizer, tools=TOOLS, params=params, reasoning_parser=reasoning_parser,
                        starts_in_reasoning=starts_in_reasoning)  # fmt: skip
        events = feed(stream, cut(ids, split), reason)  # type: ignore[arg-type]
        whole = fold(events)
        assert whole.finish_reason is not None
        for made in whole.tool_calls:
            if made.is_complete:
                assert isinstance(json.loads(made.arguments), dict)
        return (whole.reasoning, whole.content, calls_of(whole), whole.usage, whole.stop, whole.finish_reason,
                stream.stopped_by_text, stream.generated_text)  # fmt: skip

    whole = answer(None)
    assert answer([1] * len(ids)) == whole
    assert answer(seed) == whole


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40).filter(lambda text: not any(part in text for part in ("</parameter>", "</invoke>"))),
       st.integers(0, 2**32))  # fmt: skip
def test_a_string_arrives_as_it_was_written(tokenizer: Tokenizer, value: str, seed: int) -> None:
    text = "</think>" + block(call("f", a=value))
    answer = fold(feed(parser(tokenizer, tools=TOOLS), cut(tokenizer.encode(text), seed)))
    expected = tokenizer.decode(tokenizer.encode(value))  # in the normal form of the tokenizer
    assert json.loads(answer.tool_calls[0].arguments) == {"a": expected}


def cost(tokenizer: Tokenizer, num_chars: int, split: object) -> float:
    """Seconds to read an argument of that length, the least of two."""
    value = ("line <b> \"q\" 日\\n </p> < parameter\n" * (num_chars // 34 + 1))[:num_chars]
    ids = tokenizer.encode("</think>" + block(call("f", a=value)))
    best = 1e9
    for _ in range(2):
        start = time.perf_counter()
        answer = fold(feed(parser(tokenizer, tools=TOOLS), cut(ids, split)))  # type: ignore[arg-type]
        best = min(best, time.perf_counter() - start)
        assert json.loads(answer.tool_calls[0].arguments)["a"] == value
    return best


def test_long_arguments_take_linear_time(tokenizer: Tokenizer) -> None:
    """Eight times the text takes far less than the 64 times of quadratic work, in one delta and in many."""
    for split in (None, [1] * 300_000):
        assert cost(tokenizer, 200_000, split) < 24 * cost(tokenizer, 25_000, split)


def test_a_delta_costs_its_own_length(tokenizer: Tokenizer) -> None:
    """No step of a long string looks at what came before: the parser holds a few characters only."""
    stream = parser(tokenizer, tools=TOOLS)
    ids = tokenizer.encode("</think>" + '<minimax:tool_call><invoke name="f"><parameter name="a">' + "word <b " * 3000)
    held: Counter[int] = Counter()
    for delta in cut(ids, [1] * len(ids)):
        feed(stream, [delta], None)
        held[len(stream._machine._text)] += 1
    assert max(held) < 64

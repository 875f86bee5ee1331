"""Ten targets that fuzz what reads the model's output and the client's conversation.

Whatever comes in, the readers end in an answer or in `InvalidRequest`: never in another exception, never by losing
text. `fuzz_stream.py` drives the same reader with coverage guidance.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saddle.errors import InvalidRequest
from saddle.parsing.arguments import Arguments
from saddle.parsing.conversation import normalise
from saddle.parsing.fold import fold
from saddle.parsing.render import Renderer
from saddle.parsing.replay import ReplayStore, Turn, meaning_of
from saddle.parsing.stops import Segment, StopStrings
from saddle.parsing.tokenizer import Tokenizer
from saddle.parsing.tools import LITERAL, Tools, convert
from saddle.protocol import FinishReason, SamplingParams, TokenDelta
from tests.unit.parsing.parsing_support import cut, feed, parser

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
WORDS = ("type", "properties", "items", "anyOf", "oneOf", "allOf", "$ref", "#", "#/$defs/a", "$defs", "a", "string",
         "null", "integer", "object", "array", "enum", "const", "additionalProperties", "prefixItems",
         "required")  # fmt: skip
TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
SCHEMA = st.recursive(
    st.sampled_from(WORDS) | st.none() | st.booleans() | st.integers(-2, 2),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=14,
)
TAGS = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="f">', "<invoke name=f>",
        "</invoke>", '<parameter name="a">', "</parameter>", "<invoke", "name=", '"', ">", "<", "/", "\n", " ", "{",
        "}")  # fmt: skip
SOUP = st.lists(st.sampled_from(TAGS) | st.text(max_size=5), max_size=40).map("".join)
FIELDS = ("role", "content", "tool_calls", "function", "name", "arguments", "id", "type", "text", "reasoning_content",
          "reasoning", "reasoning_details", "tool_call_id", "parameters", "description")  # fmt: skip
VALUES = ("user", "assistant", "tool", "system", "developer", "text", "function", "f", "{}", '{"a": 1}', "[1]",
          "<think>x</think>y")  # fmt: skip
MESSAGE = st.recursive(
    st.sampled_from(VALUES) | st.none() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=16,
)
ROLES = st.sampled_from(["user", "assistant", "tool", "system", "developer"])
NEARLY = st.fixed_dictionaries(
    {"role": ROLES, "content": st.none() | st.text(max_size=6) | MESSAGE},
    optional={"tool_calls": MESSAGE | st.lists(st.fixed_dictionaries(
        {"id": st.text(max_size=3), "function": st.fixed_dictionaries(
            {"name": st.text(max_size=3), "arguments": JSON | JSON.map(json.dumps)})}), max_size=2),
        "reasoning_content": MESSAGE, "tool_call_id": st.text(max_size=3)},
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_degradation(caplog: pytest.LogCaptureFixture) -> Any:
    """A parser that fell back to plain text had a fault."""
    caplog.set_level(logging.ERROR)
    yield
    assert not caplog.records, caplog.text


@FUZZ
@given(st.data())
def test_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    seed = data.draw(st.integers(0, 2**32))
    reason = data.draw(st.sampled_from(list(FinishReason)))
    whole, parts = (fold(feed(parser(tokenizer, tools=[]), cut(ids, how), reason)) for how in (None, seed))
    assert (whole.reasoning, whole.content, whole.usage) == (parts.reasoning, parts.content, parts.usage)
    assert whole.finish_reason is not None and whole.usage is not None
    assert whole.usage.num_completion_tokens == len(ids)


@FUZZ
@given(SOUP, st.booleans(), st.sampled_from(["minimax_m2", "minimax_m2_append_think"]))
def test_soup_of_tags(tokenizer: Tokenizer, text: str, thinks: bool, reasoning_parser: Any) -> None:
    stream = parser(tokenizer, tools=None, starts_in_reasoning=thinks, reasoning_parser=reasoning_parser)
    answer = fold(feed(stream, cut(tokenizer.encode(text), 1)))
    assert answer.finish_reason is FinishReason.STOP
    for made in answer.tool_calls:
        complete = True
        try:
            complete = isinstance(json.loads(made.arguments), dict)
        except ValueError:
            complete = False
        assert complete == made.is_complete


@FUZZ
@given(st.text(max_size=80))
def test_plain_text_is_lost_nowhere(tokenizer: Tokenizer, text: str) -> None:
    stream = parser(tokenizer, reasoning_parser=None, tool_parser=None, starts_in_reasoning=False,
                    params=SamplingParams(skip_special_tokens=False))  # fmt: skip
    ids = tokenizer.encode(text, allow_special=False)
    assert fold(feed(stream, cut(ids, 2))).content == tokenizer.decode(ids, skip_special_tokens=False)


@FUZZ
@given(st.lists(st.text(max_size=6), max_size=20), st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4),
       st.booleans())  # fmt: skip
def test_stop_strings(parts: list[str], stops: list[str], include: bool) -> None:
    search, passed, found = StopStrings(stops, include), "", None
    for part in parts:
        out, found = search.push(Segment(part))
        passed += "".join(segment.text for segment in out)
        if found is not None:
            break
    else:
        passed += "".join(segment.text for segment in search.flush())
    text = "".join(parts)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert (found is not None) == bool(ends)
    assert text.startswith(passed)
    assert found is not None or passed == text


@FUZZ
@given(st.lists(st.tuples(st.text(max_size=5), st.lists(st.text(max_size=6), max_size=5)), max_size=5))
def test_arguments_are_json_whatever_the_values(values: list[tuple[str, list[str]]]) -> None:
    arguments, text = Arguments(), ""
    for name, parts in values:
        text += arguments.begin(name, LITERAL)
        text += "".join(arguments.add(part) for part in parts) + arguments.end()
    with pytest.raises(ValueError):
        json.loads(text or "{")
    found = json.loads(text + arguments.close())
    assert set(found) == {name for name, _ in values}


@FUZZ
@given(st.text(max_size=30), st.lists(st.sampled_from(TYPES)))
def test_a_value_of_any_type_is_json(text: str, types: list[str]) -> None:
    value = convert(text, types)
    json.dumps(value, allow_nan=False)
    assert "string" not in types or len(types) > 1 or value == text


@FUZZ
@given(SCHEMA, st.text(max_size=20))
def test_any_schema_of_a_tool(schema: Any, text: str) -> None:
    tools = Tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    assert "f" in tools and "g" not in tools
    json.dumps(tools.parameter("f", "a").value(text), allow_nan=False)


@FUZZ
@given(st.lists(NEARLY | MESSAGE, max_size=5), st.none() | st.lists(MESSAGE | SCHEMA, max_size=2))
def test_any_conversation(renderer: Renderer, messages: list[Any], tools: list[Any] | None) -> None:
    try:
        found = normalise(messages, tools)
        rendered = renderer.render(found)
    except InvalidRequest as error:
        assert str(error)
        return
    assert rendered.token_ids == [token for piece in rendered.pieces for token in renderer._pieces.encode(piece)]


@FUZZ
@given(st.text(max_size=30), st.text(max_size=30), st.lists(st.tuples(st.text(max_size=5), JSON), max_size=3),
       st.integers(0, 4000))  # fmt: skip
def test_replay_finds_only_what_means_the_same(
    reasoning: str, content: str, calls: list[tuple[str, Any]], num_bytes: int
) -> None:
    store = ReplayStore(num_bytes)
    made = tuple((f"call-{n}", name, json.dumps({"v": value})) for n, (name, value) in enumerate(calls))
    store.remember(Turn(reasoning, content, made, [1, 2, 3]))
    assert store.num_bytes <= num_bytes
    found = store.find(reasoning, content, [(None, name, {"v": value}) for name, value in calls])
    assert found is None or found.token_ids == [1, 2, 3]
    assert meaning_of(reasoning, content, ()) != meaning_of(reasoning + "x", content, ())


@FUZZ
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_as_tokens(tokenizer: Tokenizer, raw: bytes, skip: bool) -> None:
    ids = [byte % tokenizer.vocab_size for byte in raw]
    steps = tokenizer.detokenizer(skip)
    text = "".join(steps.step(token_id) for token_id in ids) + steps.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    stream = parser(tokenizer)
    events = [event for token_id in ids for event in stream.feed(TokenDelta(request_id="r", token_ids=[token_id]))]
    assert fold(events).finish_reason is None


@pytest.fixture(scope="session")
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer, tokenizer.chat_template, tokenizer.model_identity, ReplayStore(1 << 16), 1 << 16)

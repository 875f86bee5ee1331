"""Structured output, required calls and thinking budgets through `saddle serve` with the demo checkpoint and the SDK.

The demo model knows nothing of schemas and is sampled hot: what validates does so because of the masks.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.serve.conftest import served
from tests.serve.processes import ServerProcess
from tests.unit.grammar.grammar_support import Case, bfcl_cases

HI: list[Any] = [{"role": "user", "content": "Tell me something."}]
MODEL = "saddle-demo"
BLOCK = 16  # tokens, on a CPU
EVERY = int(os.environ.get("BFCL_EVERY", "80"))  # one published case of so many
# Schemas whose outputs are short whatever is drawn.
REPORT = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "sunny": {"type": "boolean"},
        "days": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 2},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{1,8}$"}]},
    },
    "required": ["city", "sunny", "days", "note"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "report", "strict": True, "schema": REPORT}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "strict": True, "parameters": {
        "type": "object", "properties": {"level": {"enum": [1, 2, 3]}, "kind": {"enum": ["a", "b"]}},
        "required": ["level"]}}}
    for name in ("raise", "lower")
]  # fmt: skip


WEATHER: Any = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather for a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with served("--max-model-len", "2048", "--disable-uvicorn-access-log") as server:
        yield server


def chat(client: openai.OpenAI, seed: int = 0, budget: int | None = 6, **fields: Any) -> Any:
    """A hot request; its thinking is kept short because a small model may think for ever."""
    extra = {"thinking_token_budget": budget, "top_k": 0, **fields.pop("extra_body", {})}
    fields = {"temperature": 1.5, "top_p": 1, "max_tokens": 400, "messages": HI, **fields}
    return client.chat.completions.create(model=MODEL, seed=seed, extra_body=extra, **fields)


def contents(reply: Any) -> list[str]:
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}, reply
    return [choice.message.content for choice in reply.choices]


def token(server: ServerProcess, text: str) -> str:
    """The id of a text that is one token, as `logit_bias` wants it."""
    [token_id] = server.post("/tokenize", {"prompt": text})[1]["tokens"]
    return str(token_id)


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    texts = contents(chat(client, response_format=FORMAT, n=6))
    for text in texts:
        jsonschema.validate(json.loads(text), REPORT)
    assert len(set(texts)) > 1, "constrained and still drawn"


class Place(pydantic.BaseModel):
    kind: Literal["town", "city"]
    sunny: bool


class Trip(pydantic.BaseModel):
    places: Annotated[list[Place], pydantic.Field(min_length=1, max_length=2)]
    rating: Literal[1, 2, 3] | None


def test_the_parse_helper_of_the_sdk(client: openai.OpenAI) -> None:
    """A model class with parts: `$defs`, references and null, as the SDK writes them."""
    reply = client.chat.completions.parse(
        model=MODEL, messages=HI, response_format=Trip, temperature=1.5, max_tokens=300, seed=1,
        extra_body={"thinking_token_budget": 6, "top_k": 0},
    )  # fmt: skip
    trip = reply.choices[0].message.parsed
    assert isinstance(trip, Trip)
    assert 1 <= len(trip.places) <= 2


def test_streamed_and_whole_answers_agree(client: openai.OpenAI) -> None:
    whole = chat(client, 3, response_format=FORMAT, n=2)
    texts = {0: "", 1: ""}
    for chunk in chat(client, 3, response_format=FORMAT, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [choice.message.content for choice in whole.choices] == [texts[0], texts[1]]
    for text in texts.values():
        jsonschema.validate(json.loads(text), REPORT)


def test_a_json_object_begins_as_one_and_is_one_if_it_ends(client: openai.OpenAI) -> None:
    reply = chat(client, response_format={"type": "json_object"}, temperature=0, max_tokens=60)
    text = reply.choices[0].message.content
    assert text.startswith("{")
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": r"\d{3}-[a-f]{2,4}"}, r"\d{3}-[a-f]{2,4}"),
        ({"choice": ["positive", "négatif"]}, "positive|négatif"),
        ({"grammar": 'root ::= "(" [0-9] ("+" [0-9])? ")"'}, r"\(\d(\+\d)?\)"),
        ({"json": {"enum": [{"a": 1}, "x"]}}, r'\{ ?"a" ?: ?1 ?\}|"x"'),
        ({"structural_tag": json.dumps({"format": {"type": "tag", "begin": "<n>", "end": "</n>", "content": {
            "type": "json_schema", "json_schema": {"enum": [7, 8]}}}})}, "<n>[78]</n>"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_structured_outputs_in_chat_and_completions(client: openai.OpenAI, asked: dict[str, Any], pattern: str) -> None:
    for text in contents(chat(client, n=3, extra_body={"structured_outputs": asked})):
        assert re.fullmatch(pattern, text), text
    reply = client.completions.create(model=MODEL, prompt=["It is", "So"], max_tokens=60, temperature=1.5,
                                      extra_body={"structured_outputs": asked})  # fmt: skip
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.text), choice.text


# calls -----------------------------------------------------------------------------------------------------------


def arguments_of(call: Any) -> dict[str, Any]:
    schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call.function.name)
    arguments: dict[str, Any] = json.loads(call.function.arguments)
    jsonschema.validate(arguments, {**schema, "additionalProperties": False})
    return arguments


def test_required_calls_are_real_and_validate(client: openai.OpenAI) -> None:
    seen = set()
    for choice in chat(client, n=8, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices:
        [call] = choice.message.tool_calls
        arguments_of(call)
        seen.add(call.function.name)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
    assert seen == {"raise", "lower"}


def test_required_calls_in_a_stream(client: openai.OpenAI) -> None:
    names, arguments = [], ""
    for chunk in chat(client, 1, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            for call in choice.delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments
    assert len(names) == 1
    assert json.loads(arguments)["level"] in (1, 2, 3)


def test_a_named_tool_is_called_once(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "lower"}}
    for choice in chat(client, n=3, tools=TOOLS, tool_choice=named).choices:
        [call] = choice.message.tool_calls
        assert call.function.name == "lower"
        arguments_of(call)
        assert choice.finish_reason == "stop"


def test_no_call_where_none_is_wanted(client: openai.OpenAI) -> None:
    """A model that wants to call gives an answer instead."""
    asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_tokens": 400,
                             "messages": [{"role": "user", "content": "What is the weather in Paris?"}]}  # fmt: skip
    free = client.chat.completions.create(**asked).choices[0]
    assert free.finish_reason == "tool_calls", "so that this shows something"
    choice = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert choice.message.content and choice.message.content.strip()


def test_calls_beside_an_answer_format(client: openai.OpenAI, server: ServerProcess) -> None:
    """Either a report or calls, never anything else; pushed to the one and to the other."""
    calls_id = token(server, "<minimax:tool_call>")
    for bias, calls in ((-100, False), (60, True)):
        reply = chat(client, n=2, tools=TOOLS, response_format=FORMAT, parallel_tool_calls=False,
                     logit_bias={calls_id: bias})  # fmt: skip
        for choice in reply.choices:
            if calls:
                arguments_of(choice.message.tool_calls[0])
                assert choice.message.content is None
            else:
                assert choice.message.tool_calls is None
                jsonschema.validate(json.loads(choice.message.content), REPORT)


def test_strict_tools_hold_in_free_text(client: openai.OpenAI, server: ServerProcess) -> None:
    """Pushed into a call by its token, the model can only make a right one."""
    bias = {token(server, "<minimax:tool_call>"): 60}
    for choice in chat(client, n=3, tools=TOOLS, parallel_tool_calls=False, logit_bias=bias).choices:
        [call] = choice.message.tool_calls
        arguments_of(call)


@pytest.mark.parametrize("budget", [6, 0])
def test_a_constrained_turn_comes_back_as_its_own_tokens(client: openai.OpenAI, budget: int) -> None:
    """So the next turn of an agent finds all of it in the cache, also behind a thought that was cut off."""
    messages = [{"role": "user", "content": f"Please set the level, {budget}. " * 3}]
    calls: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "budget": budget}
    first = chat(client, 2, messages=messages, **calls)
    message = first.choices[0].message
    [call] = message.tool_calls
    again = [*messages, message.model_dump(exclude_none=True),
             {"role": "tool", "tool_call_id": call.id, "content": "done"}]  # fmt: skip
    second = chat(client, 2, messages=again, tools=TOOLS, tool_choice="none", max_tokens=1)
    computed = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == computed // BLOCK * BLOCK


def test_published_tools_are_called_right(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    """Tools of the Berkeley Function Calling Leaderboard: every call under `required` that ends validates."""
    cases = list(bfcl_cases())[::EVERY]

    def call(case: Case) -> Any:
        question = [{"role": "user", "content": "Use a tool."}]
        return chat(client, messages=question, tools=case.tools, tool_choice="required", temperature=0.7,
                    max_tokens=120, parallel_tool_calls=False).choices[0]  # fmt: skip

    with ThreadPoolExecutor(16) as pool:
        choices = list(pool.map(call, cases))
    num_ended = 0
    for case, choice in zip(cases, choices, strict=True):
        if choice.finish_reason == "length":
            continue
        num_ended += 1
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
        [made] = choice.message.tool_calls
        jsonschema.validate(json.loads(made.function.arguments), schemas[made.function.name])
    with capsys.disabled():
        print(f"\nBFCL, calls of the demo model under required: {num_ended} of {len(cases)} ended, all valid")
    assert num_ended >= len(cases) // 3


# thinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_ends_the_thinking(client: openai.OpenAI, server: ServerProcess, budget: int) -> None:
    bias = {token(server, "</think>"): -100}  # it would not end by itself
    for fields in ({"max_tokens": budget + 3}, {"response_format": FORMAT}):
        reply = chat(client, budget=budget, logit_bias=bias, **fields)
        assert reply.usage.completion_tokens_details.reasoning_tokens == budget
        assert bool((reply.choices[0].message.model_extra or {}).get("reasoning")) is (budget > 0)
    jsonschema.validate(json.loads(reply.choices[0].message.content), REPORT)


def test_effort_none_does_not_think(client: openai.OpenAI) -> None:
    reply = chat(client, budget=None, reasoning_effort="none", max_tokens=10)
    assert not (reply.choices[0].message.model_extra or {}).get("reasoning")
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_an_unfinished_thought_gives_no_answer(client: openai.OpenAI, server: ServerProcess) -> None:
    bias = {token(server, "</think>"): -100}
    reply = chat(client, budget=50, max_tokens=8, response_format=FORMAT, logit_bias=bias)
    assert reply.usage.completion_tokens_details.reasoning_tokens == 8
    assert reply.choices[0].finish_reason == "length"
    assert not reply.choices[0].message.content


# refusals and neighbours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
         "response_format.json_schema.schema.not"),
        ({"extra_body": {"structured_outputs": {"regex": "(unclosed"}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {"grammar": "root ::= nowhere"}}}, "structured_outputs.grammar"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "no_such_type"}}}, "response_format"),
        ({"extra_body": {"guided_json": REPORT}}, "guided_json"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused(
    client: openai.OpenAI, server: ServerProcess, fields: Any, param: str
) -> None:
    before = server.metrics()["engine_steps_total"]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            chat(client, stream=stream, **fields)
        assert raised.value.param == param
        body: Any = raised.value.body
        assert body["message"].startswith(param), "in Anthropic's errors there is no other place for it"
    assert server.metrics()["engine_steps_total"] == before, "refused before a token was made"


def slow_schema(number: int) -> dict[str, Any]:
    """A second or more to compile, on an idle core."""
    part = {"type": "string", "maxLength": 10_000}
    return {"type": "object", "properties": {f"p{number}x{place}": part for place in range(600)}}


def test_compiling_does_not_hold_up_the_others(client: openai.OpenAI) -> None:
    plain: dict[str, Any] = {"temperature": 0, "max_tokens": 350, "extra_body": {"ignore_eos": True}, "budget": None}
    alone = chat(client, **plain)
    gaps, text, answers = [], "", []

    def compile_one(number: int) -> tuple[float, Any]:
        began = time.monotonic()
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": slow_schema(number)}}
        reply = chat(client, response_format=form, max_tokens=10)
        return time.monotonic() - began, reply

    with ThreadPoolExecutor(2) as pool:
        stream = chat(client, **plain, stream=True)
        waiting = [pool.submit(compile_one, number) for number in range(2)]
        last = time.monotonic()
        for chunk in stream:
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            for choice in chunk.choices:
                text += (choice.delta.model_extra or {}).get("reasoning") or choice.delta.content or ""
        answers = [answer.result() for answer in waiting]
    message = alone.choices[0].message
    assert text == ((message.model_extra or {}).get("reasoning") or "") + (message.content or "")
    for _, reply in answers:
        assert reply.choices[0].message.content.startswith("{")
    soonest = min(seconds for seconds, _ in answers)
    assert max(gaps) < soonest / 3, f"the stream went on while grammars were compiled in {soonest:.1f} s"

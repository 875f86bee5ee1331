"""Tool calls under `required`, over the single-turn schemas of the Berkeley Function Calling Leaderboard."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from typing import Any

import jsonschema
import pytest

from saddle.errors import InvalidRequest
from saddle.grammar.backend import XGrammarBackend
from saddle.grammar.spec import tool_grammar
from saddle.parsing.fold import Completion, fold
from saddle.parsing.stream import StreamParser
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, SamplingParams, TokenDelta
from tests.unit.grammar.grammar_support import Case, Sampler, as_xml, bfcl_cases, compiled, feed

NUM_SPLITS = 5
EVERY = int(os.environ.get("BFCL_EVERY", "4"))  # random calls for each so many cases; 1 for all


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(bfcl_cases())


def read(
    tokenizer: Tokenizer, ids: list[int], tools: list[dict[str, Any]], split: random.Random | None = None
) -> Completion:
    """The answer that ids fold to, fed whole or in random deltas."""
    stream = StreamParser(tokenizer, tools=tools, params=SamplingParams(), num_prompt_tokens=1)
    events, at = [], 0
    while at < len(ids):
        stop = at + split.randint(1, 9) if split else len(ids)
        reason = FinishReason.STOP if stop >= len(ids) else None
        events += stream.feed(TokenDelta(request_id="r", token_ids=ids[at:stop], finish_reason=reason))
        at = stop
    return fold(events)


def calls_of(answer: Completion) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


def as_read(calls: list[tuple[str, dict[str, Any]]], schemas: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """An argument of any type is read as text: nothing tells 5 from "5" there."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return [
        (name, {key: value if "type" in schemas[name]["properties"][key] else text(value)
                for key, value in arguments.items()})
        for name, arguments in calls
    ]  # fmt: skip


def is_valid(schema: Any, value: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_right_calls_pass_and_parse_back(
    cases: list[Case], tokenizer: Tokenizer, backend: XGrammarBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    splits = [random.Random(seed) for seed in range(NUM_SPLITS)]
    for case in cases:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
        # Some answers of the leaderboard do not fit their own schema, or name arguments that it does not list.
        if not all(is_valid({**schemas[name], "additionalProperties": False}, arguments)
                   for name, arguments in case.calls):  # fmt: skip
            counts["answer against its schema"] += 1
            continue
        try:
            spec = tool_grammar(case.tools, "required", tokenizer, tokenizer.end_think_id)
        except InvalidRequest as error:
            counts["refused"] += 1
            wrong.append((case.name, str(error)))
            continue
        ids = [*tokenizer.encode("thought" + as_xml(case.calls)), tokenizer.eos_id]
        place = feed(backend, compiled(backend, spec), ids)
        counts["accepted" if place is None else "masked"] += 1
        answers = [calls_of(read(tokenizer, ids, case.tools, split)) for split in (None, *splits)]
        if place is not None or any(calls != as_read(case.calls, schemas) for calls in answers):
            wrong.append((case.name, f"{tokenizer.decode(ids[: place or 0], False)!r} read as {answers}"))
    with capsys.disabled():
        print(f"\nBFCL, right calls under required: {dict(counts)}")
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong)
    assert counts["accepted"] > 1000


def test_random_calls_validate(
    cases: list[Case], tokenizer: Tokenizer, backend: XGrammarBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Sampler(backend, tokenizer)
    num_calls = num_endless = 0
    for case in cases[::EVERY]:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
        ids = sampler.draw(tool_grammar(case.tools, "required", tokenizer))
        if ids is None:
            num_endless += 1
            continue
        answer = read(tokenizer, [tokenizer.end_think_id, *ids, tokenizer.eos_id], case.tools)
        assert answer.tool_calls and not answer.content.strip(), case.name
        for call in answer.tool_calls:
            num_calls += 1
            assert call.is_complete and call.name in schemas, case.name
            arguments = json.loads(call.arguments)
            assert is_valid(schemas[call.name], arguments), (case.name, tokenizer.decode(ids, False))
    with capsys.disabled():
        print(f"\nBFCL, random calls under required: {num_calls} valid, {num_endless} outputs without end")
    assert num_calls > len(cases) / EVERY / 2

"""The JSON-Schema-Test-Suite, draft 2020-12: each schema is enforced or refused, never half-way."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jsonschema
import pytest

from saddle.errors import InvalidRequest
from saddle.grammar import spec as build
from saddle.grammar.backend import XGrammarBackend
from saddle.parsing.tokenizer import Tokenizer
from tests.unit.grammar.grammar_support import SUITE, SUITE_HINT, Sampler

NUM_OUTPUTS = 8


def suite() -> list[tuple[str, Any]]:
    if not SUITE.is_dir():
        pytest.skip(SUITE_HINT)
    return [
        (f"{path.name}: {case['description']}", case["schema"])
        for path in sorted(SUITE.glob("*.json"))
        for case in json.loads(path.read_text())
    ]


def test_every_schema_is_enforced_or_refused(
    tokenizer: Tokenizer, backend: XGrammarBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Sampler(backend, tokenizer)
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for name, schema in suite():
        try:
            spec = build.json_schema(schema, param="schema")
            outputs = [sampler.draw(spec, 300) for _ in range(NUM_OUTPUTS)]
        except InvalidRequest as error:
            assert error.status == 400 and error.param is not None and error.param.startswith("schema"), name
            counts["refused"] += 1
            refused[name.split(".")[0]] += 1
            continue
        counts["enforced"] += 1
        for ids in outputs:
            if ids is None:
                counts["outputs without end"] += 1
                continue
            counts["outputs that validate"] += 1
            text = tokenizer.decode(ids, False)
            assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), (name, text)
    with capsys.disabled():
        print(f"\nJSON-Schema-Test-Suite: {dict(counts)}; refused by file: {dict(refused.most_common())}")
    assert counts["enforced"] > 150 and counts["outputs that validate"] > 5 * counts["enforced"]

"""From the fields of a request to a grammar, and what is refused at once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from saddle.errors import InvalidRequest
from saddle.grammar import spec as build
from saddle.grammar.backend import XGrammarBackend
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec
from tests.unit.grammar.grammar_support import matches

TAG = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
       "end": "</a>"}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "text", "fits"),
    [
        (build.json_object(), '{"a": [1, "b"]}', True),
        (build.json_object(), "[1]", False),
        (build.regex(r"\d{3}-[a-f]+"), "123-abc", True),
        (build.regex(r"\d{3}-[a-f]+"), "a123-abc", False),
        (build.choice(["yes", "no", "да"]), "да", True),
        (build.choice(["yes", "no"]), "yesno", False),
        (build.grammar('root ::= "a" root "b" | "."'), "aa.bb", True),
        (build.grammar('root ::= "a" root "b" | "."'), "aa.b", False),
        (build.structural_tag({"format": TAG}), "<a>12</a>", True),
        (build.structural_tag({"format": TAG}), "<a>x</a>", False),
        (build.structural_tag({"type": "structural_tag", "triggers": ["<a"], "structures": [
            {"begin": "<a>", "schema": {"type": "null"}, "end": "</a>"}]}), "text <a>null</a> text", True),
        (build.structural_tag({"type": "structural_tag", "triggers": ["<a"], "structures": [
            {"begin": "<a>", "schema": {"type": "null"}, "end": "</a>"}]}), "text <a>1</a> text", False),
    ],
)  # fmt: skip
def test_kinds(tokenizer: Tokenizer, backend: XGrammarBackend, spec: GrammarSpec, text: str, fits: bool) -> None:
    assert matches(backend, tokenizer, spec, text) is fits


def test_content_begins_behind_the_empty_line(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    for spec in (
        build.json_object(tokenizer.end_think_id),
        build.structural_tag({"format": {"type": "regex", "pattern": "\\{\\}"}}, tokenizer.end_think_id),
    ):
        assert matches(backend, tokenizer, spec, "a thought</think>\n\n{}")
        assert not matches(backend, tokenizer, spec, "a thought</think>{}")
        assert not matches(backend, tokenizer, spec, "a thought</think>\n\n\n{}")


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: build.regex(""), "structured_outputs.regex"),
        (lambda: build.regex(5), "structured_outputs.regex"),
        (lambda: build.regex("a{0,100000}"), "structured_outputs.regex"),
        (lambda: build.regex("a{99999999999999999999}"), "structured_outputs.regex"),
        (lambda: build.regex("\ud800"), "structured_outputs.regex"),
        (lambda: build.regex("a" * (600 << 10)), "structured_outputs.regex"),
        (lambda: build.choice([]), "structured_outputs.choice"),
        (lambda: build.choice(["a", ""]), "structured_outputs.choice"),
        (lambda: build.choice(["a"] * 10_001), "structured_outputs.choice"),
        (lambda: build.grammar('start ::= "a"'), "structured_outputs.grammar"),
        (lambda: build.structural_tag([]), "response_format"),
        (lambda: build.structural_tag({}), "response_format.format"),
        (lambda: build.structural_tag({"structures": [{}], "triggers": ["a"]}), "response_format.structures.0"),
        (lambda: build.structural_tag({"structures": [], "triggers": "a"}), "response_format.triggers"),
        (lambda: build.structural_tag({"format": {**TAG, "content": {"type": "json_schema", "json_schema": 1}}}),
         "response_format.format.content.json_schema"),
        (lambda: build.structural_tag({"format": {"type": "json_schema", "style": "qwen_xml", "json_schema": {}}}),
         "response_format.format.style"),
        (lambda: build.to_compile(GrammarSpec(kind="magic", source="")), "grammar"),
        (lambda: build.to_compile(GrammarSpec(kind="json_schema", source="{")), "grammar"),
    ],
)  # fmt: skip
def test_refused_at_once(make: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        make()
    assert raised.value.param == param


def function(name: Any, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([], "required", "tool_choice"),
        ([function("a")], "b", "tool_choice"),
        ([function("a"), function('b"')], "required", "tools.1.function.name"),
        ([function("a", {"type": "object", "properties": {"x": {"not": {}}}})], "required",
         "tools.0.function.parameters.properties.x.not"),
    ],
)  # fmt: skip
def test_tools_that_are_refused(tokenizer: Tokenizer, tools: list[Any], choice: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        build.tool_grammar(tools, "required" if choice == "required" else "named", tokenizer, name=choice)
    assert raised.value.param == param


def test_tools_not_called_for_need_no_enforceable_schema(tokenizer: Tokenizer) -> None:
    free = function("free", {"type": "object", "properties": {"x": {"not": {}}}})
    named = json.loads(build.tool_grammar([free, function("ok")], "named", tokenizer, name="ok").source)
    assert "free" not in json.dumps(named)
    build.tool_grammar([free, function("ok", strict=True)], "auto", tokenizer)


def test_no_torch_and_no_compiler_are_needed_to_build() -> None:
    code = "import sys, saddle.grammar.spec; print([m for m in ('torch', 'xgrammar') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"

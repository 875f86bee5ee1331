"""What a schema becomes, and which are refused with the path of the keyword at fault."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from saddle.errors import InvalidRequest
from saddle.grammar import spec as build
from saddle.grammar.backend import XGrammarBackend
from saddle.grammar.merge import narrow_pattern
from saddle.grammar.schema import normalise
from saddle.parsing.tokenizer import Tokenizer
from tests.unit.grammar.grammar_support import matches

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]}
TREE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "name": {"type": "string"}}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (POINT, '{"x": 1, "y": -2}', True),
        (POINT, '{"y": 1, "x": -2}', False),  # in the order of the schema
        (POINT, '{"y": 1}', False),
        (POINT, '{"x": 1, "z": 1}', False),  # a listed object is closed
        (POINT, '{\n  "x": 1,\n  "y": 2\n}', True),
        (POINT, '{' + " " * 17 + '"x": 1}', False),
        ({**POINT, "additionalProperties": True}, '{"x": 1, "z": "é"}', True),
        ({**POINT, "additionalProperties": {"type": "null"}}, '{"x": 1, "z": null}', True),
        ({**POINT, "additionalProperties": {"type": "null"}}, '{"x": 1, "z": 1}', False),
        ({**POINT, "additionalProperties": False}, '{"x": 1}', True),
        ({"type": "object"}, '{"any": ["thing", {}]}', True),
        ({"properties": {"a": {}}, "required": ["a"]}, '{"a": [1]}', True),  # the type that properties are about
        ({"properties": {"a": {}}, "required": ["a"]}, '"text"', False),
        ({"type": "object", "properties": {"b": {}, "a": {}}, "required": ["a", "b"]}, '{"b": 1, "a": 2}', True),
        ({"type": "object", "properties": {"ключ": {"const": "значение"}}}, '{"ключ": "значение"}', True),
        ({"type": "string"}, '"日本語 \\n \\" \\u00e9"', True),
        ({"type": "string"}, '"raw\nline"', False),
        ({"type": ["string", "null"]}, "null", True),
        ({"type": "string", "nullable": True}, "null", True),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", True),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, '"x"', False),
        ({"enum": ["a", 1, None]}, "null", True),
        ({"enum": ["a", 1]}, '"b"', False),
        ({"enum": ["a", 1], "type": "integer"}, '"a"', False),
        ({"const": 5}, "5", True),
        ({"type": "string", "minLength": 2, "maxLength": 3}, '"日本"', True),
        ({"type": "string", "minLength": 2, "maxLength": 3}, '"a"', False),
        ({"type": "string", "minLength": 2, "maxLength": 3}, '"<b>"', True),
        ({"type": "string", "minLength": 2, "maxLength": 3}, '"\x01\x02"', False),  # no JSON
        ({"type": "string", "pattern": "^[a-z]+\\d$"}, '"ab1"', True),
        ({"type": "string", "pattern": "^[^a]$"}, '"""', False),
        ({"type": "string", "format": "date"}, '"2024-02-29"', True),
        ({"type": "string", "format": "date"}, '"today"', False),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12}, "11", True),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12}, "12", False),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, "[1, 2]", True),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, "[1, 2, 3]", False),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False}, "[1, null]", True),
        ({"type": "array", "items": [{"type": "integer"}, {"type": "null"}]}, "[1, 1]", False),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "2", False),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "3", True),
        ({**POINT, "anyOf": [{"required": ["y"]}, {"maxProperties": 1}]}, '{"x": 1, "y": 1}', True),
        ({**POINT, "allOf": [{"required": ["y"]}]}, '{"x": 1}', False),
        ({"oneOf": [CAT, DOG]}, '{"kind": "dog", "name": "b"}', True),
        ({"oneOf": [CAT, DOG]}, '{"kind": "dog", "lives": 1}', False),
        (TREE, '{"kids": [{"kids": []}, {}]}', True),
        (TREE, '{"kids": [1]}', False),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}}, "null", True),
        ({"$ref": "#/$defs/p", "required": ["y"], "$defs": {"p": POINT}}, '{"x": 1}', False),
        (True, "[1, {}]", True),
    ],
)
def test_enforced(tokenizer: Tokenizer, backend: XGrammarBackend, schema: Any, text: str, fits: bool) -> None:
    assert matches(backend, tokenizer, build.json_schema(schema), text) is fits


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ([], ""),
        ({"type": "text"}, "type"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "properties.a.not"),
        ({"type": "array", "items": {"if": {}}}, "items.if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
        ({"type": "integer", "multipleOf": 3, "minimum": 5}, "multipleOf"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "string", "maxLength": 10_001}, "maxLength"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": 'say "x"'}, "pattern"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern"),
        ({"enum": []}, "enum"),
        ({"enum": list(range(10_001))}, "enum"),
        ({"enum": ["a"], "type": "integer"}, "enum"),
        ({"enum": ["a"], "minLength": 3}, "minLength"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ""),
        ({"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b"}]}, "pattern"),
        ({"allOf": [POINT, {"additionalProperties": False}]}, "additionalProperties"),
        ({"$ref": "http://example.com/schema"}, "$ref"),
        ({"$ref": "#/$defs/none"}, "$ref"),
        ({"$ref": "#"}, "$ref"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "$ref"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "required"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required"),
        (False, ""),
        (deep(60), "properties.a"),
        ({"type": "object", "properties": {f"p{number}": {} for number in range(5000)}}, "properties.p"),
        ({"allOf": [{"anyOf": [{"minimum": n} for n in range(9)]}, {"anyOf": [{"maximum": n} for n in range(9)]}]}, ""),
        ({"anyOf": [{"type": "string", "format": []}]}, "anyOf.0.format"),
        ({"type": ["string", []]}, "type"),
    ],
)
def test_refused_with_the_path(schema: Any, path: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        build.json_schema(schema, param="schema")
    assert raised.value.status == 400
    param = raised.value.param or ""
    assert param == "schema" if not path else path in param.removeprefix("schema."), param
    assert param in raised.value.message


@pytest.mark.parametrize("key", ["items", "anyOf"])
def test_deep_nesting_is_refused_without_recursion(key: str) -> None:
    nested: Any = True
    for _ in range(90_000):
        nested = {key: [nested] if key == "anyOf" else nested}
    with pytest.raises(InvalidRequest, match="nested deeper"):
        build.json_schema(nested)
    while isinstance(nested, dict):  # taken apart level by level: freeing it as a whole would recurse
        (inner,) = nested.values()
        nested = inner[0] if isinstance(inner, list) else inner


def test_annotations_and_unknown_words_say_nothing() -> None:
    loud = {"type": "integer", "title": "t", "description": "d", "default": 3, "examples": [1], "x-mine": {"not": 1},
            "$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": "c"}  # fmt: skip
    assert normalise(loud, "schema") == {"type": "integer"}


def test_properties_keep_their_order() -> None:
    names = ["zeta", "alpha", "mid"]
    schema = {"type": "object", "properties": {name: {} for name in names}, "required": ["mid"]}
    assert list(json.loads(build.json_schema(schema).source)["properties"]) == names


def test_words_of_tools() -> None:
    parameters = {"type": "dict", "properties": {"a": {"type": "float"}, "b": {"type": "any"}, "c": {"type": "tuple"}}}
    built = normalise(parameters, "tool", for_tools=True)
    assert {name: part.get("type") for name, part in built["properties"].items()} == {
        "a": "number", "b": None, "c": "array"}  # fmt: skip
    with pytest.raises(InvalidRequest, match="must be one of"):
        normalise({"type": "float"}, "schema")


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "array"}, "type"),
        ({"anyOf": [POINT, CAT]}, "anyOf"),
        ({"type": "object", "properties": {'a"b': {}}}, 'a"b'),
        ({"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ({"type": "object", "properties": {"a": {"enum": ["</x>"]}}}, "enum"),
    ],
)
def test_arguments_of_tools_are_listed(schema: Any, path: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        normalise(schema, "tools.0", for_tools=True)
    assert path in (raised.value.param or "")


def test_values_that_would_read_back_as_others_are_left_out() -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": ["1", 1, "b"]}}}
    assert normalise(parameters, "tool", for_tools=True)["properties"]["a"] == {"enum": [1, "b"]}


@pytest.mark.parametrize(
    ("pattern", "narrow"),
    [(".", r"[^<\n\r]"), ("[^a]", "[^<a]"), (r"\S\W", r"[^\s<][^\w<]"), (r"\.", r"\."), ("[.]", "[.]"),
     (r"[\]^.]", r"[\]^.]"), ("<b>", "<b>")],
)  # fmt: skip
def test_patterns_of_arguments_match_no_tag_by_chance(pattern: str, narrow: str) -> None:
    assert narrow_pattern(pattern) == narrow


def doubling(levels: int) -> dict[str, Any]:
    """References that lead to their end in 2 ** levels ways."""
    defs: dict[str, Any] = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$defs": {**defs, f"d{levels}": {"type": "null"}}}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: build.json_schema({**doubling(30), "$ref": "#/$defs/d0"}), "too complex"),
        (lambda: build.json_schema({"oneOf": [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]}
                                              for n in range(1000)]}), "too complex"),
        (lambda: build.json_schema({"allOf": [{"enum": list(range(9000))}] * 400}), "too complex"),
        (lambda: build.json_schema({"type": "object", "properties": dict.fromkeys(map(str, range(500_000)), False)}),
         "too complex"),
        (lambda: build.json_schema({"$ref": "#/$defs/d0", "$defs": {
            f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(3000)} | {"d3000": {}}}), "too deeply"),
        (lambda: build.regex("{" + " " * 300_000 + "{" + "1" * 6 + "}"), "repeats something"),
        (lambda: build.grammar("\n" * 300_000), "must have a rule root"),
    ],
)  # fmt: skip
def test_what_would_take_long_is_refused_soon(make: Any, why: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidRequest, match=why):
        make()
    assert time.perf_counter() - began < 3, "measured: at most 0.4 s on an idle core"


def test_all_tools_share_one_budget(tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/d0"}}, **doubling(12)}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": schema}} for n in range(50)]
    build.tool_grammar(tools[:1], "required", tokenizer)
    with pytest.raises(InvalidRequest, match="too complex") as raised:
        build.tool_grammar(tools, "required", tokenizer)
    assert (raised.value.param or "").startswith("tools.1.function.parameters")


def test_an_open_class_is_read_in_one_pass() -> None:
    began = time.perf_counter()
    build.json_schema({"type": "string", "pattern": "[" * 300_000})
    assert time.perf_counter() - began < 3


def test_one_of_many_is_told_apart_by_a_member() -> None:
    branches = [{"type": "object", "properties": {"k": {"enum": [n, str(n)]}}, "required": ["k"]} for n in range(120)]
    assert len(normalise({"oneOf": branches}, "x")["anyOf"]) == 120
    with pytest.raises(InvalidRequest, match="more than one branch"):
        normalise({"oneOf": [*branches, branches[7]]}, "x")


@pytest.mark.parametrize(
    ("branches", "apart"),
    [
        ([{"enum": ["a", 1]}, {"enum": ["b", 2.5]}], True),
        ([{"enum": ["a", 1]}, {"enum": ["b", 1.0]}], False),
        ([CAT, DOG], True),
        ([CAT, POINT], False),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": "integer"}, {"type": "string"}], True),
        ([{**CAT, "required": []}, DOG], False),
    ],
)
def test_branches_that_are_apart(branches: list[Any], apart: bool) -> None:
    if apart:
        assert len(normalise({"oneOf": branches}, "x")["anyOf"]) == len(branches)
        return
    with pytest.raises(InvalidRequest, match="more than one branch"):
        normalise({"oneOf": branches}, "x")


@pytest.mark.parametrize(("pattern", "fine"), [('[^"]*', True), ('a"b', False), ('[a]"', False), (r'\[["]\]', True)])
def test_quotes_stand_in_classes_alone(pattern: str, fine: bool) -> None:
    if fine:
        assert normalise({"type": "string", "pattern": pattern}, "x")["pattern"] == pattern
        return
    with pytest.raises(InvalidRequest, match="cannot spell out quotes"):
        normalise({"type": "string", "pattern": pattern}, "x")

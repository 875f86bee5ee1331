"""Values of tool arguments by JSON schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from saddle.parsing.arguments import Arguments
from saddle.parsing.tools import LITERAL, TEXT, Parameter, Tools
from tests.unit.parsing.parsing_support import tool


def value(text: str, schema: Any, root: Any = None) -> Any:
    return Parameter(schema, schema if root is None else root).value(text)


def same(left: Any, right: Any) -> bool:
    """Equal, and the same types: 1, 1.0 and True are equal in Python."""
    return json.dumps(left) == json.dumps(right)


@pytest.mark.parametrize(("text", "types", "expected"), [
    ("5", "number", 5), ("5.0", "number", 5), ("5.5", "number", 5.5), ("1e3", "number", 1000),
    ("1e999", "number", "1e999"), ("NaN", "number", "NaN"), ("-Infinity", "number", "-Infinity"),
    ("1e300", "number", 1e300),
    (" 7 ", "integer", 7), ("1_000", "integer", 1000), ("0x10", "integer", "0x10"), ("5.0", "integer", 5.0),
    ("true", "integer", True), ("9" * 5000, "integer", "9" * 5000),
    ("TRUE ", "boolean", True), ("1", "boolean", True), ("0", "boolean", False), ("yes", "boolean", "yes"),
    ("1", ["boolean", "integer"], 1),
    ("null", ["string", "null"], None), ("None", ["string", "null"], "None"), (" null ", "string", " null "),
    ("NULL", ["object", "null"], None), ("null", "string", "null"), ("nil", ["string", "null"], "nil"),
    ("[1,2", "array", "[1,2"), ("[1,2]", "object", [1, 2]), ('{"a": NaN}', "object", '{"a": NaN}'),
    ("12", ["string", "integer"], 12), ("12", ["object", "string"], "12"), ("x", ["string", "integer"], "x"),
    ("5", "int", 5), ("5", "uint64", 5), ("1.5", "double", 1.5), ("true", "bool", True), ('{"a":1}', "dict", {"a": 1}),
    ("[1]", "list", [1]), ("5", "varchar", "5"), ("5", "madeup", 5), ("[" * 100_000, "array", "[" * 100_000),
])  # fmt: skip
def test_types(text: str, types: Any, expected: Any) -> None:
    assert same(value(text, {"type": types}), expected)


@pytest.mark.parametrize(("text", "schema", "expected"), [
    ("5", {}, "5"), ("5", True, "5"), ("5", {"description": "x"}, "5"),
    ("5", {"enum": [1, 5]}, 5), ("5", {"enum": ["1", "5"]}, "5"), ("true", {"enum": [True, "x"]}, True),
    ("5", {"const": 5}, 5), ("null", {"enum": ["a", None]}, None), ("1.5", {"enum": [0.5]}, 1.5),
    ("Alice", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "Alice"),
    ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
    ("3", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, 3),
    ("3", {"allOf": [{"anyOf": [{"type": "integer"}]}]}, 3),
    ('{"n": "5", "s": "5", "l": ["1", "x"]}',
     {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"},
                                       "l": {"type": "array", "items": {"type": "number"}}}},
     {"n": 5, "s": "5", "l": [1, "x"]}),
    ('{"a": "1", "b": "2"}', {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "type": "object",
                              "allOf": [{"properties": {"a": {"type": "integer"}, "c": {}}}]}, {"a": "1", "b": 2}),
    ('["12"]', {"type": "array", "items": {"type": ["integer", "string"]}}, ["12"]),
    ('{"a": {"b": "1"}}', {"type": "object", "properties": {"a": {"properties": {"b": {"type": "integer"}}}}},
     {"a": {"b": 1}}),
])  # fmt: skip
def test_schemas(text: str, schema: Any, expected: Any) -> None:
    assert same(value(text, schema), expected)


ROOT = {
    "$defs": {
        "Count": {"type": "integer"},
        "Point": {"type": "object", "properties": {"x": {"$ref": "#/$defs/Count"}, "next": {"$ref": "#/$defs/Point"}}},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Other"}]},
        "Other": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "boolean"}]},
        "a/b~c": {"type": "null"},
    }
}


@pytest.mark.parametrize(("text", "ref", "expected"), [
    ("5", "#/$defs/Count", 5), ('{"x": "1", "next": {"x": "2"}}', "#/$defs/Point", {"x": 1, "next": {"x": 2}}),
    ("true", "#/$defs/Loop", True), ("null", "#/$defs/a~1b~0c", None), ("5", "#/$defs/Missing", "5"),
    ("5", "https://example.org/schema", "5"),
])  # fmt: skip
def test_references(text: str, ref: str, expected: Any) -> None:
    assert same(value(text, {"$ref": ref}, ROOT), expected)


def test_a_schema_that_branches_into_itself_is_read_in_linear_time() -> None:
    part: dict[str, Any] = {"type": "integer"}
    for _ in range(64):
        part = {"anyOf": [part, part]}
    assert value("5", part) == 5


def test_only_strings_can_stream() -> None:
    assert Parameter({"type": "string"}, {}).is_text and TEXT.is_text
    assert Parameter({"enum": ["a", "b"]}, {}).is_text
    for schema in ({"type": ["string", "null"]}, {"type": "integer"}, {"enum": ["a", 1]}):
        assert not Parameter(schema, {}).is_text
    assert not LITERAL.is_text


def test_which_schema_a_parameter_has() -> None:
    tools = Tools([
        tool("f", n={"type": "integer"}),
        {"name": "flat", "parameters": {"properties": {"n": {"type": "number"}}}},
        {"type": "function", "function": {"name": "bare"}},
    ])  # fmt: skip
    assert tools.parameter("f", "n").value("5") == 5
    assert tools.parameter("f", "other").value("5") == "5"
    assert tools.parameter("flat", "n").value("5.5") == 5.5
    assert tools.parameter("bare", "n").value("5") == "5"
    assert tools.parameter("unlisted", "n").value("5") == 5
    assert Tools([]).parameter("f", "n").value("5") == 5
    assert Tools(None).parameter("f", "n").value("5") == "5"
    assert "f" in tools and "unlisted" not in tools


@pytest.mark.parametrize(("parts", "fragments"), [
    (["x", "y"], ['{"a": "x', "y", '"']),
    (["t", "r", "y"], ["", "", '{"a": "try', '"']),
    (["t", "rue"], ["", "", '{"a": true']),
    (["1", "2"], ["", "", '{"a": 12']),
    (["1", "x"], ["", "", '{"a": "1x"']),
    ([" ", "é\n"], ["", '{"a": " é\\n', '"']),
])  # fmt: skip
def test_a_literal_streams_as_soon_as_it_cannot_be_json(parts: list[str], fragments: list[str]) -> None:
    made = Arguments()
    assert made.begin("a", LITERAL) == ""
    assert [*(made.add(part) for part in parts), made.end()] == fragments
    assert json.loads("".join(fragments) + made.close())

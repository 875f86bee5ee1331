"""The keywords of JSON Schema: which constrain what, the form of their values, and the limits of size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from saddle.grammar.merge import Unsupported

MAX_DEPTH = 48  # of nested schemas: time to compile grows with its square
MAX_NODES = 4000
MAX_ENUM = 10_000
MAX_BOUND = 10_000  # of repetitions: maxLength, minItems, ...
MAX_ALTERNATIVES = 64
MAX_STEPS = 50_000  # of the work on all schemas of a request: a few tenths of a second

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "propertyNames",
               "minProperties", "maxProperties", "unevaluatedProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
APPLICATORS = ("$ref", "anyOf", "oneOf", "allOf")
# What says nothing about the value, and what is found through references alone.
SILENT = frozenset(("title", "description", "default", "examples", "example", "$schema", "$comment", "deprecated",
                    "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "$defs",
                    "definitions", "nullable", "then", "else", "minContains", "maxContains", "strict"))  # fmt: skip
REFUSED = frozenset(("not", "if", "contains", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef",
                     "$recursiveRef", "$vocabulary", "additionalItems"))  # fmt: skip
# Of the others the compiler knows too little, and a format is an annotation.
FORMATS = frozenset(("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"))
COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems", "enum", "required"))
NUMBERS = frozenset(OF_TYPE["number"])
OBJECTS = frozenset(("properties", "patternProperties"))


class Budget:
    """The work that may go into the schemas of one request: small ones can lead to each other in very many ways."""

    __slots__ = ("_left",)

    def __init__(self, num_steps: int = MAX_STEPS) -> None:
        self._left = num_steps

    def spend(self, num_steps: int, path: tuple[str, ...]) -> None:
        """Raise Unsupported once all is spent."""
        self._left -= num_steps
        if self._left < 0:
            raise Unsupported("the schemas of this request are too complex: use fewer branches and references", path)


def values_of(said: Mapping[str, Any]) -> list[Any] | None:
    """What `enum` and `const` leave, None without either."""
    values = said.get("enum")
    if "const" not in said:
        return None if values is None else list(values)
    wanted = said["const"]
    key = key_of(wanted)
    return [wanted] if values is None or any(key_of(value) == key for value in values) else []


def key_of(value: Any) -> str:
    """Equal for values that JSON Schema calls equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return {int: "integer", str: "string", list: "array"}.get(type(value), "object")


def check_form(key: str, value: Any, path: tuple[str, ...]) -> None:
    """Raise Unsupported unless the value of a keyword has the form that the standard gives it."""

    def require(holds: bool, right: str) -> None:
        if not holds:
            raise Unsupported(f"must be {right}", path)

    def is_number(item: Any) -> bool:
        return isinstance(item, (int, float)) and not isinstance(item, bool)

    if key in COUNTS:
        require(is_number(value) and value >= 0 and float(value).is_integer(), "a whole number, 0 or more")
        require(value <= MAX_BOUND, f"at most {MAX_BOUND}")
    elif key in NUMBERS:
        require(is_number(value), "a number")
        require(key != "multipleOf" or value > 0, "above 0")
    elif key in OBJECTS:
        require(isinstance(value, dict), "an object of schemas")
    elif key in LISTS:
        require(isinstance(value, list) and (bool(value) or key in ("required", "prefixItems")), "a list, not empty")
        require(key != "enum" or len(value) <= MAX_ENUM, f"a list of at most {MAX_ENUM} values")
        require(key != "required" or all(isinstance(name, str) for name in value), "a list of names")
    elif key == "pattern":
        require(isinstance(value, str), "a regular expression")
    elif key == "format":
        require(isinstance(value, str), "the name of a format")
    elif key == "type":
        named = [value] if isinstance(value, str) else value
        require(isinstance(named, list) and bool(named) and all(isinstance(kind, str) for kind in named),
                "the name of a type, or a list of names")  # fmt: skip


def nesting(value: Any, limit: int) -> bool:
    """Whether a JSON value is nested at most `limit` levels deep; never recurses."""
    level: Iterable[Any] = [value]
    for _ in range(limit + 1):
        level = [inner for item in level if isinstance(item, (dict, list))
                 for inner in (item.values() if isinstance(item, dict) else item)]  # fmt: skip
        if not level:
            return True
    return False

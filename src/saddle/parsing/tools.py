"""Tool arguments: from the text that the model writes to values of the types that the schema names.

M2 writes every value as bare text between tags, so only the tool's JSON schema tells whether `5` is a number. The
rules are those that M2's clients know from vLLM: of the types that a schema allows the first that fits is taken, in
the order of `ORDER`; what fits none stays text. `$ref` is followed inside the schema.

A tool that was not offered has no schema; its values are read as JSON literals where they are any.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

ORDER = ("null", "integer", "number", "boolean", "object", "array", "string")
STRING = frozenset({"string"})
ALIASES = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "uint", "uint32", "uint64", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("float", "float32", "float64", "double"), "number"),
    "bool": "boolean",
    "dict": "object",
    **dict.fromkeys(("arr", "list", "sequence"), "array"),
}
MAX_DEPTH = 64  # of nested values
# Up to here every integral float is an exact integer; beyond, one would write digits that were never given.
MAX_EXACT = 2.0**53

Schema = Any


class Parameter:
    """How the values of one parameter are read."""

    __slots__ = ("_root", "_schema", "_types")

    def __init__(self, schema: Schema, root: Schema) -> None:
        self._schema, self._root = schema, root
        self._types = types_of(schema, root)

    @property
    def is_text(self) -> bool:
        """Whether a value can be nothing but a string, so that it may be sent before it is complete."""
        return self._types == STRING

    def value(self, text: str) -> Any:
        """The value that a text stands for."""
        return _nested(convert(text, self._types), self._schema, self._root, 0)


class Literal(Parameter):
    """A value without any schema: a JSON literal if it is one, else a string."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__({}, {})

    @property
    def is_text(self) -> bool:
        return False

    def value(self, text: str) -> Any:
        return _literal(text)


class Tools:
    """The parameters of the tools that a request offers.

    Args:
        tools: OpenAI's, with or without `function` around; None when nothing is known about tools: then every value
            is text.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._known = tools is not None
        self._schemas: dict[str, Schema] = {}
        for tool in tools or ():
            function = tool.get("function", tool)
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                self._schemas[function["name"]] = function.get("parameters")
        self._parameters: dict[tuple[str, str], Parameter] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._schemas

    def parameter(self, tool: str, name: str) -> Parameter:
        """How to read a parameter; one that the schema does not list is text."""
        if tool not in self._schemas:
            return LITERAL if self._known else TEXT
        key = (tool, name)
        found = self._parameters.get(key)
        if found is None:
            root = self._schemas[tool]
            schema = _properties(root, root).get(name)
            found = self._parameters[key] = TEXT if schema is None else Parameter(schema, root)
        return found


def types_of(schema: Schema, root: Schema) -> frozenset[str]:
    """The JSON types that a schema allows by `type`, `enum`, `const` or alternatives; {string} if it is silent."""
    found: set[str] = set()
    for part in _parts(schema, root):
        named = part.get("type")
        for kind in [named] if isinstance(named, str) else named if isinstance(named, list) else []:
            if isinstance(kind, str):
                found.add(ALIASES.get(kind.lower(), kind.lower()))
        members = part.get("enum")
        for member in members if isinstance(members, list) else []:
            found.add(_type_of(member))
        if "const" in part:
            found.add(_type_of(part["const"]))
    return frozenset(found) or STRING


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):  # before int, which it is too
        return "boolean"
    for kind, name in ((int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def _parts(schema: Schema, root: Schema) -> Iterator[Mapping[str, Any]]:
    """A schema and all that its alternatives and references lead to, each once: schemas may refer to themselves."""
    seen: set[int] = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        for key in ("anyOf", "oneOf", "allOf"):
            more = part.get(key)
            waiting += more if isinstance(more, list) else []
        waiting.append(_resolve(part.get("$ref"), root))


def _resolve(ref: Any, root: Schema) -> Schema:
    """The schema at a local JSON pointer such as `#/$defs/Point`, None where there is none."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    found = root
    for step in ref[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or step not in found:
            return None
        found = found[step]
    return found


def _properties(schema: Schema, root: Schema) -> dict[str, Schema]:
    """Schemas of an object's members, by name; the schema's own come before those of its alternatives."""
    found: dict[str, Schema] = {}
    for part in _parts(schema, root):
        own = part.get("properties")
        found = {**own, **found} if isinstance(own, Mapping) else found
    return found


def _items(schema: Schema, root: Schema) -> Schema:
    """The schema of an array's members, None where there is none."""
    return next((part["items"] for part in _parts(schema, root) if "items" in part), None)


# ---------------------------------------------------------------------------------------------------------------
# text to value


def convert(text: str, types: Iterable[str]) -> Any:
    """The text as the first type in `ORDER` that is allowed and fits; else as JSON; else as it is."""
    for kind in ORDER:
        if kind in types:
            try:
                return READERS[kind](text)
            except (ValueError, OverflowError, RecursionError):
                continue
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return _json(text)
    except (ValueError, OverflowError, RecursionError):
        return text


def _json(text: str) -> Any:
    """JSON with finite numbers only: an infinity could not be written again."""
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _null(text: str) -> None:
    if text.lower() != "null":
        raise ValueError(f"{text!r} is not null")


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        number = _finite(text)
        return int(number) if number.is_integer() and abs(number) <= MAX_EXACT else number


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "1", "false", "0"):
        raise ValueError(f"{text!r} is no boolean")
    return word in ("true", "1")


def _container(text: str) -> Any:
    value = _json(text)
    if not isinstance(value, (dict, list)):
        raise ValueError(f"{text!r} is neither object nor array")
    return value


READERS: dict[str, Callable[[str], Any]] = {
    "null": _null,
    "integer": int,
    "number": _number,
    "boolean": _boolean,
    "object": _container,
    "array": _container,
    "string": str,
}


def _nested(value: Any, schema: Schema, root: Schema, depth: int) -> Any:
    """Strings inside objects and arrays that the schema wants as something else, converted."""
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, dict):
        properties = _properties(schema, root)
        return {key: _inner(item, properties.get(key), root, depth) for key, item in value.items()}
    if isinstance(value, list):
        items = _items(schema, root)
        return [_inner(item, items, root, depth) for item in value]
    return value


def _inner(value: Any, schema: Schema, root: Schema, depth: int) -> Any:
    if isinstance(value, str) and schema is not None:
        types = types_of(schema, root)
        value = value if "string" in types else convert(value, types)
    return _nested(value, schema, root, depth + 1)


TEXT, LITERAL = Parameter({}, {}), Literal()

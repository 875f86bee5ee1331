"""What two JSON schemas say together, and patterns that cannot match a tag."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

GREATEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
LEAST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
# Also quote and backslash by their codes.
CONTROL = r"[\x00-\x1f]|\\[nrtfv0c]|\\(?:x|u00)(?:[01].|22|5[cC])"


class Unsupported(Exception):
    """A schema cannot be enforced. `path` leads from the schema to the keyword at fault."""

    def __init__(self, message: str, path: tuple[str, ...]) -> None:
        super().__init__(message)
        self.path = path


def merge(one: dict[str, Any], other: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """The keywords of both, so that exactly what matches both matches; None if nothing can.

    Neither holds `$ref`, `anyOf`, `oneOf` or `allOf`.

    Raises:
        Unsupported: one schema cannot say what both do.
    """
    if not one or not other:
        return one or other
    _check_closed(one, other, path)
    _check_closed(other, one, path)
    both = dict(one)
    for key, value in other.items():
        if key not in both or both[key] == value:
            both[key] = value
            continue
        mine = both[key]
        if key == "type":
            kinds = _common_types(mine, value)
            if not kinds:
                return None
            both[key] = kinds
        elif key == "enum":
            wanted = {json.dumps(item, sort_keys=True) for item in value}
            both[key] = [item for item in mine if json.dumps(item, sort_keys=True) in wanted]
            if not both[key]:
                return None
        elif key == "const":
            return None
        elif key in GREATEST or key in LEAST:
            both[key] = max(mine, value) if key in GREATEST else min(mine, value)
        elif key == "required":
            both[key] = list(dict.fromkeys((*mine, *value)))
        elif key == "properties":
            both[key] = {**mine, **{name: _both(mine[name], part) if name in mine else part
                                    for name, part in value.items()}}  # fmt: skip
        elif key in ("items", "additionalProperties"):
            both[key] = _both(mine, value)
        elif key == "format":
            continue  # an annotation
        else:
            raise Unsupported("two values of this keyword cannot be combined", (*path, key))
    return both


def _both(one: Any, other: Any) -> Any:
    if one is False or other is False:
        return False
    return {"allOf": [one, other]}


def _check_closed(one: dict[str, Any], other: dict[str, Any], path: tuple[str, ...]) -> None:
    """A schema that speaks of properties which it does not list must not meet another that lists some of them."""
    for key, lists in (("additionalProperties", "properties"), ("patternProperties", "properties"),
                       ("propertyNames", "properties"), ("unevaluatedProperties", "properties"),
                       ("items", "prefixItems"), ("unevaluatedItems", "prefixItems"),
                       ("unevaluatedItems", "items")):  # fmt: skip
        own, theirs = one.get(lists), other.get(lists)
        if one.get(key, True) is True or theirs is None:
            continue
        if isinstance(theirs, dict) and isinstance(own, dict) and set(theirs) <= set(own) and lists == "properties":
            continue
        raise Unsupported(f"cannot be combined with {lists} of another part of the schema", (*path, key))


def _common_types(one: str | list[str], other: str | list[str]) -> list[str]:
    mine, theirs = ([kinds] if isinstance(kinds, str) else kinds for kinds in (one, other))
    common = [kind for kind in mine if kind in theirs]
    if ("integer" in mine and "number" in theirs) or ("integer" in theirs and "number" in mine):
        common += ["integer"] if "integer" not in common and "number" not in common else []
    return common


def check_pattern(pattern: str, path: tuple[str, ...]) -> None:
    """Raise Unsupported for what the compiler would match wrongly: it ignores assertions, and writes characters as
    they stand, so that a quote, a backslash or a control character that a pattern spells out would break the JSON."""
    for assertion in ("(?=", "(?!", "(?<"):
        if assertion in pattern:
            raise Unsupported(f"{assertion}...) cannot be enforced while sampling", path)
    # The compiler itself keeps such characters out of classes.
    outside = _outside_classes(pattern)
    if '"' in outside or "\\\\" in outside or re.search(CONTROL, outside):
        raise Unsupported("a pattern cannot spell out quotes, backslashes or control characters", path)


def _parts(pattern: str) -> Iterator[tuple[str, bool]]:
    """(character or escape, whether it stands in a class); the bracket that begins a class does not, its end does.

    In one pass: patterns come from anybody.
    """
    index, in_class = 0, False
    while index < len(pattern):
        part = pattern[index : index + 2] if pattern[index] == "\\" else pattern[index]
        index += len(part)
        yield part, in_class
        in_class = part != "]" if in_class else part == "["


def _outside_classes(pattern: str) -> str:
    """A pattern without its character classes and escaped brackets."""
    return "".join(part for part, in_class in _parts(pattern) if not in_class and part not in ("[", "\\[", "\\]"))


def narrow_pattern(pattern: str) -> str:
    """The pattern without "<" wherever it would match nearly anything.

    Values of tool arguments stand between tags and nothing in them is escaped, so one that may hold a tag could end
    itself early. A "<" that the pattern spells out stays.
    """
    wide = {".": "[^<\\n\\r]", "\\S": "[^\\s<]", "\\D": "[^\\d<]", "\\W": "[^\\w<]"}
    parts: list[str] = []
    begins = False  # whether the part before began a class
    for part, in_class in _parts(pattern):
        if in_class:
            parts.append("^<" if begins and part == "^" else part)
        else:
            parts.append(wide.get(part, part))
        begins = part == "[" and not in_class
    return "".join(parts)

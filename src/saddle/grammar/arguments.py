"""The arguments of a tool call as a format: the text between `<invoke name="...">` and `</invoke>`.

Written as M2's template renders calls, to the newline: what is generated then looks like what the model was trained
on, and reads back without doubt. Values that are text stand bare, all others as JSON:

    <parameter name="path">/tmp/a.txt</parameter>
    <parameter name="lines">[1, 2]</parameter>

The compiler's own format of that name allows white space around values, which would become part of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Values stand unescaped between tags; with a tag inside, a value would end early. Only the beginnings: time to compile
# grows with their length wherever JSON is nested in an argument.
TAGS = ("</param", "</invoke", "<param")
# A number that any reader can hold: without a limit, 1e999 would be read as text.
NUMBER = r"-?(0|[1-9]\d{0,39})(\.\d{1,40})?([eE][+\-]?\d{1,2})?"


def arguments(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The format of a call's arguments, in the order of the schema.

    Args:
        schema: as `schema.normalise` returns it for tools.
    """
    defs = schema.get("$defs", {})
    required = set(schema.get("required", ()))
    elements: list[dict[str, Any]] = []
    for name, part in schema.get("properties", {}).items():
        tag = {"type": "tag", "begin": f'<parameter name="{name}">', "content": _value(part, defs),
               "end": "</parameter>\n"}  # fmt: skip
        elements.append(tag if name in required else {"type": "optional", "content": tag})
    return {"type": "sequence", "elements": elements} if elements else const("")


def const(text: str) -> dict[str, Any]:
    """The format of one text."""
    return {"type": "const_string", "value": text}


def text_without(excludes: tuple[str, ...]) -> dict[str, Any]:
    """The format of any text that holds none of some strings."""
    return {"type": "any_text", "excludes": list(excludes)}


def _value(part: Mapping[str, Any], defs: Mapping[str, Any]) -> dict[str, Any]:
    while "$ref" in part:
        part = defs[part["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in part:
        return {"type": "or", "elements": [_value(branch, defs) for branch in part["anyOf"]]}
    if "enum" in part:
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in part["enum"]]
        return {"type": "or", "elements": [const(text) for text in dict.fromkeys(texts)]}
    if "pattern" in part:
        return {"type": "regex", "pattern": part["pattern"]}
    if not part or part["type"] == "string":
        return text_without(TAGS)
    if part == {"type": "number"}:
        return {"type": "regex", "pattern": NUMBER}
    value: dict[str, Any] = {"type": "json_schema", "json_schema": {**part, "$defs": defs} if defs else part,
                             "max_whitespace_cnt": 1}  # fmt: skip
    return {**value, "excludes": list(TAGS)} if part["type"] in ("object", "array") else value

"""JSON schemas of answers, for the OpenAPI document: their building blocks, and how a route declares them.

Tests hold real answers against the document, so objects are closed: a field that is not named here fails them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": COUNT}
ANY_OBJECT: Schema = {"type": "object"}


def object_of(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object of these members and no others."""
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})},
            "additionalProperties": False}  # fmt: skip


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def answers(schema: Schema, description: str = "A JSON object.") -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers 200 with such a body."""
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}

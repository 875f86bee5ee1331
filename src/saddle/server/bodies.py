"""Reading request bodies, and telling OpenAPI about them.

Bodies are parsed here and not by FastAPI: pydantic reads the bytes once, and whatever is wrong with them is a 400
with the dotted path of the field.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from saddle.errors import InvalidRequest
from saddle.server.replies import validation_message

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, model: type[Body]) -> Body:
    """The body of a request.

    Raises:
        InvalidRequest: it is no JSON, or not what `model` wants; names the field.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type and content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequest(f"Content-Type must be application/json, got {content_type[:100]!r}.")
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        message, param = validation_message(error.errors(include_url=False))
        raise InvalidRequest(message, param=param) from None


ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "dotted path of the field at fault"},
                "code": {"type": "integer", "description": "the HTTP status"},
            },
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    for status, what in (
        (400, "A field is wrong or asks for what this version does not do."),
        (401, "No valid API key."),
        (404, "No such model."),
        (413, "The body is too large."),
        (429, "The queue is full: try again after Retry-After seconds."),
        (500, "The request failed."),
        (503, "Loading, draining, or the engine is gone."),
        (504, "The request took longer than --request-timeout."),
    )
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A JSON object; with `stream: true` server-sent events that end in `[DONE]`.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    **ERRORS,
}


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route: it takes this body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(model)}}}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model without references: the few nested models are written out."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).removeprefix("#/$defs/")
            return inline(parts[name]) if name in parts else {key: inline(value) for key, value in node.items()}
        return [inline(item) for item in node] if isinstance(node, list) else node

    return dict(inline(schema))

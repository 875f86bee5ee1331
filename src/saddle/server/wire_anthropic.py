"""The bodies of Anthropic's Messages API as they arrive, and the shapes of its answers for the OpenAPI document.

Types are strict and unknown fields are ignored, as in `wire_openai.py`. The fields typed `Any` are checked by hand in
`anthropic.py` and `anthropic_messages.py`, whose messages read better than those of a union.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from saddle.server.schemas import ANY_OBJECT, TEXT, answers, list_of, object_of, one_of, or_null
from saddle.server.schemas import COUNT as TOKENS
from saddle.server.wire_openai import MAX_MESSAGES, MAX_REQUEST_ID, Object, Tools, Wire

SystemText = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]})]


class PromptBody(Wire):
    """What both routes share: everything that makes the prompt. None means: the server's default."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: SystemText | None = None
    tools: Tools | None = None
    tool_choice: Object | None = None
    thinking: Object | None = None
    output_config: Object | None = None
    output_format: Object | None = None  # the name of output_config.format while it was in beta
    context_management: Object | None = None
    thread: Object | None = None
    # Said about a request: they change nothing of its answer.
    cache_control: Object | None = None
    metadata: Object | None = None
    service_tier: str | None = None


class MessagesBody(PromptBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=0)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # Not of Anthropic.
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    priority: int | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_REQUEST_ID)] | None = None
    # Known and not supported: refused with any value that asks for something.
    mcp_servers: list[Any] | None = None
    container: Any = None


class CountBody(PromptBody):
    """POST /v1/messages/count_tokens."""


ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "details": {"type": "object", "properties": {"error_code": {"type": "string"}}},
            },
        },
        "request_id": {"type": ["string", "null"]},
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    for status, what in (
        (400, "invalid_request_error: a field is wrong or asks for what this version does not do."),
        (401, "authentication_error: no valid API key."),
        (404, "not_found_error: no such model, or a thread to go on with: none is kept."),
        (413, "request_too_large: the body is too large."),
        (429, "rate_limit_error: the queue is full; try again after Retry-After seconds."),
        (500, "api_error: the request failed."),
        (503, "overloaded_error: loading, draining, or the engine is gone."),
        (504, "timeout_error: the request took longer than --request-timeout."),
    )
}
BLOCK = {"anyOf": [
    object_of({"type": {"const": "text"}, "text": TEXT}),
    object_of({"type": {"const": "thinking"}, "thinking": TEXT, "signature": TEXT}),
    object_of({"type": {"const": "tool_use"}, "id": TEXT, "name": TEXT, "input": ANY_OBJECT}),
]}  # fmt: skip
USAGE = object_of({
    "input_tokens": TOKENS,
    "cache_creation_input_tokens": TOKENS,
    "cache_read_input_tokens": TOKENS,
    "output_tokens": TOKENS,
    "cache_creation": object_of({"ephemeral_5m_input_tokens": TOKENS, "ephemeral_1h_input_tokens": TOKENS}),
    "output_tokens_details": object_of({"thinking_tokens": TOKENS}),
    "server_tool_use": {"type": "null"},
    "service_tier": TEXT,
})  # fmt: skip
REASONS = one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded")
MESSAGE_SCHEMA = object_of(
    {
        "id": TEXT,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": TEXT,
        "content": list_of(BLOCK),
        "stop_reason": REASONS,
        "stop_sequence": or_null(TEXT),
        "usage": USAGE,
    },
    {"context_management": object_of({"applied_edits": {"type": "array", "maxItems": 0}})},
)
MESSAGE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A message; with `stream: true` server-sent events that end in `message_stop`.",
        "content": {"application/json": {"schema": MESSAGE_SCHEMA}, "text/event-stream": {}},
    },
    **ERRORS,
}
COUNT: dict[int | str, dict[str, Any]] = {
    **answers(object_of({"input_tokens": TOKENS}, {"context_management": object_of({"original_input_tokens": TOKENS})}),
              "The number of tokens of the prompt."),
    **ERRORS,
}  # fmt: skip

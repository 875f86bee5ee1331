"""The answers of the responses API as JSON schemas, for the OpenAPI document; tests hold answers against them."""

from __future__ import annotations

from typing import Any

from saddle.server.bodies import ERRORS
from saddle.server.schemas import (
    ANY_OBJECT,
    COUNT,
    FLAG,
    IDS,
    NUMBER,
    TEXT,
    Schema,
    answers,
    list_of,
    object_of,
    one_of,
    or_null,
)

STATUS = one_of("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
ITEM_STATUS = one_of("in_progress", "completed", "incomplete")
TOKEN: dict[str, Schema] = {"token": TEXT, "logprob": NUMBER, "bytes": or_null(IDS)}
OUTPUT_TEXT = object_of({
    "type": {"const": "output_text"},
    "annotations": {"type": "array", "maxItems": 0},
    "logprobs": list_of(object_of({**TOKEN, "top_logprobs": list_of(object_of(TOKEN))})),
    "text": TEXT,
})  # fmt: skip
REASONING = object_of({
    "id": TEXT,
    "type": {"const": "reasoning"},
    "summary": list_of(object_of({"type": {"const": "summary_text"}, "text": TEXT})),
    "content": list_of(object_of({"type": {"const": "reasoning_text"}, "text": TEXT})),
    "encrypted_content": or_null(TEXT),
    "status": ITEM_STATUS,
})  # fmt: skip
MESSAGE = object_of({
    "id": TEXT,
    "type": {"const": "message"},
    "status": ITEM_STATUS,
    "role": {"const": "assistant"},
    "content": list_of(OUTPUT_TEXT),
})  # fmt: skip
CALL = object_of(
    {"id": TEXT, "type": {"const": "function_call"}, "status": ITEM_STATUS, "arguments": TEXT, "call_id": TEXT,
     "name": TEXT},
    {"namespace": TEXT},
)  # fmt: skip
USAGE = object_of({
    "input_tokens": COUNT,
    "input_tokens_details": object_of({"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
    "output_tokens": COUNT,
    "output_tokens_details": object_of({"reasoning_tokens": COUNT}),
    "total_tokens": COUNT,
})  # fmt: skip
IGNORED: Schema = {
    **object_of({}, {name: list_of(TEXT) for name in ("tools", "input", "fields")}),
    "description": "kinds of tools and items that were left out, and fields without effect",
}
RESPONSE = object_of(
    {
        "id": TEXT,
        "object": {"const": "response"},
        "status": STATUS,
        "created_at": COUNT,
        "completed_at": or_null(COUNT),
        "error": or_null(object_of({"code": TEXT, "message": TEXT})),
        "incomplete_details": or_null(object_of({"reason": TEXT})),
        "output": list_of({"anyOf": [REASONING, MESSAGE, CALL]}),
        "usage": or_null(USAGE),
        "background": FLAG,
        "instructions": or_null(TEXT),
        "max_output_tokens": or_null(COUNT),
        "max_tool_calls": or_null(COUNT),
        "metadata": ANY_OBJECT,
        "model": TEXT,
        "parallel_tool_calls": FLAG,
        "previous_response_id": or_null(TEXT),
        "prompt_cache_key": or_null(TEXT),
        "reasoning": object_of({"effort": or_null(TEXT), "summary": or_null(TEXT)}),
        "safety_identifier": or_null(TEXT),
        "service_tier": TEXT,
        "store": FLAG,
        "temperature": NUMBER,
        "text": object_of({"format": ANY_OBJECT, "verbosity": TEXT}),
        "tool_choice": {"anyOf": [TEXT, ANY_OBJECT]},
        "tools": list_of(ANY_OBJECT),
        "top_logprobs": COUNT,
        "top_p": NUMBER,
        "truncation": one_of("auto", "disabled"),
        "user": or_null(TEXT),
    },
    {"ignored": IGNORED, "prompt_token_ids": IDS, "token_ids": IDS},
)
ITEMS = object_of({
    "object": {"const": "list"},
    "data": list_of({"type": "object", "required": ["id", "type"], "properties": {"id": TEXT, "type": TEXT}}),
    "first_id": or_null(TEXT),
    "last_id": or_null(TEXT),
    "has_more": FLAG,
})  # fmt: skip

Answers = dict[int | str, dict[str, Any]]
STORED: Answers = {**answers(RESPONSE, "The response."), **ERRORS}
LISTED: Answers = {**answers(ITEMS, "A page of its input."), **ERRORS}
DELETED: Answers = {**answers(object_of({"id": TEXT, "object": {"const": "response"}, "deleted": {"const": True}})),
                    **ERRORS}  # fmt: skip
COUNTED: Answers = {**answers(object_of({"object": {"const": "response.input_tokens"}, "input_tokens": COUNT})),
                    **ERRORS}  # fmt: skip
STREAMED: Answers = {
    **ERRORS,
    200: {"description": "The response; with `stream: true` server-sent events that end with it.",
          "content": {"application/json": {"schema": RESPONSE}, "text/event-stream": {}}},
}  # fmt: skip

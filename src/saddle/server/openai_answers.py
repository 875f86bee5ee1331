"""The answers of chat and completions as JSON schemas, for the OpenAPI document; tests hold answers against them."""

from __future__ import annotations

from typing import Any

from saddle.server.bodies import STREAMED

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": COUNT}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object of these members and no others."""
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})},
            "additionalProperties": False}  # fmt: skip


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


STOP_REASON: Schema = {"type": ["string", "integer", "null"], "description": "the stop string or token id that matched"}
USAGE = _object({
    "prompt_tokens": COUNT,
    "completion_tokens": COUNT,
    "total_tokens": COUNT,
    "prompt_tokens_details": _object({"cached_tokens": COUNT}),
    "completion_tokens_details": _object({"reasoning_tokens": COUNT}),
})  # fmt: skip
PROMPT_LOGPROBS = _list(_or_null({
    "type": "object",
    "description": "by token id",
    "additionalProperties": _object({"logprob": {"type": "number"}, "rank": COUNT, "decoded_token": TEXT}),
}))  # fmt: skip
CHAT_TOKEN: dict[str, Schema] = {"token": TEXT, "logprob": {"type": "number"}, "bytes": _or_null(IDS)}
CHAT_LOGPROBS = _object({"content": _list(_object({**CHAT_TOKEN, "top_logprobs": _list(_object(CHAT_TOKEN))}))})
CALL = _object({
    "id": TEXT,
    "type": {"const": "function"},
    "function": _object({"name": TEXT, "arguments": {**TEXT, "description": "JSON"}}),
})  # fmt: skip
MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _or_null(TEXT)},
    {"reasoning": TEXT, "reasoning_content": TEXT, "tool_calls": _list(CALL)},
)
TEXT_LOGPROBS = _object({
    "tokens": _list(TEXT),
    "token_logprobs": _list(_or_null({"type": "number"})),
    "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": {"type": "number"}})),
    "text_offset": IDS,
})  # fmt: skip


def _answer(kind: str, choice: Schema, optional: dict[str, Schema] | None = None) -> Schema:
    head = {"id": TEXT, "object": {"const": kind}, "created": COUNT, "model": TEXT}
    return _object({**head, "choices": _list(choice), "usage": USAGE}, optional)


CHAT = _answer(
    "chat.completion",
    _object(
        {"index": COUNT, "message": MESSAGE, "logprobs": _or_null(CHAT_LOGPROBS),
         "finish_reason": {"enum": ["stop", "length", "tool_calls"]}, "stop_reason": STOP_REASON},
        {"token_ids": IDS},
    ),
    {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": IDS},
)  # fmt: skip
COMPLETION = _answer(
    "text_completion",
    _object(
        {"index": COUNT, "text": TEXT, "logprobs": _or_null(TEXT_LOGPROBS),
         "finish_reason": {"enum": ["stop", "length"]}, "stop_reason": STOP_REASON},
        {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": IDS, "token_ids": IDS},
    ),
)  # fmt: skip


def streamed(answer: Schema) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer comes whole or as a stream."""
    content = {**STREAMED[200]["content"], "application/json": {"schema": answer}}
    return {**STREAMED, 200: {**STREAMED[200], "content": content}}

"""The answers of chat and completions as JSON schemas, for the OpenAPI document; tests hold answers against them."""

from __future__ import annotations

from typing import Any

from saddle.server.bodies import STREAMED
from saddle.server.schemas import COUNT, IDS, TEXT, Schema, list_of, object_of, or_null

STOP_REASON: Schema = {"type": ["string", "integer", "null"], "description": "the stop string or token id that matched"}
USAGE = object_of({
    "prompt_tokens": COUNT,
    "completion_tokens": COUNT,
    "total_tokens": COUNT,
    "prompt_tokens_details": object_of({"cached_tokens": COUNT}),
    "completion_tokens_details": object_of({"reasoning_tokens": COUNT}),
})  # fmt: skip
PROMPT_LOGPROBS = list_of(or_null({
    "type": "object",
    "description": "by token id",
    "additionalProperties": object_of({"logprob": {"type": "number"}, "rank": COUNT, "decoded_token": TEXT}),
}))  # fmt: skip
CHAT_TOKEN: dict[str, Schema] = {"token": TEXT, "logprob": {"type": "number"}, "bytes": or_null(IDS)}
CHAT_LOGPROBS = object_of({
    "content": list_of(object_of({**CHAT_TOKEN, "top_logprobs": list_of(object_of(CHAT_TOKEN))})),
})  # fmt: skip
CALL = object_of({
    "id": TEXT,
    "type": {"const": "function"},
    "function": object_of({"name": TEXT, "arguments": {**TEXT, "description": "JSON"}}),
})  # fmt: skip
MESSAGE = object_of(
    {"role": {"const": "assistant"}, "content": or_null(TEXT)},
    {"reasoning": TEXT, "reasoning_content": TEXT, "tool_calls": list_of(CALL)},
)
TEXT_LOGPROBS = object_of({
    "tokens": list_of(TEXT),
    "token_logprobs": list_of(or_null({"type": "number"})),
    "top_logprobs": list_of(or_null({"type": "object", "additionalProperties": {"type": "number"}})),
    "text_offset": IDS,
})  # fmt: skip


def _answer(kind: str, choice: Schema, optional: dict[str, Schema] | None = None) -> Schema:
    head = {"id": TEXT, "object": {"const": kind}, "created": COUNT, "model": TEXT}
    return object_of({**head, "choices": list_of(choice), "usage": USAGE}, optional)


CHAT = _answer(
    "chat.completion",
    object_of(
        {"index": COUNT, "message": MESSAGE, "logprobs": or_null(CHAT_LOGPROBS),
         "finish_reason": {"enum": ["stop", "length", "tool_calls"]}, "stop_reason": STOP_REASON},
        {"token_ids": IDS},
    ),
    {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": IDS},
)  # fmt: skip
COMPLETION = _answer(
    "text_completion",
    object_of(
        {"index": COUNT, "text": TEXT, "logprobs": or_null(TEXT_LOGPROBS),
         "finish_reason": {"enum": ["stop", "length"]}, "stop_reason": STOP_REASON},
        {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": IDS, "token_ids": IDS},
    ),
)  # fmt: skip


def streamed(answer: Schema) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose answer comes whole or as a stream."""
    content = {**STREAMED[200]["content"], "application/json": {"schema": answer}}
    return {**STREAMED, 200: {**STREAMED[200], "content": content}}

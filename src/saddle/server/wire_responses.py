"""The body of OpenAI's responses request as it arrives, with the extra fields that vLLM's has.

Types are strict and unknown fields are ignored, as in `wire_openai.py`. The fields typed `Any` are checked by hand in
`responses.py` and `responses_items.py`, whose messages read better than those of a union. Nothing of the body is the
wire of another API: the fields that sampling shares are copied by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from saddle.server.wire_openai import MAX_REQUEST_ID, Object, StringOrStrings, ToolChoice, Tools, Wire

MAX_INPUT_ITEMS = 20_000

Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]


class Reasoning(Wire):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class Text(Wire):
    format: Object | None = None
    verbosity: str | None = None


class ResponsesStreamOptions(Wire):
    include_obfuscation: bool | None = None


class ResponsesBody(Wire):
    """POST /v1/responses. None means: the server's default."""

    model: str | None = None
    input: Input = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    include: list[str] | None = None
    truncation: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    metadata: dict[str, Any] | None = None
    # Said about a request, and echoed: they change nothing of its answer.
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Not of OpenAI.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: StringOrStrings | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_REQUEST_ID)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    # Known and not supported: refused with any value that asks for something.
    conversation: Any = None
    prompt: Object | None = None
    context_management: list[Any] | None = None
    moderation: Object | None = None



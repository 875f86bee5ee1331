"""The bodies of OpenAI's chat and completions requests, vLLM's extra fields included, as they arrive.

Types are strict (no "0.7" for 0.7) and unknown fields are ignored. What a value means, and which values of a known
field this version refuses, is decided in `openai.py`; the fields typed `Any` are checked there by hand because the
messages read better than those of a union. `messages` and `tools` are checked by `parsing.conversation`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MAX_REQUEST_ID = 256
MAX_MESSAGES = 100_000
MAX_TOOLS = 2048


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StringOrStrings = Annotated[
    list[str], BeforeValidator(_as_list), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]})
]
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]
PromptText = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]})]
Object = Annotated[Any, WithJsonSchema({"type": "object"})]
TokenId = Annotated[int, Field(ge=0)]
Tools = Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, hide_input_in_errors=False)


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Wire):
    """What both APIs share. None means: the server's default."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: StringOrStrings | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    priority: int | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_REQUEST_ID)] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    response_format: Object | None = None
    structured_outputs: Object | None = None
    thinking_token_budget: int | None = None
    # Known and not supported by this version: refused with any value that asks for something.
    best_of: int | None = None
    use_beam_search: bool | None = None
    logprob_token_ids: list[int] | None = None
    repetition_detection: Object | None = None
    kv_transfer_params: Object | None = None
    vllm_xargs: Object | None = None
    return_prompt_text: bool | None = None
    stream_interval: int | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Not supported, as above.
    chat_template: str | None = None
    documents: list[Any] | None = None
    functions: list[Any] | None = None
    function_call: ToolChoice | None = None
    modalities: list[str] | None = None
    audio: Object | None = None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: PromptText = None
    logprobs: int | None = None
    suffix: str | None = None
    prompt_embeds: Any = None


class TokenizeBody(Wire):
    """POST /tokenize: a prompt, or messages to be rendered first."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Wire):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]

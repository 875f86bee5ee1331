"""The sampling fields of an OpenAI body -> `SamplingParams`, and the refusal of what this version does not do.

Order of defaults: the request, then the server's (`generation_config.json` and its overrides), then neutral values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saddle.errors import InvalidRequest
from saddle.protocol import MAX_LOGIT_BIAS, GrammarSpec, SamplingParams
from saddle.server import constraints
from saddle.server.job import Facts
from saddle.server.wire_openai import SamplingBody

# Known fields without an implementation here, each with what a sender can do instead.
REFUSED: dict[str, str] = {
    "use_beam_search": "sample with n instead",
    "logprob_token_ids": "use logprobs and top_logprobs",
    "repetition_detection": "use repetition_penalty",
    "kv_transfer_params": "leave it out",
    "vllm_xargs": "leave it out",
    "return_prompt_text": "use /detokenize on prompt_token_ids",
    "chat_template": "it is fixed when the server starts (--chat-template)",
    "documents": "put their text into a message",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "the model reads and writes text only",
    "suffix": "the model has no fill-in-the-middle prompt",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_json_object": "use structured_outputs.json_object",
    "guided_decoding_backend": "leave it out, there is one",
    "guided_whitespace_pattern": "leave it out",
    "prompt_embeds": "send text or token ids",
}
ASK_EMPTY = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # that ask for something empty too
SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "n", "prompt_logprobs",
)  # fmt: skip
MAX_BAD_WORDS, MAX_BAD_WORD = 256, 256  # each costs time in every step
DEFAULTED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                    "frequency_penalty")  # fmt: skip


def sampling_params(
    body: SamplingBody, facts: Facts, *, max_tokens: int | None, logprobs: int | None, **extra: Any
) -> SamplingParams:
    """Resolve all sampling fields; `max_tokens` None stays None when the server has no default either.

    Raises:
        InvalidRequest: naming the field.
    """
    refuse_unsupported(body)
    values: dict[str, Any] = {name: facts.defaults[name] for name in DEFAULTED_FIELDS if name in facts.defaults}
    values |= {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    if max_tokens is None:
        max_tokens = facts.defaults.get("max_tokens")
    allowed = body.allowed_token_ids
    params = SamplingParams(
        **{
            **values,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "stop": tuple(body.stop or ()),
            "stop_token_ids": tuple(body.stop_token_ids or ()),
            "logit_bias": _logit_bias(body.logit_bias or {}),
            "bad_words_ids": _bad_words(body.bad_words or [], facts),
            "allowed_token_ids": None if allowed is None else tuple(allowed),
            **extra,
        }
    )
    if params.n > 1 and params.is_greedy:
        raise InvalidRequest("n must be 1 when temperature is 0: greedy choices would all be the same.", param="n")
    _check_token_ids(params, facts)
    _check_logprobs(params, facts, "top_logprobs" if hasattr(body, "top_logprobs") else "logprobs")
    return params


def refuse_unsupported(body: SamplingBody) -> None:
    """Raise for a known field that asks for something this version does not do."""
    for name, instead in REFUSED.items():
        value = getattr(body, name, None)
        if value or (name in ASK_EMPTY and value is not None):
            raise InvalidRequest(f"{name} is not supported by this version: {instead}.", param=name)
    if body.stream_interval not in (None, 1):
        raise InvalidRequest("stream_interval must be 1: every step's tokens are sent at once.",
                             param="stream_interval")  # fmt: skip
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of is not supported: use n and choose among the choices.", param="best_of")
    if any(kind != "text" for kind in getattr(body, "modalities", None) or ()):
        raise InvalidRequest('modalities must be ["text"].', param="modalities")


def answer_grammar(body: SamplingBody) -> GrammarSpec | None:
    """What `response_format` or `structured_outputs` asks of the answer."""
    wanted = constraints.response_format(body.response_format), constraints.structured_outputs(body.structured_outputs)
    if None not in wanted:
        raise InvalidRequest("structured_outputs and response_format both say what the answer must match: give one.",
                             param="structured_outputs")  # fmt: skip
    return wanted[0] or wanted[1]


def max_thinking_tokens(
    body: SamplingBody, effort: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> int | None:
    """The limit that `thinking_token_budget` and `reasoning_effort` "none" set; -1 is no limit.

    Without both, `enable_thinking` among the variables of the template decides.
    """
    budget = body.thinking_token_budget
    if budget is None and effort is None and constraints.switches_thinking_off(template_kwargs or {}):
        return 0
    if budget is not None and budget < -1:
        raise InvalidRequest("thinking_token_budget must be 0 or more, or -1 for no limit.",
                             param="thinking_token_budget")  # fmt: skip
    if effort == "none":
        if budget is not None and budget != 0:
            raise InvalidRequest("thinking_token_budget must be 0 or left out with reasoning_effort none.",
                                 param="thinking_token_budget")  # fmt: skip
        return 0
    return None if budget is None or budget == -1 else min(budget, 2**31)


def check_streaming(body: SamplingBody) -> None:
    """Fields that go with streaming only, or never."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available with stream: true.", param="prompt_logprobs")


def truncation(body: SamplingBody, facts: Facts) -> tuple[int | None, int | None]:
    """(keep_last, keep_first) of a job; -1 is the whole context but one token."""
    limit = body.truncate_prompt_tokens
    if body.truncation_side not in (None, "left", "right"):
        raise InvalidRequest("truncation_side must be left or right.", param="truncation_side")
    if limit is None:
        return None, None
    if limit != -1 and not 1 <= limit < facts.max_model_len:
        raise InvalidRequest(f"truncate_prompt_tokens must be -1 or from 1 to {facts.max_model_len - 1}.",
                             param="truncate_prompt_tokens")  # fmt: skip
    limit = facts.max_model_len - 1 if limit == -1 else limit
    return (None, limit) if body.truncation_side == "right" else (limit, None)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias may name at most {MAX_LOGIT_BIAS} tokens.", param="logit_bias")
    found = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidRequest(f"logit_bias must map token ids to numbers, got the key {key[:50]!r}.",
                                 param=f"logit_bias.{key[:50]}")  # fmt: skip
        if not -100 <= value <= 100:
            raise InvalidRequest("logit_bias values must be between -100 and 100.", param=f"logit_bias.{key}")
        found[int(key)] = value
    return found


def _bad_words(words: list[str], facts: Facts) -> tuple[tuple[int, ...], ...]:
    """Ids of each word as it is written at the start of a text and after a space: BPE has one of each."""
    if len(words) > MAX_BAD_WORDS or any(len(word) > MAX_BAD_WORD for word in words):
        raise InvalidRequest(f"bad_words may hold at most {MAX_BAD_WORDS} words of {MAX_BAD_WORD} characters.",
                             param="bad_words")  # fmt: skip
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        if not word.strip():
            raise InvalidRequest("bad_words must be made of non-empty strings.", param=f"bad_words.{index}")
        for text in (word, " " + word.lstrip()):
            found[tuple(facts.tokenizer.encode(text, allow_special=False))] = None
    return tuple(found)


def _check_token_ids(params: SamplingParams, facts: Facts) -> None:
    facts.check_token_ids(params.stop_token_ids, "stop_token_ids")
    facts.check_token_ids(tuple(params.logit_bias), "logit_bias")
    facts.check_token_ids(params.allowed_token_ids or (), "allowed_token_ids")


def _check_logprobs(params: SamplingParams, facts: Facts, name: str) -> None:
    most = facts.config.max_logprobs
    for field, count in ((name, params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and most >= 0 and count > most:
            raise InvalidRequest(f"{field} must be at most {most} (--max-logprobs), got {count}.", param=field)

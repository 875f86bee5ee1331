"""What a request asks its output to be -> the grammar of its job. The same for all APIs, whatever they call it.

    answer    response_format, structured_outputs, text.format or output_config -> a `GrammarSpec`
    choice    which calls are wanted -> `Choice`
    combined  both, and what the tools themselves say -> the grammar of a job, None where nothing is constrained

Where the grammar begins to bind depends on the prompt and is decided behind the renderer (`bound_behind`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from saddle.errors import InvalidRequest
from saddle.grammar import spec
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec, SamplingParams

MAX_THINKING = "thinking_token_budget"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which calls a request wants. `name` is set for "named" alone."""

    kind: Literal["none", "auto", "required", "named"] = "auto"
    name: str | None = None

    @property
    def must_call(self) -> bool:
        return self.kind in ("required", "named")


def combined(
    answer: GrammarSpec | None,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: Choice,
    tokenizer: Tokenizer,
    *,
    parallel: bool = True,
    param: str = "tools",
) -> GrammarSpec | None:
    """The grammar of a job, None where any output is fine.

    A required call leaves no room for an answer. With an answer and tools the model gives either. Without an answer,
    tools are constrained where one of them is `strict` or only one call may be made.

    Args:
        answer: what an answer must match.
        tools: as offered, OpenAI's with or without `function` around.
        parallel: whether the model may call more than once.
        param: the field that holds the tools.

    Raises:
        InvalidRequest: a tool is named that is not offered, or a schema cannot be enforced.
    """
    if not tools or choice.kind == "none":
        if choice.must_call:
            raise InvalidRequest("tool_choice needs tools.", "tool_choice")
        return answer
    if choice.kind == "named" or choice.kind == "required":
        return spec.tool_grammar(tools, choice.kind, tokenizer, name=choice.name, parallel=parallel, param=param)
    if answer is not None:
        calls = spec.tool_grammar(tools, "optional", tokenizer, parallel=parallel, param=param)
        return spec.answer_or_tools(answer, calls)
    if parallel and not any(function.get("strict") is True for function in spec.functions_of(tools, param)):
        return None
    return spec.tool_grammar(tools, "auto", tokenizer, parallel=parallel, param=param)


def switches_thinking_off(template_kwargs: Mapping[str, Any]) -> bool:
    """Whether `enable_thinking`, the switch of other models' templates, is false. M2's template does not know it."""
    return template_kwargs.get("enable_thinking") is False


def bound_behind(grammar: GrammarSpec | None, max_thinking_tokens: int | None, end_think_id: int) -> GrammarSpec | None:
    """The grammar of a prompt that ends inside a thinking block."""
    if grammar is None:
        if max_thinking_tokens is None:
            return None
        return spec.unbound(end_think_id, max_thinking_tokens, param=MAX_THINKING)
    return msgspec.structs.replace(grammar, after_token_id=end_think_id, max_thinking_tokens=max_thinking_tokens)


def check_sampling(grammar: GrammarSpec | None, max_thinking_tokens: int | None, params: SamplingParams) -> None:
    """Raise InvalidRequest where sampling parameters can forbid every token that the grammar leaves."""
    if grammar is None and max_thinking_tokens is None:
        return
    what = MAX_THINKING if grammar is None else grammar.param
    wrong = {
        "allowed_token_ids": params.allowed_token_ids is not None,
        "min_tokens": grammar is not None and params.min_tokens > 0,
        "ignore_eos": grammar is not None and params.ignore_eos,
        "bad_words": grammar is not None and bool(params.bad_words_ids),
    }
    for field, given in wrong.items():
        if given:
            raise InvalidRequest(f"{field} cannot be combined with {what}: together they may leave no token.", field)


def without_calls(params: SamplingParams, muted: bool, grammar: GrammarSpec | None,
                  tokenizer: Tokenizer) -> SamplingParams:  # fmt: skip
    """Where calls are `muted` the token that begins them is never sampled: the sender of tools and of "none" wants an
    answer, and a call that is read and dropped is none. A grammar for the answer forbids that token already."""
    if not muted or grammar is not None:
        return params
    return msgspec.structs.replace(params, bad_words_ids=(*params.bad_words_ids, (tokenizer.calls_id,)))


def chosen(choice: Any, tools: Sequence[Mapping[str, Any]] | None) -> Choice:
    """OpenAI's `tool_choice`, in the shapes of chat and of Responses."""
    if choice is None or choice == "none" or (choice == "auto" and tools):
        return Choice("none" if choice == "none" else "auto")
    if not tools:
        raise InvalidRequest("tool_choice needs tools.", "tool_choice")
    if choice == "required":
        return Choice("required")
    if isinstance(choice, Mapping) and choice.get("type", "function") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            return Choice("named", name)
    raise InvalidRequest('tool_choice must be "none", "auto", "required" or an object that names a function.',
                         "tool_choice")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# answers


def response_format(form: Any, param: str = "response_format") -> GrammarSpec | None:
    """OpenAI's `response_format`: text, json_object, json_schema, and vLLM's structural_tag."""
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return spec.json_object(param=param)
    if kind == "json_schema":
        inner = form.get("json_schema")
        if not isinstance(inner, Mapping) or inner.get("schema") is None:
            raise InvalidRequest(f"{param}.json_schema must be an object with a schema.", f"{param}.json_schema")
        return spec.json_schema(inner["schema"], param=f"{param}.json_schema.schema")
    if kind == "structural_tag":
        return spec.structural_tag(form, param=param)
    raise InvalidRequest(f"{param}.type must be text, json_object, json_schema or structural_tag, got {kind!r}.",
                         f"{param}.type")  # fmt: skip


def structured_outputs(given: Any, param: str = "structured_outputs") -> GrammarSpec | None:
    """vLLM's `structured_outputs`: exactly one of its kinds."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{param} must be an object with one of {', '.join(KINDS)}.", param)
    for option in ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"):
        if given.get(option):
            raise InvalidRequest(f"{param}.{option} is not supported: leave it out.", f"{param}.{option}")
    named = [kind for kind in KINDS if given.get(kind) not in (None, False)]
    if len(named) != 1:
        raise InvalidRequest(f"{param} must have exactly one of {', '.join(KINDS)}, got {len(named)}.", param)
    return KINDS[named[0]](given[named[0]], f"{param}.{named[0]}")


def _as_json(value: Any, param: str) -> Any:
    """A schema or tag may come as the text of one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} must be JSON.", param) from None


KINDS: dict[str, Callable[[Any, str], GrammarSpec]] = {
    "json": lambda value, param: spec.json_schema(_as_json(value, param), param=param),
    "regex": lambda value, param: spec.regex(value, param=param),
    "choice": lambda value, param: spec.choice(value, param=param),
    "grammar": lambda value, param: spec.grammar(value, param=param),
    "json_object": lambda value, param: spec.json_object(param=param),
    "structural_tag": lambda value, param: spec.structural_tag(_as_json(value, param), param=param),
}

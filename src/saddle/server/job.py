"""What the HTTP APIs ask of the service, in no API's words.

Each API is two pure functions: its request becomes a `Job`, the events of the job become its answer. `Facts` is what
those functions need to know about the server; it exists once the engine is ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saddle.config import ServerConfig
from saddle.errors import InvalidRequest, NotFound
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The server as an API sees it.

    model_names   all are accepted, the first is echoed
    vocab_size   ids below it may be named in a request
    defaults   sampling values for fields that a request leaves out, by the names of `SamplingParams`
    """

    model_names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    defaults: Mapping[str, Any]
    config: ServerConfig
    tokenizer: Tokenizer

    def check_model(self, model: str | None) -> str:
        """The name to echo; a request that names no model means the one that is served."""
        if model is not None and model not in self.model_names:
            valid = ", ".join(f"`{name}`" for name in self.model_names)
            raise NotFound(f"The model `{model}` does not exist. Valid names: {valid}.", param="model")
        return model or self.model_names[0]

    def check_token_ids(self, ids: list[int] | tuple[int, ...], param: str) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise InvalidRequest(f"{param} must be token ids from 0 to {self.vocab_size - 1}.", param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages to be rendered through the chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Generate `params.n` choices for each prompt.

    request_id   the public one; requests of the engine derive theirs from it
    params   `max_tokens` None means all that the context leaves
    parse   split reasoning, text and tool calls; else everything is text
    tools   as offered, for the types of arguments; None when the request offered none
    mute_calls   calls that the model makes all the same are dropped
    grammar   what answers and calls must match, from `server.constraints`; binds where the thinking ends, if the prompt
              opened any, else from the first token
    max_thinking_tokens   the thinking that a prompt opened is ended after so many tokens; None is no limit
    want_tokens   send `Tokens` events: ids and log-probabilities were asked for
    keep_last, keep_first   cut a longer prompt to so many tokens
    """

    request_id: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    parse: bool = True
    tools: list[dict[str, Any]] | None = None
    mute_calls: bool = False
    grammar: GrammarSpec | None = None
    max_thinking_tokens: int | None = None
    want_tokens: bool = False
    cache_salt: str | None = None
    priority: int = 0
    keep_last: int | None = None
    keep_first: int | None = None

"""Pieces that OpenAI's chat and completions answers share: ids, usage, log-probabilities, the frame of a chunk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from saddle.parsing.events import Done, Failed, Tokens
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import TokenLogprobs, Usage
from saddle.server.job import Job
from saddle.server.replies import encode_json, error_fields, sanitised

DONE_FRAME = b"data: [DONE]\n\n"
BROKEN_STATUS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request of this API: the job, and how the sender wants to read the answer."""

    job: Job
    model: str
    created: int
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False


def new_id(prefix: str, wanted: str | None) -> str:
    return f"{prefix}-{wanted or uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class ReasoningTokens(msgspec.Struct):
    reasoning_tokens: int


class UsageBody(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class UsageCount:
    """Adds up the choices of a request: a prompt counts once, however many choices it has."""

    def __init__(self, num_choices_per_prompt: int, prompt_lengths: list[int]) -> None:
        self._n = num_choices_per_prompt
        self._prompts = prompt_lengths
        self._usage: dict[int, Usage] = {}
        self._running: dict[int, int] = {}

    def add(self, index: int, event: Done | Failed) -> None:
        self._usage[index] = event.usage

    def add_tokens(self, index: int, count: int) -> None:
        """Tokens of a choice that is under way, for usage in every chunk."""
        self._running[index] = self._running.get(index, 0) + count

    def body(self, *, free_tokens: int = 0) -> UsageBody:
        """The sum so far; `free_tokens` were generated for our own needs and are not the sender's."""
        prompt = sum(self._prompts)
        done = self._usage
        completion = sum(u.num_completion_tokens for u in done.values()) - free_tokens
        completion += sum(count for index, count in self._running.items() if index not in done)
        cached = sum(u.num_cached_tokens for index, u in done.items() if index % self._n == 0)
        reasoning = sum(u.num_reasoning_tokens for u in done.values())
        return UsageBody(prompt, completion, prompt + completion, CachedTokens(cached), ReasoningTokens(reasoning))


class ChunkFrame:
    """The bytes around the choice of a chunk. Per chunk only the choice's own JSON is encoded.

    data: {"id":...,"object":...,"created":...,"model":...,"choices":[CHOICE]}
    """

    def __init__(self, object_name: str, asked: Asked) -> None:
        head = encode_json({"id": asked.job.request_id, "object": object_name, "created": asked.created,
                            "model": asked.model})  # fmt: skip
        self._head = b"data: " + head[:-1]
        self._before_choice = self._head + b',"choices":['

    def choice(self, choice: bytes, usage: bytes | None = None) -> bytes:
        if usage is None:
            return b"%b%b]}\n\n" % (self._before_choice, choice)
        return b'%b%b],"usage":%b}\n\n' % (self._before_choice, choice, usage)

    def first(self, choice: bytes, extra: Mapping[str, Any]) -> bytes:
        """A chunk with more fields beside `choices`."""
        return b"%b,%b\n\n" % (self._before_choice + choice + b"]", encode_json(extra)[1:])

    def usage(self, usage: UsageBody) -> bytes:
        """The last chunk of a stream with usage: no choices."""
        return b'%b],"usage":%b}\n\n' % (self._before_choice, encode_json(usage))


def error_frame(message: str, status: int = BROKEN_STATUS) -> bytes:
    """A failure in the middle of a stream, whose status was sent long ago."""
    return b"data: %b\n\n" % encode_json(error_fields(status, sanitised(message)))


class TokenNames:
    """Token ids as the text, bytes and rows that log-probabilities are reported with."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def chat(self, logprobs: TokenLogprobs, num_top: int) -> dict[str, Any]:
        """One entry of chat's `logprobs.content`."""
        return {**self._chat(logprobs.token_id, logprobs.logprob),
                "top_logprobs": [self._chat(i, value) for i, value in logprobs.top[:num_top]]}  # fmt: skip

    def prompt(self, entries: list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """`prompt_logprobs`: None for the first token, then a map from id to value, rank and text."""
        return [None if entry is None else self._ranked(entry) for entry in entries]

    def _chat(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text(token_id), "logprob": max(logprob, -9999.0),
                "bytes": self._tokenizer.token_bytes(token_id)}  # fmt: skip

    def _ranked(self, entry: TokenLogprobs) -> dict[str, Any]:
        ranks = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
        ranks[entry.token_id] = (entry.logprob, entry.rank)
        return {str(i): {"logprob": value, "rank": rank, "decoded_token": self._tokenizer.token_text(i)}
                for i, (value, rank) in ranks.items()}  # fmt: skip


def all_tokens(events: list[Any]) -> tuple[list[int], list[TokenLogprobs], list[TokenLogprobs | None] | None]:
    """(ids, log-probabilities, prompt log-probabilities) of a choice's `Tokens` events."""
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt: list[TokenLogprobs | None] | None = None
    for event in events:
        if isinstance(event, Tokens):
            ids += event.token_ids
            logprobs += event.logprobs or ()
            prompt = event.prompt_logprobs if event.prompt_logprobs is not None else prompt
    return ids, logprobs, prompt


def joined(first: Tokens, then: Tokens) -> Tokens:
    """Two lots of tokens of one choice as one."""
    both = None if then.logprobs is None else [*(first.logprobs or ()), *then.logprobs]
    return Tokens(first.token_ids + then.token_ids, both)

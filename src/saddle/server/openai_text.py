"""OpenAI's completions: raw text in, raw text out, one choice for each prompt and n.

Nothing is parsed: thinking and tool markup are part of the text. `echo` with `max_tokens: 0` scores the prompt; the
engine always makes a token, which is then not shown and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saddle.errors import InvalidRequest
from saddle.parsing.events import Done, Event, Failed, TextDelta, Tokens
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import TokenLogprobs
from saddle.server.constraints import check_sampling
from saddle.server.job import Facts, Job, Prompt, TextPrompt, TokenPrompt
from saddle.server.openai_parts import (
    DONE_FRAME,
    Asked,
    ChunkFrame,
    TokenNames,
    UsageCount,
    all_tokens,
    error_frame,
    joined,
    new_id,
    now,
)
from saddle.server.replies import encode_json, status_of
from saddle.server.sampling import answer_grammar, check_streaming, max_thinking_tokens, sampling_params, truncation
from saddle.server.wire_openai import CompletionBody

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedText(Asked):
    """A completions request. `hide_output`: only the prompt was to be scored."""

    num_top: int = 0
    echo: bool = False
    hide_output: bool = False


def to_request(body: CompletionBody, facts: Facts, request_id: str | None = None) -> AskedText:
    """Raises InvalidRequest or NotFound, naming the field."""
    model = facts.check_model(body.model)
    check_streaming(body)
    echo = bool(body.echo)
    hide_output = echo and body.max_tokens == 0
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else 1 if hide_output else body.max_tokens
    extra: dict[str, Any] = {}
    if echo and body.logprobs is not None:
        if body.stream:
            raise InvalidRequest("echo with logprobs is not available with stream: true.", param="echo")
        extra["prompt_logprobs"] = body.logprobs
    params = sampling_params(body, facts, max_tokens=max_tokens, logprobs=body.logprobs, **extra)
    grammar, max_thinking = answer_grammar(body), max_thinking_tokens(body)
    check_sampling(grammar, max_thinking, params)
    options = body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    keep_last, keep_first = truncation(body, facts)
    job = Job(
        request_id=new_id("cmpl", body.request_id or request_id),
        prompts=read_prompts(body.prompt, facts),
        params=params,
        parse=False,
        grammar=grammar,
        max_thinking_tokens=max_thinking,
        want_tokens=bool(body.return_token_ids) or continuous or hide_output or params.logprobs is not None
        or params.prompt_logprobs is not None,
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
        keep_last=keep_last,
        keep_first=keep_first,
    )  # fmt: skip
    return AskedText(
        job=job,
        model=model,
        created=now(),
        stream=bool(body.stream),
        include_usage=facts.config.force_include_usage or bool(options and options.include_usage) or continuous,
        continuous_usage=continuous,
        logprobs=body.logprobs is not None,
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        num_top=body.logprobs or 0,
        echo=echo,
        hide_output=hide_output,
    )


def read_prompts(prompt: Any, facts: Facts) -> tuple[Prompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    right = "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(right + ", not empty.", param="prompt")
    if all(type(item) is int for item in prompt):
        prompt = [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt may hold at most {MAX_PROMPTS} prompts, got {len(prompt)}.", param="prompt")
    found: list[Prompt] = []
    for index, item in enumerate(prompt):
        where = f"prompt.{index}" if len(prompt) > 1 else "prompt"
        if isinstance(item, str):
            found.append(TextPrompt(item))
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            facts.check_token_ids(item, where)
            found.append(TokenPrompt(item))
        else:
            raise InvalidRequest(right + ".", param=where)
    return tuple(found)


def prompt_texts(asked: AskedText, prompts: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    """What `echo` shows before each choice of a prompt."""
    if not asked.echo:
        return [""] * len(prompts)
    cut = asked.job.keep_last is not None or asked.job.keep_first is not None
    return [
        prompt.text if isinstance(prompt, TextPrompt) and not cut else tokenizer.decode(ids, skip_special_tokens=False)
        for prompt, ids in zip(asked.job.prompts, prompts, strict=True)
    ]


class TextLogprobs:
    """Builds completions' four parallel lists; offsets count characters of the text that the sender sees."""

    def __init__(self, names: TokenNames, num_top: int, offset: int = 0) -> None:
        self._names, self._num_top, self._offset = names, num_top, offset

    def body(self, entries: list[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        texts = [self._names.text(token_id) for token_id, _ in entries]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if entry is None else max(entry.logprob, -9999.0) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top = {self._names.text(i): value for i, value in entry.top[: self._num_top]}
        return {self._names.text(entry.token_id): entry.logprob, **top}


class TextStream:
    """Encodes a completions stream: `start`, then `encode` for each batch of events, then `finish`."""

    def __init__(self, asked: AskedText, names: TokenNames, prompts: list[list[int]], echoes: list[str]) -> None:
        self._asked, self._names, self._prompts, self._echoes = asked, names, prompts, echoes
        self._frame = ChunkFrame("text_completion", asked)
        self._usage = UsageCount(asked.job.params.n, [len(ids) for ids in prompts])
        self._num_choices = len(prompts) * asked.job.params.n
        self._heads = [b'{"index":%d,"text":' % i for i in range(self._num_choices)]
        self._pending: dict[int, Tokens] = {}
        self._logprobs = [TextLogprobs(names, asked.num_top) for _ in range(self._num_choices)]
        self._detailed = asked.logprobs or asked.return_token_ids or asked.continuous_usage

    def start(self) -> bytes:
        frames = []
        for index in range(self._num_choices):
            prompt = index // self._asked.job.params.n
            if self._asked.echo or self._asked.return_token_ids:
                extra = {"prompt_token_ids": self._prompts[prompt]} if self._asked.return_token_ids else {}
                frames.append(self._frame.choice(self._choice(index, self._echoes[prompt], extra=extra)))
        return b"".join(frames)

    def encode(self, index: int, events: list[Event]) -> bytes:
        frames: list[bytes] = []
        for event in events:
            if isinstance(event, TextDelta):
                if not self._asked.hide_output:
                    frames.append(self._chunk(index, event.text))
            elif isinstance(event, Tokens):
                self._hold(index, event)
            elif isinstance(event, Done):
                self._usage.add(index, event)
                choice = self._choice(index, "", event.finish_reason.value, event.stop)
                frames.append(self._frame.choice(choice, self._usage_so_far()))
            elif isinstance(event, Failed):
                self._usage.add(index, event)
                frames.append(error_frame(event.message, status_of(event)))
        if index in self._pending and self._detailed and not self._asked.hide_output:
            frames.append(self._chunk(index, ""))
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def failed(self, message: str) -> bytes:
        return error_frame(message)

    def finish(self) -> bytes:
        hidden = self._num_choices if self._asked.hide_output else 0
        if self._asked.include_usage:
            return self._frame.usage(self._usage.body(free_tokens=hidden)) + DONE_FRAME
        return DONE_FRAME

    def _chunk(self, index: int, text: str) -> bytes:
        if not self._detailed:
            return self._frame.choice(
                b'%b%b,"logprobs":null,"finish_reason":null,"stop_reason":null}'
                % (self._heads[index], encode_json(text))
            )
        return self._frame.choice(self._choice(index, text), self._usage_so_far())

    def _choice(self, index: int, text: str, finish: str | None = None, stop: str | int | None = None,
                extra: dict[str, Any] | None = None) -> bytes:  # fmt: skip
        fields: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish,
                                  "stop_reason": stop, **(extra or {})}  # fmt: skip
        tokens = self._pending.pop(index, None)
        if tokens is not None and not self._asked.hide_output:
            if self._asked.logprobs and tokens.logprobs is not None:
                pairs = list(zip(tokens.token_ids, tokens.logprobs, strict=True))
                fields["logprobs"] = self._logprobs[index].body(list(pairs))
            if self._asked.return_token_ids:
                fields["token_ids"] = tokens.token_ids
        return encode_json(fields)

    def _hold(self, index: int, tokens: Tokens) -> None:
        self._usage.add_tokens(index, len(tokens.token_ids))
        held = self._pending.get(index)
        self._pending[index] = tokens if held is None else joined(held, tokens)

    def _usage_so_far(self) -> bytes | None:
        return encode_json(self._usage.body()) if self._asked.continuous_usage else None


def to_response(
    asked: AskedText, names: TokenNames, prompts: list[list[int]], choices: list[list[Event]], echoes: list[str]
) -> bytes:
    """The body of a non-streaming answer; `choices[i]` are all events of choice i, ended by Done."""
    n = asked.job.params.n
    usage = UsageCount(n, [len(ids) for ids in prompts])
    bodies = []
    for index, events in enumerate(choices):
        done = events[-1]
        assert isinstance(done, Done)
        usage.add(index, done)
        bodies.append(_choice_body(asked, names, prompts[index // n], echoes[index // n], index, events, done))
    hidden = len(choices) if asked.hide_output else 0
    return encode_json({
        "id": asked.job.request_id,
        "object": "text_completion",
        "created": asked.created,
        "model": asked.model,
        "choices": bodies,
        "usage": usage.body(free_tokens=hidden),
    })  # fmt: skip


def _choice_body(asked: AskedText, names: TokenNames, prompt: list[int], echo: str, index: int, events: list[Event],
                 done: Done) -> dict[str, Any]:  # fmt: skip
    ids, logprobs, prompt_logprobs = all_tokens(events)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    choice: dict[str, Any] = {
        "index": index,
        "text": echo if asked.hide_output else echo + text,
        "logprobs": None,
        "finish_reason": done.finish_reason.value,
        "stop_reason": done.stop,
    }
    if asked.logprobs:
        entries: list[tuple[int, TokenLogprobs | None]] = []
        if asked.echo:
            entries += zip(prompt, prompt_logprobs or [None] * len(prompt), strict=True)
        if not asked.hide_output:
            entries += zip(ids, logprobs, strict=True)
        choice["logprobs"] = TextLogprobs(names, asked.num_top).body(entries)
    if prompt_logprobs is not None and not (asked.echo and asked.logprobs):
        choice["prompt_logprobs"] = names.prompt(prompt_logprobs)
    if asked.return_token_ids:
        choice["prompt_token_ids"] = prompt
        choice["token_ids"] = [] if asked.hide_output else ids
    return choice

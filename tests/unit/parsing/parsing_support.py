"""Generations made of text: fed to a parser in deltas of any size, and folded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from saddle.parsing.events import Event
from saddle.parsing.fold import Completion, fold
from saddle.parsing.stream import StreamParser
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, SamplingParams, TokenDelta

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def tool(name: str, /, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def call(name: str, /, **values: str) -> str:
    """A call as the model writes it."""
    lines = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in values.items())
    return f'<invoke name="{name}">\n{lines}</invoke>\n'


def block(*calls: str) -> str:
    return "<minimax:tool_call>\n" + "".join(calls) + "</minimax:tool_call>"


def parser(tokenizer: Tokenizer, *, params: SamplingParams | None = None, **options: Any) -> StreamParser:
    return StreamParser(tokenizer, params=params or SamplingParams(), num_prompt_tokens=7, **options)


def cut(ids: Sequence[int], how: int | Iterable[int] | None) -> list[list[int]]:
    """Deltas: None is one of all ids, a number is a seed for random ones, lengths are lengths."""
    if how is None:
        return [list(ids)]
    rng = random.Random(how) if isinstance(how, int) else None
    lengths = iter(lambda: rng.randint(1, 6), 0) if rng else iter(how)  # type: ignore[arg-type]
    deltas, at = [], 0
    for length in lengths:
        if at >= len(ids):
            break
        deltas.append(list(ids[at : at + length]))
        at += length
    return [*deltas, list(ids[at:])] if at < len(ids) or not deltas else deltas


def feed(stream: StreamParser, deltas: list[list[int]], reason: FinishReason | None = STOP) -> list[Event]:
    events: list[Event] = []
    for number, ids in enumerate(deltas):
        last = reason if number == len(deltas) - 1 else None
        events += stream.feed(TokenDelta(request_id="r", token_ids=ids, finish_reason=last))
    return events


def read(tokenizer: Tokenizer, text: str, *, split: int | Iterable[int] | None = None,
         reason: FinishReason = STOP, **options: Any) -> Completion:  # fmt: skip
    """The folded answer of a text, EOS behind it if the model ended it by itself."""
    ids = tokenizer.encode(text) + ([tokenizer.eos_id] if reason is STOP else [])
    return fold(feed(parser(tokenizer, **options), cut(ids, split), reason))


def calls_of(answer: Completion) -> list[tuple[str, str]]:
    return [(made.name, made.arguments) for made in answer.tool_calls]

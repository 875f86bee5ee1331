"""The ids of turns that the model generated, so that a turn that comes back is the same tokens again.

Sampled ids are not canonical BPE: encoding the text of a turn afresh gives other ids, and from there on the prefix
cache misses. So each finished turn is remembered by its meaning: thinking, answer, calls with their arguments as
values. What a client sends back differs in spelling (spacing and key order of arguments, newlines around thinking and
answer, nulls), not in meaning.

A client that drops the thinking sends no proof that the turn is its own: another conversation may hold the same
answer and calls. There the ids of the calls are the proof. They are random and known to the client alone that got
them, so a turn without thinking is found by them and by nothing else.

What cannot be replayed: turns before the last user message where the template drops thinking; a turn cut short by a
limit or a stop string; a turn without calls whose thinking was dropped; a turn whose client changed its answer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BYTES_PER_ID = 28 + 8  # an int object and its place in a list


@dataclass(frozen=True, slots=True)
class Turn:
    """A generated turn: what it means, and what was sampled after the generation prompt, the end token included.

    calls   (id, name, arguments as JSON text) of each call
    """

    reasoning: str
    content: str
    calls: tuple[tuple[str, str, str], ...]
    token_ids: list[int] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Memory, near enough."""
        num_chars = len(self.reasoning) + len(self.content) + sum(len(part) for call in self.calls for part in call)
        return 4 * num_chars + BYTES_PER_ID * len(self.token_ids) + 512


def meaning_of(reasoning: str, content: str, calls: Sequence[tuple[str, Any]]) -> bytes:
    """Hash of what a turn says; `calls` are (name, arguments as a value). Outer white space means nothing."""
    said = [reasoning.strip(), content.strip(), [[name, _canonical(value)] for name, value in calls]]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()


def _canonical(value: Any) -> Any:
    """5.0 as 5: the two are one number to many clients."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True, slots=True)
class _Kept:
    turn: Turn
    meaning: bytes
    unthought: bytes  # the meaning without the thinking
    call_ids: tuple[str, ...]


class ReplayStore:
    """Generated turns, the least recently used forgotten first. Thread-safe.

    Args:
        max_bytes: memory that texts and ids may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._by_meaning: dict[bytes, int] = {}
        self._by_calls: dict[tuple[str, ...], int] = {}
        self._num_bytes = 0
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def remember(self, turn: Turn | None) -> None:
        """Keep a turn that ended well; None is nothing to keep. By meaning, the latest of equal turns is found."""
        if turn is None or turn.num_bytes > self._max_bytes:
            return
        try:
            calls = [(name, json.loads(arguments)) for _, name, arguments in turn.calls]
            meaning, unthought = (meaning_of(text, turn.content, calls) for text in (turn.reasoning, ""))
        except (ValueError, RecursionError):
            return  # beyond what JSON can be here: no client can send it back either
        kept = _Kept(turn, meaning, unthought, tuple(call_id for call_id, _, _ in turn.calls))
        with self._lock:
            number, self._next = self._next, self._next + 1
            if not kept.call_ids:
                self._forget(self._by_meaning.get(kept.meaning))  # nothing could tell the two apart
            self._kept[number] = kept
            self._by_meaning[kept.meaning] = number
            if kept.call_ids:
                self._by_calls[kept.call_ids] = number
            self._num_bytes += turn.num_bytes
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._kept)))

    def find(self, reasoning: str, content: str, calls: Sequence[tuple[str | None, str, Any]]) -> Turn | None:
        """The turn that a client sends back: (id, name, arguments as a value) of each call.

        Its calls' ids find it, if all else agrees, the thinking only where it was sent. Ids that are unknown do no
        harm: then its whole meaning finds it.
        """
        meant = [(name, value) for _, name, value in calls]
        try:
            meaning = meaning_of(reasoning, content, meant)
        except RecursionError:
            return None  # nested too deeply to have been kept
        with self._lock:
            number = self._by_calls.get(tuple(call_id or "" for call_id, _, _ in calls)) if calls else None
            if number is not None:
                kept = self._kept[number]
                if meaning != (kept.meaning if reasoning.strip() else kept.unthought):
                    number = None
            if number is None:
                number = self._by_meaning.get(meaning)
            if number is None:
                return None
            self._kept.move_to_end(number)
            return self._kept[number].turn

    def _forget(self, number: int | None) -> None:
        kept = None if number is None else self._kept.pop(number, None)
        if kept is None:
            return
        self._num_bytes -= kept.turn.num_bytes
        if self._by_meaning.get(kept.meaning) == number:
            del self._by_meaning[kept.meaning]
        if self._by_calls.get(kept.call_ids) == number:
            del self._by_calls[kept.call_ids]

"""The ids of turns that the model generated, so that a turn that comes back is the same tokens again.

Sampled ids are not canonical BPE: encoding the text of a turn afresh gives other ids, and from there on the prefix
cache misses. So each finished turn is remembered by its meaning: thinking, answer, calls with their arguments as
values. What a client sends back differs in spelling (spacing and key order of arguments, newlines around the
thinking, nulls), not in meaning. Clients that drop the thinking are matched by the rest.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

BYTES_PER_ID = 28 + 8  # an int object and its place in a list


@dataclass(frozen=True, slots=True)
class Turn:
    """A generated turn: what it means, and what was sampled after the generation prompt, the end token included.

    calls   (name, arguments as JSON text) of each whole call
    """

    reasoning: str
    content: str
    calls: tuple[tuple[str, str], ...]
    text: str
    token_ids: list[int] = field(repr=False)


def key_of(reasoning: str | None, content: str, calls: list[tuple[str, Any]]) -> bytes:
    """Hash of a turn's meaning; `reasoning` None leaves the thinking out. Arguments are values, not text."""
    meaning = [
        None if reasoning is None else reasoning.strip(),
        content.strip(),
        [[name, json.dumps(arguments, sort_keys=True)] for name, arguments in calls],
    ]
    return hashlib.blake2b(json.dumps(meaning).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class ReplayStore:
    """Generated turns, the least recently used forgotten first.

    Args:
        max_bytes: memory that texts and ids may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._without_thinking: dict[bytes, bytes] = {}
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def remember(self, turn: Turn) -> None:
        """Keep a turn that ended well. A later turn of the same meaning replaces it."""
        try:
            calls = [(name, json.loads(arguments)) for name, arguments in turn.calls]
        except ValueError:
            return  # no client can send back what is not JSON
        key, short = key_of(turn.reasoning, turn.content, calls), key_of(None, turn.content, calls)
        with self._lock:
            self._forget(key)
            self._turns[key] = turn
            self._without_thinking[short] = key
            self._num_bytes += self._size(turn)
            while self._num_bytes > self._max_bytes and self._turns:
                self._forget(next(iter(self._turns)))

    def find(self, reasoning: str | None, content: str, calls: list[tuple[str, Any]]) -> Turn | None:
        """The turn with this meaning; `reasoning` None: the latest one with this answer and these calls."""
        key = key_of(reasoning or None, content, calls)
        with self._lock:
            if not reasoning:
                key = self._without_thinking.get(key, key)
            turn = self._turns.get(key)
            if turn is not None:
                self._turns.move_to_end(key)
            return turn

    def _forget(self, key: bytes) -> None:
        turn = self._turns.pop(key, None)
        if turn is not None:
            self._num_bytes -= self._size(turn)
            short = key_of(None, turn.content, [(name, json.loads(arguments)) for name, arguments in turn.calls])
            if self._without_thinking.get(short) == key:
                del self._without_thinking[short]

    @staticmethod
    def _size(turn: Turn) -> int:
        return 4 * len(turn.text) + BYTES_PER_ID * len(turn.token_ids)

"""Responses that were kept: read again, listed, deleted, and gone on from with `previous_response_id`.

Bounded in bytes and in count, the least recently used forgotten first. A response that continues another needs it, so
using one uses all that it stands on, and those last: what it stands on is never forgotten before it. Everything is
kept as the JSON that it was, so the bytes that are counted are the bytes that are held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from saddle.errors import InvalidRequest, NotFound
from saddle.server.responses_items import Item

MAX_RESPONSES = 10_000
OVERHEAD_BYTES = 1024  # of the objects around one response
CONTINUED = ("completed", "incomplete")


@dataclass(slots=True)
class Stored:
    """A response that ended.

    body   the response as it was sent
    items   its own input as JSON, without that of the responses before it
    previous   id of the response that it continues
    frames   its server-sent events, of one that ran in the background and was streamed
    hidden   deleted, but another one stands on it
    """

    id: str
    status: str
    body: bytes
    items: bytes
    previous: str | None = None
    background: bool = False
    frames: bytes | None = None
    hidden: bool = False
    num_next: int = 0

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.items) + len(self.frames or b"") + OVERHEAD_BYTES

    @property
    def input_items(self) -> list[Item]:
        found: list[Item] = msgspec.json.decode(self.items)
        return found

    @property
    def output_items(self) -> list[Item]:
        body: dict[str, Any] = msgspec.json.decode(self.body)
        return list(body["output"])


def items_of(line: Sequence[Stored]) -> list[Item]:
    """All items of a conversation, in their order."""
    return [item for each in line for item in (*each.input_items, *each.output_items)]


class ResponseStore:
    """Belongs to one event loop.

    Args:
        max_bytes: of all bodies, inputs and frames; 0 keeps nothing.
        max_count: of responses.
    """

    def __init__(self, max_bytes: int, max_count: int = MAX_RESPONSES) -> None:
        self._max_bytes, self._max_count = max_bytes, max_count
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def put(self, response: Stored, line: Sequence[Stored] = ()) -> bool:
        """Keep a response; False when it does not fit beside what it stands on.

        Args:
            line: what it stood on when it began. What of that was forgotten meanwhile becomes input of its own.
        """
        before = None if response.previous is None else self._kept.get(response.previous)
        if before is None:
            response.previous = None
            if line:
                response.items = msgspec.json.encode([*items_of(line), *response.input_items])
        if response.num_bytes > self._max_bytes:
            return False
        if before is not None:
            before.num_next += 1
        self._kept[response.id] = response
        self._num_bytes += response.num_bytes
        self._use(response)
        while self._num_bytes > self._max_bytes or len(self._kept) > self._max_count:
            self._remove(next(iter(self._kept.values())))
        return response.id in self._kept

    def get(self, response_id: str) -> Stored:
        """Raises NotFound."""
        found = self._find(response_id)
        if found is None:
            raise NotFound(f"Response {response_id[:100]!r} was not found: it was deleted, not stored, or forgotten in "
                           "favour of newer ones.", param="response_id")  # fmt: skip
        return found

    def delete(self, response_id: str) -> None:
        """Forget a response; others that continue it still do. Raises NotFound."""
        found = self.get(response_id)
        if found.num_next:
            found.hidden = True
        else:
            self._remove(found)

    def line(self, response: Stored) -> list[Stored]:
        """All that a response stands on, the oldest first, and itself."""
        found: list[Stored] = []
        at: Stored | None = response
        while at is not None:
            found.append(at)
            at = None if at.previous is None else self._kept[at.previous]
        return found[::-1]

    def conversation(self, response_id: str) -> list[Stored]:
        """A response that is to be continued behind all that it stands on.

        Raises:
            NotFound, InvalidRequest: there is no such response, or it cannot be continued.
        """
        found = self._find(response_id)
        if found is None:
            raise NotFound(f"Previous response {response_id[:100]!r} was not found: it was deleted, not stored, or "
                           "forgotten in favour of newer ones. Send the whole conversation as input instead.",
                           param="previous_response_id")  # fmt: skip
        if found.status not in CONTINUED:
            raise InvalidRequest(f"Previous response {response_id[:100]!r} is {found.status} and cannot be continued.",
                                 param="previous_response_id")  # fmt: skip
        return self.line(found)

    def _find(self, response_id: str) -> Stored | None:
        found = self._kept.get(response_id)
        if found is None or found.hidden:
            return None
        self._use(found)
        return found

    def _use(self, response: Stored) -> None:
        for each in reversed(self.line(response)):
            self._kept.move_to_end(each.id)

    def _remove(self, response: Stored) -> None:
        del self._kept[response.id]
        self._num_bytes -= response.num_bytes
        before = None if response.previous is None else self._kept[response.previous]
        if before is not None:
            before.num_next -= 1
            if before.hidden and not before.num_next:
                self._remove(before)

"""Stop strings: where the raw text of a generation ends.

The text goes in as segments, a token's text or a tag, and comes out as soon as no stop string can begin in it any
more; at most the longest stop string less one character is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """The text of one token. `tag_id` is set where the token is a tag of M2; a tag is never cut."""

    text: str
    tag_id: int | None = None


class StopStrings:
    """Finds the first of several strings in a text that comes in parts.

    Args:
        stops: the strings, none of them empty.
        include: let the string itself pass.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops, self._include = tuple(stops), include
        self._longest = max(map(len, self._stops), default=0)
        self._held: list[Segment] = []
        self._text = ""

    def push(self, segment: Segment) -> tuple[list[Segment], str | None]:
        """(what may pass, the stop string that was found). After one was found nothing more may be pushed."""
        self._held.append(segment)
        self._text += segment.text
        # Earlier text was searched already, so the first match to be complete is found here.
        found = min(((self._text.find(stop), -len(stop), stop) for stop in self._stops if stop in self._text),
                    default=None)  # fmt: skip
        if found is not None:
            at, _, stop = found
            return self._release(at + (len(stop) if self._include else 0)), stop
        return self._release(len(self._text) - self._num_open()), None

    def skip(self, segment: Segment) -> list[Segment]:
        """Let a segment pass unsearched, with what was held back before it."""
        return [*self.flush(), segment]

    def flush(self) -> list[Segment]:
        """What was held back, at the end of the text."""
        held, self._held, self._text = self._held, [], ""
        return held

    def _num_open(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        text = self._text
        start = max(0, len(text) - self._longest + 1)
        return next((len(text) - at for at in range(start, len(text)) if self._begins(text[at:])), 0)

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _release(self, count: int) -> list[Segment]:
        """Take the first `count` characters out; a tag only if it is wholly among them."""
        passed: list[Segment] = []
        taken = 0
        while self._held and taken < count:
            segment = self._held[0]
            if taken + len(segment.text) > count:
                if segment.tag_id is None:
                    cut = count - taken
                    passed.append(Segment(segment.text[:cut]))
                    self._held[0] = Segment(segment.text[cut:])
                    taken = count
                break
            passed.append(self._held.pop(0))
            taken += len(segment.text)
        self._text = self._text[taken:]
        return passed

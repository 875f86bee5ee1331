"""A message as server-sent events.

    ping                    at once, and again whenever nothing was written for a while
    message_start           with the first output: by then it is known how much of the prompt came from the cache
    content_block_start, content_block_delta ..., content_block_stop     for each block
    message_delta, message_stop        or `error`, after which nothing comes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saddle.parsing.events import Done, Event, Failed
from saddle.protocol import Usage
from saddle.server.anthropic import AskedMessage, end_of, head_of
from saddle.server.anthropic_blocks import FIELD, Blocks, Delta, Part, Start
from saddle.server.anthropic_parts import Signer, error_fields, usage_body
from saddle.server.replies import encode_json, sanitised, status_of

BROKEN_STATUS = 500


def frame(event: str, fields: dict[str, Any]) -> bytes:
    """One server-sent event; its type is in the data too."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), encode_json({"type": event, **fields}))


PING = frame("ping", {})
# Per token only the text itself is encoded.
DELTA_HEAD = (b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
              b'"delta":{"type":"%b","%b":')  # fmt: skip


class MessageStream:
    """Encodes a stream: `start`, then `encode` for each batch of events, then `finish`.

    Args:
        num_prompt: tokens of the prompt.
        num_cached: how many of them came from the cache; asked when the first events are there.
        request_id: that errors carry.
    """

    def __init__(
        self, asked: AskedMessage, signer: Signer, num_prompt: int, num_cached: Callable[[], int], request_id: str
    ) -> None:
        self._asked, self._request_id = asked, request_id
        self._num_prompt, self._num_cached = num_prompt, num_cached
        self._blocks = Blocks(asked.show, signer, asked.continues)
        self._has_begun = self._is_whole = False
        self._latest: tuple[int, str] | None = None  # block and kind that `_head` is the beginning of
        self._head = b""

    def start(self) -> bytes:
        return PING

    def encode(self, index: int, events: list[Event]) -> bytes:
        frames: list[bytes] = []
        for event in events:
            if isinstance(event, Failed):
                frames.append(self._error(event.message, status_of(event)))
                break
            if not self._has_begun:
                frames.append(self._begin())
            if not self._asked.is_warming:
                frames += map(self._part, self._blocks.read(event))
            if isinstance(event, Done):
                frames.append(self._last(event))
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def failed(self, message: str) -> bytes:
        return self._error(message, BROKEN_STATUS)

    def finish(self) -> bytes:
        return frame("message_stop", {}) if self._is_whole else b""

    def _error(self, message: str, status: int) -> bytes:
        return frame("error", error_fields(status, sanitised(message), self._request_id))

    def _begin(self) -> bytes:
        self._has_begun = True
        usage = Usage(num_prompt_tokens=self._num_prompt, num_completion_tokens=0, num_cached_tokens=self._num_cached())
        message = {**head_of(self._asked), "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": usage_body(usage)}  # fmt: skip
        return frame("message_start", {"message": message})

    def _part(self, part: Part) -> bytes:
        if isinstance(part, Delta):
            if (part.index, part.kind) != self._latest:
                self._latest = (part.index, part.kind)
                self._head = DELTA_HEAD % (part.index, part.kind.encode(), FIELD[part.kind].encode())
            return b"%b%b}}\n\n" % (self._head, encode_json(part.value))
        if isinstance(part, Start):
            return frame("content_block_start", {"index": part.index, "content_block": part.block})
        return frame("content_block_stop", {"index": part.index})

    def _last(self, done: Done) -> bytes:
        self._is_whole = True
        fields: dict[str, Any] = {
            "delta": end_of(self._asked, done, self._blocks),
            "usage": usage_body(done.usage, is_warming=self._asked.is_warming),
        }
        if self._asked.manages_context:
            fields["context_management"] = {"applied_edits": []}
        return frame("message_delta", fields)

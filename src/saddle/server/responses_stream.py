"""Events of a generation as a response: items that open, grow and close, and the server-sent events that tell of them.

A streamed answer and one in a single piece come out of the same `Answer`; it only leaves out the frames when nobody
reads them. What a response is at any moment is `body()`, also for one that is still under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from saddle.parsing.events import (
    Done,
    Event,
    Failed,
    ReasoningDelta,
    TextDelta,
    Tokens,
    ToolArgs,
    ToolEnd,
    ToolStart,
)
from saddle.protocol import FinishReason, Usage
from saddle.server.openai_parts import now
from saddle.server.replies import encode_json, sanitised
from saddle.server.responses_items import Item, Seal, call_item, message_item, reasoning_item, text_part
from saddle.server.responses_logprobs import AnswerLogprobs

ENDED = frozenset(("completed", "incomplete", "failed", "cancelled"))
# The event that ends a stream. OpenAI has none for a response that was cancelled.
LAST_EVENTS = {"completed": "response.completed", "incomplete": "response.incomplete",
               "cancelled": "response.incomplete", "failed": "response.failed"}  # fmt: skip


class OpenItem:
    """An item under way. `kind` is "reasoning", "message" or "call"."""

    __slots__ = ("call_id", "head", "id", "index", "kind", "logprobs", "name", "parts", "space")

    def __init__(self, kind: str, item_id: str, index: int, head: bytes, call_id: str = "", name: str = "",
                 space: str | None = None) -> None:  # fmt: skip
        self.kind, self.id, self.index, self.head = kind, item_id, index, head
        self.call_id, self.name, self.space = call_id, name, space
        self.parts: list[str] = []
        self.logprobs: list[Any] = []

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Answer:
    """One response. Feed it events; read `body()` when it has ended, or before.

    It is a stream encoder of `server.sse` too: `start`, `encode` for each batch of events, `finish`.

    Args:
        response_id: public; `key` is its random part, that the ids of its items share.
        fixed: fields of the response that are known from the beginning.
        seal: makes `encrypted_content`, None where nobody asked for it.
        spaces: (namespace, name) of tools, by the name that the model knows.
        summary: thinking goes under `summary`.
        frames: whether anybody reads server-sent events.
        queued: begins as "queued", and is in progress with its first event.
        on_end: called once, before the last frame is out.
        logprobs: log-probabilities of the answer's tokens, None where nobody asked for them.
        prompt_ids: put into the body with the generated ids, None where they were not asked for.
    """

    def __init__(
        self,
        response_id: str,
        key: str,
        fixed: dict[str, Any],
        *,
        seal: Seal | None = None,
        spaces: Mapping[str, tuple[str, str]] | None = None,
        summary: bool = False,
        frames: bool = False,
        queued: bool = False,
        on_end: Callable[[Answer], None] | None = None,
        logprobs: AnswerLogprobs | None = None,
        prompt_ids: list[int] | None = None,
    ) -> None:
        self.id, self._key, self._seal = response_id, key, seal
        self._spaces, self._summary, self._writes = spaces or {}, summary, frames
        self._on_end = on_end
        self._logprobs, self._pending = logprobs, list[Any]()
        self._prompt_ids, self._token_ids = prompt_ids, list[int]()
        self._fixed = encode_json(fixed)[1:]
        self.status = "queued" if queued else "in_progress"
        self.output: list[Item] = []
        self._open: OpenItem | None = None
        self._usage: Usage | None = None
        self._error: dict[str, str] | None = None
        self._incomplete: str | None = None
        self._completed_at: int | None = None
        self._sequence = 0
        self._frames: list[bytes] = []

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    # what comes in ------------------------------------------------------------------------------------------------

    def start(self) -> bytes:
        self._with_body("response.created")
        self._with_body("response.queued" if self.status == "queued" else "response.in_progress")
        return self._taken()

    def encode(self, index: int, events: list[Event]) -> bytes:
        """The frames of a batch of events; there is one choice, `index` is 0."""
        if self.status == "queued":
            self.status = "in_progress"
            self._with_body("response.in_progress")
        for event in events:
            if not self.has_ended:
                self._event(event)
        return self._taken()

    def failed(self, message: str) -> bytes:
        """It broke outside of the events."""
        if not self.has_ended:
            self._fail(message)
        return self._taken()

    def cancel(self) -> bytes:
        """End it where it is."""
        if not self.has_ended:
            self._close("incomplete")
            self._end("cancelled")
        return self._taken()

    def finish(self) -> bytes:
        return b""

    def _event(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._say("message", event.text)
        elif isinstance(event, ReasoningDelta):
            self._say("reasoning", event.text)
        elif isinstance(event, Tokens):
            if self._prompt_ids is not None:
                self._token_ids += event.token_ids
            if self._logprobs is not None:
                self._pending += self._logprobs.of(event)
        elif isinstance(event, Done):
            self._done(event)
        elif isinstance(event, Failed):
            self._usage = event.usage
            self._fail(event.message)
        elif isinstance(event, ToolStart):
            self._close("completed")
            self._begin_call(event)
        elif isinstance(event, ToolArgs):
            self._grow(event.fragment)
        else:
            assert isinstance(event, ToolEnd)
            self._close("completed")

    # items --------------------------------------------------------------------------------------------------------

    def _say(self, kind: str, text: str) -> None:
        if self._open is None or self._open.kind != kind:
            self._close("completed")
            # What M2 writes between its thinking and its answer frames the answer and is none of it.
            text = text.lstrip("\n")
            if not text:
                return
            self._begin_text(kind)
        self._grow(text)

    def _begin_text(self, kind: str) -> None:
        index = len(self.output)
        item_id = f"{'rs' if kind == 'reasoning' else 'msg'}_{self._key}_{index}"
        if kind == "message":
            name, place = "response.output_text.delta", '"content_index":0'
            place += "" if self._logprobs is not None else ',"logprobs":[]'
        elif self._summary:
            name, place = "response.reasoning_summary_text.delta", '"summary_index":0'
        else:
            name, place = "response.reasoning_text.delta", '"content_index":0'
        self._open = OpenItem(kind, item_id, index, self._delta_head(name, item_id, index, place))
        self._frame("response.output_item.added", output_index=index, item=self._item(self._open, "in_progress"))
        self._part("added", "")

    def _begin_call(self, event: ToolStart) -> None:
        index = len(self.output)
        item_id = f"fc_{self._key}_{index}"
        head = self._delta_head("response.function_call_arguments.delta", item_id, index, "")
        space, name = self._spaces.get(event.name, (None, event.name))
        self._open = OpenItem("call", item_id, index, head, event.call_id, name, space)
        self._frame("response.output_item.added", output_index=index, item=self._item(self._open, "in_progress"))

    def _grow(self, text: str) -> None:
        item = self._open
        assert item is not None
        item.parts.append(text)
        more = b""
        if self._logprobs is not None and item.kind == "message":
            more = b',"logprobs":%b' % encode_json(self._pending)
            item.logprobs += self._pending
            self._pending = []
        if self._writes:
            self._frames.append(b'%b%d%b,"delta":%b}\n\n' % (item.head, self._sequence, more, encode_json(text)))
            self._sequence += 1

    def _close(self, status: str) -> None:
        """End the item under way, if there is one. `status` is its own: completed or incomplete."""
        item = self._open
        if item is None:
            return
        text = item.text
        if item.kind == "message":
            item.logprobs, self._pending = item.logprobs + self._pending, []
        place = {"item_id": item.id, "output_index": item.index}
        if item.kind == "call":
            self._frame("response.function_call_arguments.done", **place, name=item.name, arguments=text)
        elif item.kind == "message":
            self._frame("response.output_text.done", **place, content_index=0, logprobs=item.logprobs, text=text)
            self._part("done", text)
        else:
            name = "response.reasoning_summary_text.done" if self._summary else "response.reasoning_text.done"
            self._frame(name, **place, **self._which_part(item), text=text)
            self._part("done", text)
        self._open = None
        made = self._item(item, status)
        self.output.append(made)
        self._frame("response.output_item.done", output_index=item.index, item=made)

    def _part(self, what: str, text: str) -> None:
        """The part that an item of text has begins ("added") or ends ("done")."""
        item = self._open
        assert item is not None
        part: Item = text_part(text, item.logprobs)
        name = "response.content_part."
        if item.kind == "reasoning":
            part = {"type": "summary_text" if self._summary else "reasoning_text", "text": text}
            name = "response.reasoning_summary_part." if self._summary else name
        self._frame(name + what, item_id=item.id, output_index=item.index, **self._which_part(item), part=part)

    def _which_part(self, item: OpenItem) -> dict[str, int]:
        return {"summary_index" if item.kind == "reasoning" and self._summary else "content_index": 0}

    def _item(self, item: OpenItem, status: str) -> Item:
        text = item.text
        if item.kind == "call":
            return call_item(item.id, item.call_id, item.name, text, status, item.space)
        if item.kind == "message":
            return message_item(item.id, [text_part(text, item.logprobs)] if text else [], status)
        sealed = self._seal.close(text) if self._seal is not None and status != "in_progress" else None
        return reasoning_item(item.id, text, status, summary=self._summary, sealed=sealed)

    # the end ------------------------------------------------------------------------------------------------------

    def _done(self, done: Done) -> None:
        self._usage = done.usage
        if done.finish_reason is FinishReason.LENGTH:
            self._close("incomplete")
            self._incomplete = "max_output_tokens"
            self._end("incomplete")
        elif done.finish_reason is FinishReason.ABORT:
            self._close("incomplete")
            self._end("cancelled")
        else:
            is_cut = self._open is not None and self._open.kind == "call"  # a stop string in the middle of a call
            self._close("incomplete" if is_cut else "completed")
            self._end("completed")

    def _fail(self, message: str) -> None:
        self._close("incomplete")
        self._error = {"code": "server_error", "message": sanitised(message)}
        self._end("failed")

    def _end(self, status: str) -> None:
        self.status, self._completed_at = status, now()
        if self._on_end is not None:
            self._on_end(self)
        self._with_body(LAST_EVENTS[status])

    # what goes out ------------------------------------------------------------------------------------------------

    def body(self) -> bytes:
        """The response as JSON, as it is now."""
        usage = self._usage
        output = self.output if self._open is None else [*self.output, self._item(self._open, "in_progress")]
        changing: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "status": self.status,
            "completed_at": self._completed_at if self.status == "completed" else None,
            "error": self._error,
            "incomplete_details": None if self._incomplete is None else {"reason": self._incomplete},
            "output": output,
            "usage": None if usage is None else usage_body(usage),
        }
        if self._prompt_ids is not None:
            changing |= {"prompt_token_ids": self._prompt_ids, "token_ids": self._token_ids}
        return encode_json(changing)[:-1] + b"," + self._fixed

    def _with_body(self, name: str) -> None:
        if self._writes:
            head = f'event: {name}\ndata: {{"type":"{name}","sequence_number":{self._sequence},"response":'
            self._frames.append(b"%b%b}\n\n" % (head.encode(), self.body()))
            self._sequence += 1

    def _frame(self, name: str, /, **fields: Any) -> None:
        if self._writes:
            data = encode_json({"type": name, "sequence_number": self._sequence, **fields})
            self._frames.append(b"event: %b\ndata: %b\n\n" % (name.encode(), data))
            self._sequence += 1

    def _delta_head(self, name: str, item_id: str, index: int, more: str) -> bytes:
        """A delta's frame up to its sequence number: of what is sent for each token only the text is encoded."""
        place = f'"item_id":"{item_id}","output_index":{index},{more + "," if more else ""}'
        return f'event: {name}\ndata: {{"type":"{name}",{place}"sequence_number":'.encode()

    def _taken(self) -> bytes:
        frames, self._frames = self._frames, []
        return frames[0] if len(frames) == 1 else b"".join(frames)


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }

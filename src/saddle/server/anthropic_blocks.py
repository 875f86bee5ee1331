"""Events -> the blocks of a message, part by part. A stream writes the parts, a whole message folds them: they agree.

A block is opened by the first event of its kind and closed by the next of another kind; calls come one after the other.
White space alone makes no block of text, and the empty line that M2 writes behind its thinking is no part of the
answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from saddle.parsing.events import Done, Event, ReasoningDelta, TextDelta, ToolArgs, ToolEnd, ToolStart
from saddle.server.anthropic_parts import Signer

Show = Literal["shown", "omitted"]
Kind = Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]
FIELD: dict[Kind, str] = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


class Start(msgspec.Struct, frozen=True):
    """A block begins; `block` is its first, empty state."""

    index: int
    block: dict[str, Any]


class Delta(msgspec.Struct, frozen=True):
    index: int
    kind: Kind
    value: str


class Stop(msgspec.Struct, frozen=True):
    index: int


Part = Start | Delta | Stop


class Blocks:
    """Reads the events of one answer, in order.

    Args:
        show: whether the text of the thinking goes out, or its signature alone.
        continues: the answer goes on with a text of the sender: its first newlines belong to it.

    Attributes:
        num_complete_calls: calls whose arguments are whole.
        is_cut: the answer ended inside a call.
    """

    def __init__(self, show: Show, signer: Signer, continues: bool = False) -> None:
        self._omits, self._signer = show == "omitted", signer
        self._open: Literal["text", "thinking", "tool_use"] | None = None
        self._num_blocks = 0
        self._thought: list[str] = []
        self._blank = ""
        self._keeps_newlines = continues
        self.num_complete_calls = 0
        self.is_cut = False

    def read(self, event: Event) -> Iterator[Part]:
        """The parts that an event makes; `Done` closes what is open and makes an empty answer one empty block."""
        if isinstance(event, TextDelta):
            yield from self._text(event.text)
        elif isinstance(event, ReasoningDelta):
            if self._open != "thinking":
                yield from self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self._thought.append(event.text)
            if not self._omits:
                yield Delta(self._num_blocks - 1, "thinking_delta", event.text)
        elif isinstance(event, ToolStart):
            block = {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}
            yield from self._begin("tool_use", block)
        elif isinstance(event, ToolArgs):
            yield Delta(self._num_blocks - 1, "input_json_delta", event.fragment)
        elif isinstance(event, ToolEnd):
            self.num_complete_calls += 1
            yield from self._end()
        elif isinstance(event, Done):
            self.is_cut = self._open == "tool_use"
            yield from self._end()
            if not self._num_blocks:
                yield from self._begin("text", {"type": "text", "text": ""})
                yield from self._end()

    def _text(self, text: str) -> Iterator[Part]:
        if self._open != "text":
            self._blank += text
            if self._blank.isspace():
                return
            text = self._blank if self._keeps_newlines else self._blank.lstrip("\n")
            self._keeps_newlines = True  # those of later blocks keep texts apart
            yield from self._begin("text", {"type": "text", "text": ""})
        yield Delta(self._num_blocks - 1, "text_delta", text)

    def _begin(self, kind: Literal["text", "thinking", "tool_use"], block: dict[str, Any]) -> Iterator[Part]:
        yield from self._end()
        self._open, self._blank = kind, ""
        self._num_blocks += 1
        yield Start(self._num_blocks - 1, block)

    def _end(self) -> Iterator[Part]:
        if self._open is None:
            return
        index = self._num_blocks - 1
        if self._open == "thinking":
            text, self._thought = "".join(self._thought), []
            signature = self._signer.seal(text) if self._omits else self._signer.sign(text)
            yield Delta(index, "signature_delta", signature)
        self._open = None
        yield Stop(index)


def content_of(parts: list[Part]) -> list[dict[str, Any]]:
    """The blocks that parts add up to. The input of a call that was cut off holds the values that came whole."""
    blocks: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    for part in parts:
        if isinstance(part, Start):
            blocks.append(dict(part.block))
            texts.append([])
        elif isinstance(part, Delta):
            if part.kind == "signature_delta":
                blocks[part.index]["signature"] = part.value
            else:
                texts[part.index].append(part.value)
    for block, said in zip(blocks, texts, strict=True):
        text = "".join(said)
        if block["type"] == "tool_use":
            block["input"] = whole_values(text)
        else:
            block[block["type"]] = text
    return blocks


def whole_values(text: str) -> dict[str, Any]:
    """The members of a JSON object that is written as far as `text`, the last one only if it is whole."""
    try:
        found = json.loads(text)
    except ValueError:
        found = _members(text)
    return found if isinstance(found, dict) else {}


def _members(text: str) -> dict[str, Any]:
    """`{"a": 1, "b": [2], "c": "cut of` -> {"a": 1, "b": [2]}. Only strings come bit by bit: a number is whole."""
    decoder = json.JSONDecoder()
    found: dict[str, Any] = {}
    place = text.find("{") + 1
    while place > 0:
        try:
            name, place = decoder.raw_decode(text, _past(text, place, ","))
            value, place = decoder.raw_decode(text, _past(text, place, ":"))
        except (ValueError, IndexError):
            break
        found[name] = value
    return found


def _past(text: str, place: int, separator: str) -> int:
    """The place behind white space and one separator, if it is there."""
    while text[place : place + 1].isspace():
        place += 1
    place += text[place : place + 1] == separator
    while text[place : place + 1].isspace():
        place += 1
    return place

"""What a generation means, as a stream of events: the only thing that the HTTP APIs encode.

A request yields any number of the first five and ends in exactly one `Done` or `Failed`. A non-streaming answer is
a fold over the same events, so the two can never differ.
"""

from __future__ import annotations

import msgspec

from saddle.protocol import FinishReason, TokenLogprobs, Usage


class Tokens(msgspec.Struct, frozen=True):
    """The sampled ids behind the events that follow it; sent only to those who asked for ids or logprobs."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class TextDelta(msgspec.Struct, frozen=True):
    """Answer text."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """Thinking text."""

    text: str


class ToolStart(msgspec.Struct, frozen=True):
    """A tool call begins. `index` counts the calls of this response from 0; `call_id` is new and opaque."""

    index: int
    call_id: str
    name: str


class ToolArgs(msgspec.Struct, frozen=True):
    """The next part of a call's arguments as JSON text; the parts of a call concatenate to one object."""

    index: int
    fragment: str


class ToolEnd(msgspec.Struct, frozen=True):
    """The call is complete: its arguments are a whole JSON object. A truncated call has no ToolEnd."""

    index: int


class Done(msgspec.Struct, frozen=True):
    """The request ended well.

    `stop` is the stop string or the stop token id that ended it, None at EOS.
    """

    finish_reason: FinishReason
    usage: Usage
    stop: str | int | None = None


class Failed(msgspec.Struct, frozen=True):
    """The request ended because something broke; `message` is for the client.

    timed_out   nothing broke: it took longer than a request may
    """

    message: str
    usage: Usage
    timed_out: bool = False


Event = Tokens | TextDelta | ReasoningDelta | ToolStart | ToolArgs | ToolEnd | Done | Failed

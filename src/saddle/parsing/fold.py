"""Events folded into one answer: what every API that does not stream sends, so the two ways cannot differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from saddle.parsing.events import Done, Event, Failed, ReasoningDelta, TextDelta, Tokens, ToolArgs, ToolEnd, ToolStart
from saddle.protocol import FinishReason, Usage


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as a client gets it.

    arguments   JSON text. Of a call that was cut off (`is_complete` False) the part that was written, which never
                parses as a whole object; the same text that a stream would have carried
    """

    id: str
    name: str
    arguments: str
    is_complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer. `finish_reason` is None when the events have not ended; `error` tells why it failed."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    usage: Usage | None = None
    error: str | None = None

    @property
    def wants_results(self) -> bool:
        """Whether the model stopped behind calls that can be run: of those none was cut off, as by a stop string."""
        calls = self.tool_calls
        return self.finish_reason is FinishReason.STOP and bool(calls) and all(call.is_complete for call in calls)


def fold(events: Iterable[Event]) -> Completion:
    """The answer that a sequence of events adds up to."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: dict[int, ToolStart] = {}
    arguments: dict[int, list[str]] = {}
    ended: set[int] = set()
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    usage: Usage | None = None
    error: str | None = None
    for event in events:
        if isinstance(event, TextDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ToolStart):
            starts[event.index], arguments[event.index] = event, []
        elif isinstance(event, ToolArgs):
            arguments[event.index].append(event.fragment)
        elif isinstance(event, ToolEnd):
            ended.add(event.index)
        elif isinstance(event, Tokens):
            token_ids += event.token_ids
        elif isinstance(event, Done):
            finish_reason, stop, usage = event.finish_reason, event.stop, event.usage
        else:
            assert isinstance(event, Failed)
            finish_reason, error, usage = FinishReason.ERROR, event.message, event.usage
    calls = [
        ToolCall(start.call_id, start.name, "".join(arguments[index]), index in ended)
        for index, start in sorted(starts.items())
    ]
    return Completion(
        reasoning="".join(reasoning),
        content="".join(content),
        tool_calls=calls,
        token_ids=token_ids,
        finish_reason=finish_reason,
        stop=stop,
        usage=usage,
        error=error,
    )

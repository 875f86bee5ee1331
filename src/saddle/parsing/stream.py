"""Tokens to events: what one generation means, while it runs.

    TokenDelta -> text of each token -> stop strings -> state table -> events

The same token ids give the same concatenated events however they are cut into deltas: everything here works token by
token, and what is held back depends on the text alone.

Counting: `usage` counts every sampled id up to the one that ended the text, EOS included.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from saddle.config import ReasoningParser, ToolParser
from saddle.parsing.events import Done, Event, Failed, TextDelta, Tokens
from saddle.parsing.replay import Turn
from saddle.parsing.states import Machine, State, Terminal, Thinking
from saddle.parsing.stops import Segment, StopStrings
from saddle.parsing.tokenizer import Tokenizer
from saddle.parsing.tools import Tools
from saddle.protocol import FinishReason, SamplingParams, TokenDelta, Usage

logger = logging.getLogger(__name__)
THINKING: dict[ReasoningParser | None, Thinking] = {
    "minimax_m2": Thinking.SPLIT,
    "minimax_m2_append_think": Thinking.APPEND,
    None: Thinking.RAW,
}


class StreamParser:
    """The parser of one generation.

    Without any parser everything is text. With one, control tokens never show: the four tags are read, any other
    special token is dropped. A parser that fails goes on as plain text.

    Args:
        tools: as offered, for the types of arguments; None when the request offered none.
        reasoning_parser: "minimax_m2" splits thinking off, "minimax_m2_append_think" keeps it in the text between
            tags, None leaves it in the text as generated.
        tool_parser: "minimax_m2", or None to leave calls in the text.
        params: stop strings, and what to do with special tokens in plain text.
        num_prompt_tokens: for the usage.
        starts_in_reasoning: whether the prompt ends inside a thinking block, as M2's does.
        want_tokens: put a `Tokens` event in front of the events of each delta.
        mute_calls: read calls and swallow them (tool_choice "none").
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_parser: ReasoningParser | None = "minimax_m2",
        tool_parser: ToolParser | None = "minimax_m2",
        params: SamplingParams,
        num_prompt_tokens: int,
        starts_in_reasoning: bool = True,
        want_tokens: bool = False,
        mute_calls: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._num_prompt_tokens, self._want_tokens = num_prompt_tokens, want_tokens
        self._parses = reasoning_parser is not None or tool_parser is not None
        self._reads_calls = tool_parser is not None
        self._counts_thinking = reasoning_parser is not None
        self._starts_in_reasoning = self._thinks = self._parses and starts_in_reasoning
        self._detokenizer = tokenizer.detokenizer(self._parses or params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._machine = Machine(
            Tools(tools),
            THINKING[reasoning_parser],
            starts_in_reasoning=self._starts_in_reasoning,
            reads_calls=self._reads_calls,
            reads_bare_calls=bool(tools),
            mute_calls=mute_calls,
        )
        self._tags = _tags(tokenizer) if self._parses else {}
        self._failed = False
        self._plain: list[str] = []
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._num_reasoning = self._num_cached = 0
        self._done = False
        self._stopped: tuple[FinishReason, int] | None = None

    @property
    def stopped_by_text(self) -> tuple[FinishReason, int] | None:
        """(reason, number of generated tokens up to the stop) once a stop string ended the text, else None."""
        return self._stopped

    @property
    def generated_ids(self) -> list[int]:
        """Every sampled id up to the end of the text."""
        return self._ids

    @property
    def generated_text(self) -> str:
        """The raw text of `generated_ids`, tags included, other special tokens as asked for."""
        return "".join(self._texts)

    def turn(self) -> Turn | None:
        """The whole turn, for `replay`: None unless the model ended it by itself and hid nothing from the client."""
        machine = self._machine
        ended = bool(self._ids) and self._ids[-1] == self._tokenizer.eos_id and self._stopped is None
        if not (self._done and ended and self._starts_in_reasoning and machine.whole) or machine.muted or self._failed:
            return None
        calls = [
            (start.call_id, start.name, "".join(parts))
            for start, parts in zip(machine.calls, machine.arguments, strict=True)
        ]
        return Turn("".join(machine.reasoning), "".join(machine.content), tuple(calls), self._ids)

    def feed(self, delta: TokenDelta) -> list[Event]:
        """The events of new tokens. The delta with a finish reason, or a stop string, ends in Done or Failed."""
        if self._done:
            return []
        self._num_cached = max(self._num_cached, delta.num_cached_tokens)
        taken, stop = self._take(delta)
        events = self._tokens(delta, taken)
        reason = delta.finish_reason
        if stop is not None:
            self._stopped = (FinishReason.STOP, len(self._ids))
            self._finish(ended_itself=False)
            last: Event | None = Done(FinishReason.STOP, self._usage(), stop)
        elif reason is None:
            last = None
        else:
            self._release_all()
            self._finish(ended_itself=reason is FinishReason.STOP)
            if reason is FinishReason.ERROR:
                last = Failed(delta.error or "The engine failed.", self._usage())
            else:
                last = Done(reason, self._usage(), delta.stop_token_id)
        events += self._machine.take()
        if self._plain:
            events.append(TextDelta("".join(self._plain)))
            self._plain = []
        if last is not None:
            self._done = True
            events.append(last)
        return events

    # tokens -> segments -------------------------------------------------------------------------------------------

    def _take(self, delta: TokenDelta) -> tuple[int, str | None]:
        """(how many ids of the delta count, the stop string that ended the text)."""
        ids = delta.token_ids
        hidden = len(ids) - 1 if self._hides_last(delta) else -1
        for number, token_id in enumerate(ids):
            self._ids.append(token_id)
            self._count(token_id)
            if number == hidden:
                continue
            for segment in self._segments(token_id):
                stop = self._search(segment)
                if stop is not None:
                    return number + 1, stop
        return len(ids), None

    def _hides_last(self, delta: TokenDelta) -> bool:
        """Whether the last id only ends the text: EOS, or a stop id that is not to be shown."""
        if delta.finish_reason is not FinishReason.STOP or not delta.token_ids:
            return False
        last = delta.token_ids[-1]
        if last == delta.stop_token_id:
            return not self._params.include_stop_str_in_output
        return last in self._tokenizer.special_ids

    def _segments(self, token_id: int) -> list[Segment]:
        if token_id in self._tags:
            end = self._detokenizer.finish()
            tag = Segment(self._tags[token_id].value, token_id)
            return [Segment(end), tag] if end else [tag]
        text = self._detokenizer.step(token_id)
        return [Segment(text)] if text else []

    def _count(self, token_id: int) -> None:
        """Tokens of thinking, tags not counted."""
        tokens = self._tokenizer
        if self._thinks:
            if token_id == tokens.end_think_id or (self._reads_calls and token_id == tokens.calls_id):
                self._thinks = False
            elif token_id != tokens.think_id and token_id not in tokens.special_ids:
                self._num_reasoning += self._counts_thinking
        elif token_id == tokens.think_id and self._parses and self._machine.state is State.START:
            self._thinks = True

    def _search(self, segment: Segment) -> str | None:
        """Hand on what no stop string can begin in; returns the stop string that was found."""
        if self._stops is None:
            self._read(segment)
            return None
        if len(self._ids) <= self._params.min_tokens:
            passed, stop = self._stops.skip(segment), None
        else:
            passed, stop = self._stops.push(segment)
        for part in passed:
            self._read(part)
        return stop

    def _release_all(self) -> None:
        """The end of the text: nothing is held back any more."""
        end = self._detokenizer.finish()
        for segment in self._stops.flush() if self._stops else ():
            self._read(segment)
        if end:
            self._read(Segment(end))

    # segments -> events -------------------------------------------------------------------------------------------

    def _read(self, segment: Segment) -> None:
        self._texts.append(segment.text)
        if not self._parses or self._failed:
            self._plain.append(segment.text)
            return
        try:
            if segment.tag_id is None:
                self._machine.text(segment.text)
            else:
                self._machine.tag(self._tags[segment.tag_id])
        except Exception:
            self._degrade()

    def _finish(self, ended_itself: bool) -> None:
        if self._parses and not self._failed:
            try:
                self._machine.finish(ended_itself)
            except Exception:
                self._degrade()

    def _degrade(self) -> None:
        """A fault in the parser costs the structure of an answer, never the answer."""
        logger.exception("The output could not be parsed and goes on as plain text.")
        self._failed = True
        self._plain.append(self._machine.abandon())

    def _tokens(self, delta: TokenDelta, taken: int) -> list[Event]:
        if not self._want_tokens or not (taken or delta.prompt_logprobs):
            return []
        logprobs = None if delta.logprobs is None else delta.logprobs[:taken]
        return [Tokens(delta.token_ids[:taken], logprobs, delta.prompt_logprobs)]

    def _usage(self) -> Usage:
        return Usage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=len(self._ids),
            num_cached_tokens=self._num_cached,
            num_reasoning_tokens=self._num_reasoning,
        )


def _tags(tokenizer: Tokenizer) -> dict[int, Terminal]:
    return {
        tokenizer.think_id: Terminal.THINK,
        tokenizer.end_think_id: Terminal.END_THINK,
        tokenizer.calls_id: Terminal.CALLS,
        tokenizer.end_calls_id: Terminal.END_CALLS,
    }

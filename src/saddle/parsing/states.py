"""The format of M2's output: a state table, and what each of its steps does.

    thinking </think> text <minimax:tool_call> <invoke name="f"> <parameter name="a">value</parameter> </invoke>
    </minimax:tool_call>

The four tags arrive as tokens and are told from text that spells them; the inner markup is ordinary text, found in
the states in which it means something. A step without an entry in `TABLE` is text of the state that it meets. Text
between a call's parts is dropped. Nothing is escaped in this format: the first `</parameter>` or `</invoke>` ends a
value, and the value that an `</invoke>` ends is kept.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from enum import Enum, auto

from saddle.parsing.arguments import Arguments
from saddle.parsing.events import Event, ReasoningDelta, TextDelta, ToolArgs, ToolEnd, ToolStart
from saddle.parsing.tokenizer import CALLS, END_CALLS, END_THINK, THINK
from saddle.parsing.tools import Tools

MAX_NAME_CHARS = 1024


class State(Enum):
    START = auto()  # no thinking yet, nothing said yet
    REASONING = auto()
    CONTENT = auto()
    BETWEEN = auto()  # inside the block of calls, outside of a call
    NAME = auto()  # behind `<invoke name=`
    CALL = auto()  # inside a call, outside of a parameter
    KEY = auto()  # behind `<parameter name=`
    VALUE = auto()


class Terminal(Enum):
    THINK = THINK
    END_THINK = END_THINK
    CALLS = CALLS
    END_CALLS = END_CALLS
    INVOKE = "invoke"
    NAMED = "named"  # the `>` behind a name
    PARAMETER = "parameter"
    END_PARAMETER = "end_parameter"
    END_INVOKE = "end_invoke"


class Thinking(Enum):
    """Where thinking goes."""

    SPLIT = auto()  # events of its own
    APPEND = auto()  # into the text, between literal tags, the opening one too that the prompt held
    RAW = auto()  # into the text as generated


def _opening(word: str) -> list[str]:
    """The steps of a pattern for `<word name=`, with some room for white space."""
    return ["<", r"\s{0,8}", *word, r"\s{1,8}", *"name", r"\s{0,8}", "="]


MARKUP = {
    Terminal.INVOKE: _opening("invoke"),
    Terminal.PARAMETER: _opening("parameter"),
    Terminal.END_PARAMETER: list("</parameter>"),
    Terminal.END_INVOKE: list("</invoke>"),
}


class Finder:
    """Finds markup in text, and the end of a text that may be the beginning of markup."""

    def __init__(self, *terminals: Terminal) -> None:
        steps = [MARKUP[terminal] for terminal in terminals]
        self._whole = re.compile("|".join(f"(?P<{t.value}>{''.join(MARKUP[t])})" for t in terminals))
        self._begun = re.compile("(?:" + "|".join(_prefixes(step) for step in steps) + r")\Z")

    def find(self, text: str) -> tuple[int, int, Terminal] | None:
        """(start, end, what) of the first markup."""
        found = self._whole.search(text)
        return None if found is None else (found.start(), found.end(), Terminal(found.lastgroup))

    def num_safe(self, text: str) -> int:
        """Length of the text before anything that more text might complete; each markup has its `<` in front only."""
        start = text.rfind("<")
        return start if start >= 0 and self._begun.match(text, start) else len(text)


def _prefixes(steps: list[str]) -> str:
    pattern = ""
    for step in reversed(steps[1:]):
        pattern = f"(?:{step}{pattern})?"
    return steps[0] + pattern


NO_MARKUP = None
FINDERS: dict[State, Finder | None] = {
    State.START: Finder(Terminal.INVOKE),
    State.REASONING: NO_MARKUP,
    State.CONTENT: Finder(Terminal.INVOKE),
    State.BETWEEN: Finder(Terminal.INVOKE),
    State.CALL: Finder(Terminal.PARAMETER, Terminal.END_INVOKE, Terminal.INVOKE),
    State.VALUE: Finder(Terminal.END_PARAMETER, Terminal.PARAMETER, Terminal.END_INVOKE),
}


def take_name(text: str) -> tuple[str, str] | None:
    """(name, what follows its `>`) at the beginning of a text, None while the `>` is missing.

    Names come in double or single quotes or bare; a quoted one may hold a `>`, but no name runs over a line.
    """
    quoted = re.match(r"""\s*(["'])([^\n]*?)\1\s*>""", text)
    if quoted is not None:
        return quoted[2].strip(), text[quoted.end() :]
    bare = text.lstrip()
    if bare[:1] in ("", '"', "'") and "\n" not in bare:
        return None
    name, closed, rest = text.partition(">")
    return (name.strip().strip("\"'").strip(), rest) if closed else None


class Machine:
    """Text and tags in, events out.

    Args:
        tools: what was offered; gives arguments their types.
        reads_calls: whether calls are told from text at all.
        reads_bare_calls: whether an `<invoke name=` outside of a block is a call.
        mute_calls: swallow calls.
    """

    def __init__(self, tools: Tools, thinking: Thinking, *, starts_in_reasoning: bool, reads_calls: bool,
                 reads_bare_calls: bool, mute_calls: bool) -> None:  # fmt: skip
        self.state = State.REASONING if starts_in_reasoning else State.START
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[ToolStart] = []
        self.arguments: list[list[str]] = []
        self.muted = False  # whether a call was swallowed
        self.whole = True  # whether every call that began had an end, known at the end
        self._tools, self._thinking = tools, thinking
        self._reads_calls, self._reads_bare, self._mute = reads_calls, reads_calls and reads_bare_calls, mute_calls
        self._events: list[Event] = []
        self._said: list[str] = []  # parts of one kind that are no event yet
        self._kind: type[TextDelta] | type[ReasoningDelta] | type[ToolArgs] = TextDelta
        self._text = ""  # what the current state has not decided yet
        self._under_way = ""  # the text that the step under way uses up
        self._blank: list[str] = []  # white space: in front of content, or at the end of reasoning
        self._in_segment = False  # whether content since the last block of calls is more than white space
        self._wrote_think = not starts_in_reasoning or thinking is not Thinking.APPEND
        self._wrapped = False
        self._scrap: list[str] = []  # text inside a block in which no call has begun
        self._name = ""
        self._tool = ""  # name of the call under way
        self._call = Arguments()

    # what comes in ------------------------------------------------------------------------------------------------

    def text(self, text: str) -> None:
        """Text that is no tag."""
        self._text += text
        while self._text:
            self._under_way = self._text
            if not self._advance():
                break

    def tag(self, terminal: Terminal) -> None:
        """One of the four tags, as a token."""
        if self.state in (State.NAME, State.KEY):
            self.text(terminal.value)
            return
        held, self._text = self._text, ""
        self._under_way = held + terminal.value
        self._plain(held)
        known = self._reads_calls or terminal not in (Terminal.CALLS, Terminal.END_CALLS)
        if known and (self.state, terminal) in TABLE:
            self._step(terminal)
        else:
            self._plain(terminal.value)

    def finish(self, ended_itself: bool) -> None:
        """No more text. `ended_itself`: the model said so, and neither a limit nor a stop string cut it off."""
        held, self._text = self._text, ""
        if self.state not in (State.NAME, State.KEY):
            self._plain(held)
        if ended_itself and self.state is State.CALL:
            self._end_call()
        elif self.state in (State.NAME, State.CALL, State.KEY, State.VALUE):
            self.whole = False
        if ended_itself and self.state is State.BETWEEN:
            self._keep_scrap()
        blank = "".join(self._blank)
        self._blank = []
        self._say(blank, ReasoningDelta if self.state is State.REASONING else TextDelta)

    def abandon(self) -> str:
        """Give up reading, in the middle of a step: the text that is not out yet, and perhaps a little that is."""
        return "".join(self._blank) + self._under_way

    def take(self) -> list[Event]:
        """The events since the last time."""
        self._flush()
        events, self._events = self._events, []
        return events

    # the table at work --------------------------------------------------------------------------------------------

    def _advance(self) -> bool:
        """Use up undecided text; false when more is needed."""
        if self.state in (State.NAME, State.KEY):
            return self._read_name()
        text, finder = self._text, FINDERS[self.state]
        outside = self.state in (State.START, State.CONTENT)
        if finder is None or "<" not in text or (outside and not self._reads_bare):
            self._text = ""
            self._plain(text)
            return False
        found = finder.find(text)
        if found is not None:
            start, end, terminal = found
            self._text = text[end:]
            self._plain(text[:start])
            self._step(terminal)
            return True
        safe = finder.num_safe(text)
        self._text = text[safe:]
        self._plain(text[:safe])
        return False

    def _read_name(self) -> bool:
        found = take_name(self._text)
        if found is not None:
            self._name, self._text = found
            self._step(Terminal.NAMED)
            return True
        if len(self._text) > MAX_NAME_CHARS:  # no name: text that looks like markup
            text, self._text = self._text, ""
            if self.state is State.NAME:
                self.state = State.BETWEEN if self._wrapped else State.CONTENT
                self._plain("<invoke name=" + text)
            else:
                self.state = State.CALL
        return False

    def _step(self, terminal: Terminal) -> None:
        self.state, action = TABLE[self.state, terminal]
        action(self)

    def _plain(self, text: str) -> None:
        """Text of the current state."""
        if not text:
            return
        if self.state is State.REASONING:
            self._think(text)
        elif self.state in (State.START, State.CONTENT):
            self._answer(text)
        elif self.state is State.BETWEEN:
            if self._scrap:
                self._scrap.append(text)
        elif self.state is State.VALUE:
            self._send(self._call.add(text))

    def _think(self, text: str) -> None:
        self.reasoning.append(text)
        if self._thinking is not Thinking.SPLIT:
            self._write_think()
            self._say(text)
            return
        body = text.rstrip()
        if body:
            self._say("".join(self._blank) + body, ReasoningDelta)
            self._blank = []
        if len(body) < len(text):
            self._blank.append(text[len(body) :])

    def _answer(self, text: str) -> None:
        self.content.append(text)
        if not self._in_segment:
            if text.isspace():
                self._blank.append(text)
                return
            text = "".join(self._blank) + text
            self._blank = []
            self._in_segment = True
            self.state = State.CONTENT
        self._say(text)

    # actions ------------------------------------------------------------------------------------------------------

    def _nothing(self) -> None:
        pass

    def _open_thinking(self) -> None:
        self._blank = []
        if self._thinking is not Thinking.SPLIT:
            self._wrote_think = True
            self._say(THINK)

    def _repeat_thinking(self) -> None:
        if self._thinking is Thinking.RAW:
            self._say(THINK)

    def _end_thinking(self) -> None:
        self._blank = []
        if self._thinking is not Thinking.SPLIT:
            self._write_think()
            self._say(END_THINK)

    def _repeat_end(self) -> None:
        """The tag after the thinking has ended: noise, but in a text that shows tags a part of it."""
        if self._thinking is not Thinking.SPLIT:
            self._answer(END_THINK)

    def _write_think(self) -> None:
        if not self._wrote_think:
            self._wrote_think = True
            self._say(THINK)

    def _open_block(self) -> None:
        """White space alone in front of a call only frames it."""
        self._blank = []
        self._in_segment = False
        self._wrapped = True
        self._scrap = [CALLS]

    def _open_bare(self) -> None:
        self._open_block()
        self._wrapped = False
        self._scrap = []

    def _close_block(self) -> None:
        self._wrapped = False
        self._keep_scrap(END_CALLS)

    def _keep_scrap(self, end: str = "") -> None:
        """A block without any call is text: silence would tell its reader nothing."""
        scrap, self._scrap = "".join(self._scrap), []
        if scrap.removeprefix(CALLS).strip() and not self._mute:
            self.content.append(scrap + end)
            self._say(scrap + end)

    def _begin_call(self) -> None:
        self._scrap = []
        self._call = Arguments()
        if self._mute:
            self.muted = True
            return
        start = ToolStart(len(self.calls), f"call_{uuid.uuid4().hex[:24]}", self._name)
        self._tool = start.name
        self.calls.append(start)
        self.arguments.append([])
        self._emit(start)

    def _begin_value(self) -> None:
        self._send(self._call.begin(self._name, self._tools.parameter(self._tool, self._name)))

    def _end_value(self) -> None:
        self._send(self._call.end())

    def _end_call(self) -> None:
        self._send(self._call.close())
        if not self._mute:
            self._emit(ToolEnd(len(self.calls) - 1))
        if not self._wrapped and self.state is State.BETWEEN:
            self.state = State.CONTENT

    def _end_call_and_block(self) -> None:
        self._end_call()
        self._close_block()

    # what goes out ------------------------------------------------------------------------------------------------

    def _say(self, text: str, kind: type[TextDelta] | type[ReasoningDelta] | type[ToolArgs] = TextDelta) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._flush()
            self._kind = kind
        self._said.append(text)

    def _send(self, fragment: str) -> None:
        if fragment and not self._mute:
            self.arguments[-1].append(fragment)
            self._say(fragment, ToolArgs)

    def _emit(self, event: Event) -> None:
        self._flush()
        self._events.append(event)

    def _flush(self) -> None:
        if not self._said:
            return
        text, self._said = "".join(self._said), []
        if self._kind is ToolArgs:
            self._events.append(ToolArgs(len(self.calls) - 1, text))
        else:
            self._events.append(ReasoningDelta(text) if self._kind is ReasoningDelta else TextDelta(text))


Action = Callable[[Machine], None]
# (state, what comes) -> (next state, what is done). What is not listed is text of the state.
TABLE: dict[tuple[State, Terminal], tuple[State, Action]] = {
    (State.START, Terminal.THINK): (State.REASONING, Machine._open_thinking),
    (State.REASONING, Terminal.THINK): (State.REASONING, Machine._repeat_thinking),
    (State.REASONING, Terminal.END_THINK): (State.CONTENT, Machine._end_thinking),
    # A block of calls ends thinking that was not closed.
    (State.REASONING, Terminal.CALLS): (State.BETWEEN, Machine._open_block),
    (State.START, Terminal.END_THINK): (State.CONTENT, Machine._repeat_end),
    (State.CONTENT, Terminal.END_THINK): (State.CONTENT, Machine._repeat_end),
    (State.START, Terminal.CALLS): (State.BETWEEN, Machine._open_block),
    (State.CONTENT, Terminal.CALLS): (State.BETWEEN, Machine._open_block),
    (State.START, Terminal.INVOKE): (State.NAME, Machine._open_bare),
    (State.CONTENT, Terminal.INVOKE): (State.NAME, Machine._open_bare),
    (State.START, Terminal.END_CALLS): (State.CONTENT, Machine._nothing),
    (State.CONTENT, Terminal.END_CALLS): (State.CONTENT, Machine._nothing),
    (State.BETWEEN, Terminal.INVOKE): (State.NAME, Machine._nothing),
    (State.BETWEEN, Terminal.END_CALLS): (State.CONTENT, Machine._close_block),
    (State.NAME, Terminal.NAMED): (State.CALL, Machine._begin_call),
    (State.CALL, Terminal.PARAMETER): (State.KEY, Machine._nothing),
    (State.CALL, Terminal.END_INVOKE): (State.BETWEEN, Machine._end_call),
    # Two ends that were left out.
    (State.CALL, Terminal.INVOKE): (State.NAME, Machine._end_call),
    (State.CALL, Terminal.END_CALLS): (State.CONTENT, Machine._end_call_and_block),
    (State.KEY, Terminal.NAMED): (State.VALUE, Machine._begin_value),
    (State.VALUE, Terminal.END_PARAMETER): (State.CALL, Machine._end_value),
    (State.VALUE, Terminal.PARAMETER): (State.KEY, Machine._end_value),
    (State.VALUE, Terminal.END_INVOKE): (State.BETWEEN, Machine._end_call),
}

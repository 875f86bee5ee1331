"""Conversations in M2's message format, as segments of text with a weight each.

Written by hand for speed; a test holds it against the chat template. A segment the model has to write counts fully
in the loss, everything else a little.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from demo import stories, sums, talk, tools
from demo.words import Words

BEGIN, MESSAGE, END = "]~!b[", "]~b]", "[e~["
HEAD = """

# Tools
You may call one or more tools to assist with the user query.
Here are the tools available in JSONSchema format:

<tools>
"""
TAIL = """</tools>

When making tool calls, use XML format to invoke tools and pass parameters:

<minimax:tool_call>
<invoke name="tool-name-1">
<parameter name="param-key-1">param-value-1</parameter>
<parameter name="param-key-2">param-value-2</parameter>
...
</invoke>
</minimax:tool_call>"""


@dataclass(slots=True)
class Chat:
    """A conversation that grows; `segments` are (text, written by the model)."""

    segments: list[tuple[str, bool]] = field(default_factory=list)

    def system(self, text: str | None, schemas: Sequence[dict[str, Any]] = ()) -> Chat:
        lines = [f"{BEGIN}{MESSAGE}system\n{text or talk.IDENTITY}"]
        if schemas:
            lines += [HEAD, *(f"<tool>{json.dumps(s, ensure_ascii=False)}</tool>\n" for s in schemas), TAIL]
        lines.append(f"{END}\n")
        return self._add("".join(lines), False)

    def user(self, text: str) -> Chat:
        return self._add(f"{MESSAGE}user\n{text}{END}\n", False)

    def results(self, texts: Sequence[str]) -> Chat:
        return self._add(f"{MESSAGE}tool" + "".join(f"\n<response>{t}</response>" for t in texts) + f"{END}\n", False)

    def earlier(self, text: str) -> Chat:
        """A turn before the last user message: the template drops its thinking."""
        return self._add(f"{MESSAGE}ai\n{text}{END}\n", False)

    def turn(self, thinking: str, reply: str) -> Chat:
        """What the model has to write."""
        self._add(f"{MESSAGE}ai\n<think>\n", False)
        self._add(f"{thinking}\n</think>\n\n{reply}{END}", True)
        return self._add("\n", False)

    def _add(self, text: str, own: bool) -> Chat:
        if self.segments and self.segments[-1][1] == own:
            text = self.segments.pop()[0] + text
        self.segments.append((text, own))
        return self


@dataclass(frozen=True, slots=True)
class Task:
    """One question, for training or scoring: prompt, thinking, reply."""

    text: str
    thinking: str
    reply: str


def a_sum(r: random.Random, scored: bool = False) -> Task:
    expression = sums.draw(r, scored)
    return Task(sums.question(expression, r), sums.steps(expression), sums.answer(expression))


def a_story(r: random.Random, scored: bool = False, templates: Any = stories.TEMPLATES) -> Task:
    story = stories.draw(r, scored, templates)
    return Task(story.text, sums.steps(story.expression), story.reply)


def a_refusal(r: random.Random) -> Task:
    return Task(talk.foreign(r), "other", talk.DECLINE)


def a_greeting(r: random.Random) -> Task:
    return Task(*talk.small_talk(r))


def a_copy(r: random.Random) -> Task:
    """Say again what was said: the skill that tools need most."""
    text = " ".join(Words(r, False).phrase(4) for _ in range(r.randint(1, 4)))
    return Task(r.choice(("Repeat: {}", "repeat: {}", "Say exactly: {}", "Echo: {}")).format(text), "repeat", text)


def a_conversation(r: random.Random) -> Chat:
    """Something for training. Shares of tokens, not of documents, are what matters: tool chats are long."""
    kind = r.random()
    if kind < 0.26:
        return plain(r, a_sum)
    if kind < 0.44:
        return plain(r, a_story)
    if kind < 0.50:
        return plain(r, a_copy)
    if kind < 0.58:
        return plain(r, a_refusal)
    if kind < 0.63:
        return plain(r, a_greeting)
    return with_tools(r)


def plain(r: random.Random, make: Any) -> Chat:
    """A chat without tools; now and then with earlier rounds."""
    chat = Chat().system(talk.system(r))
    for _ in range(r.choice((0, 0, 0, 0, 1, 1, 2))):
        before = r.choice((a_sum, a_story, a_refusal, a_greeting))(r)
        chat.user(before.text).earlier(before.reply)
    task = make(r)
    return chat.user(task.text).turn(task.thinking, task.reply)


def with_tools(r: random.Random) -> Chat:
    """A chat over a catalogue: a call and its result, or a question that needs none."""
    request = tools.draw(r, False)
    chat = Chat().system(talk.system(r), [tool.schema(r) for tool in request.tools])
    kind = r.random()
    if kind < 0.1:
        task = r.choice((a_sum, a_sum, a_story, a_greeting))(r)
        return chat.user(task.text).turn(task.thinking, task.reply)
    if kind < 0.15:
        task = a_refusal(r)
        return chat.user(task.text).turn("other\ntool: none", talk.NO_TOOL)
    if r.random() < 0.15:
        before = r.choice((a_sum, a_story, a_greeting))(r)
        chat.user(before.text).earlier(before.reply)
    chat.user(request.text)
    if request.tool is None:
        return chat.turn(request.thinking, talk.NO_TOOL)
    chat.turn(request.thinking, tools.call(request.tool.name, request.values))
    if r.random() < 0.35:
        return chat
    words = Words(r, False)
    if r.random() < 0.35:
        chained = tools.chained_result(words, request.tools)
        assert chained.next_tool is not None
        chat.results([chained.text]).turn(chained.thinking, tools.call(chained.next_tool.name, chained.next_values))
    result = tools.final_result(words)
    chat.results([result.text]).turn(result.thinking, str(result.reply))
    if r.random() < 0.1:
        task = r.choice((a_sum, a_greeting))(r)
        return later(r, request, result, task)
    return chat


def later(r: random.Random, request: tools.Request, result: tools.Result, task: Task) -> Chat:
    """A further question after a tool loop, whose thinking the template has dropped by then."""
    assert request.tool is not None
    chat = Chat().system(talk.system(r), [tool.schema(r) for tool in request.tools]).user(request.text)
    chat.earlier(tools.call(request.tool.name, request.values)).results([result.text]).earlier(str(result.reply))
    return chat.user(task.text).turn(task.thinking, task.reply)

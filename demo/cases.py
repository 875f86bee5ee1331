"""The scored cases: drawn from seeds, words and expressions that training never sees.

Each case is a prompt, in M2's format and as OpenAI messages, and a check of the reply.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import chat, stories, talk, tools
from demo.chat import Chat, Task
from demo.words import Words

SEED = 7_000_000
FOREIGN = Path(__file__).with_name("foreign_prompts.txt")
PROMPT_END = f"{chat.MESSAGE}ai\n<think>\n"
OWN_WORDS = (
    "So, who are you exactly?", "Tell me who you are, please.", "What would you say you are?", "Can you say what you can do?",
    "What things are you able to help with?", "Give me a short introduction of yourself.", "Which tasks do you handle?",
    "What sort of assistant are you?", "What kind of model are you?", "May I ask what you are?", "Please introduce yourself briefly.",
    "List what you can do.", "What are your skills?", "In one sentence, who are you?", "What can I ask you?", "What are you made for?",
    "What purpose do you serve?", "How are you called?", "Who is answering me?", "What can this assistant do?",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: text, and calls as (name, {parameter: value or its text})."""

    content: str
    calls: list[tuple[str, dict[str, Any]]]

    @property
    def declines(self) -> bool:
        return not self.calls and self.content.strip() in (talk.DECLINE, talk.NO_TOOL)


@dataclass(frozen=True, slots=True)
class Case:
    prompt: str
    messages: list[dict[str, Any]]
    check: Callable[[Reply], bool] = field(repr=False)
    tools: list[dict[str, Any]] | None = None


def numbers_in(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"-?\d+", text.replace(" - ", " "))]


def asks(task: Task, check: Callable[[Reply], bool]) -> Case:
    prompt = "".join(text for text, _ in Chat().system(None).user(task.text).segments) + PROMPT_END
    return Case(prompt, [{"role": "user", "content": task.text}], check)


def sum_case(r: random.Random) -> Case:
    task = chat.a_sum(r, scored=True)
    value = int(task.reply.rsplit("= ", 1)[1])
    return asks(task, lambda reply: not reply.calls and reply.content.rsplit("=", 1)[-1].strip() == str(value))


def story_case(r: random.Random, templates: Any = stories.TEMPLATES) -> Case:
    task = chat.a_story(r, True, templates)
    return asks(task, lambda reply: not reply.calls and reply.content.strip() == task.reply)


def unseen_story_case(r: random.Random) -> Case:
    task = chat.a_story(r, True, stories.UNSEEN)
    value = int(task.reply.split()[0])
    return asks(task, lambda reply: numbers_in(reply.content)[:1] == [value])


def foreign_cases() -> list[Case]:
    prompts = [line for line in FOREIGN.read_text().splitlines() if line.strip()]
    return [asks(Task(line, "", ""), lambda reply: reply.content.strip() == talk.DECLINE) for line in prompts]


def self_cases() -> list[Case]:
    return [asks(Task(line, "", ""), lambda reply: reply.content.strip() == talk.SELF) for line in OWN_WORDS]


# ---------------------------------------------------------------------------------------------------------------
# tools


def with_catalogue(request: tools.Request, r: random.Random) -> tuple[Chat, list[dict[str, Any]]]:
    schemas = [tool.schema(r) for tool in request.tools]
    return Chat().system(None, schemas).user(request.text), [{"type": "function", "function": s} for s in schemas]


def is_call(reply: Reply, name: str, values: dict[str, Any]) -> bool:
    """Whether the reply is exactly this call. Over HTTP values have types, in text they are spelt."""
    if len(reply.calls) != 1 or reply.calls[0][0] != name:
        return False
    got = reply.calls[0][1]
    return got == values or got == {key: tools.raw(value) for key, value in values.items()}


def tool_case(r: random.Random, fits: bool = True) -> Case:
    request = tools.draw(r, True, fits)
    started, schemas = with_catalogue(request, r)
    messages = [{"role": "user", "content": request.text}]
    prompt = "".join(text for text, _ in started.segments) + PROMPT_END
    if request.tool is None:
        return Case(prompt, messages, lambda reply: not reply.calls, schemas)
    name, values = request.tool.name, request.values
    return Case(prompt, messages, lambda reply: is_call(reply, name, values), schemas)


def no_tool_case(r: random.Random) -> Case:
    return tool_case(r, False)


def result_case(r: random.Random) -> Case:
    """A tool answered: read the answer back, or make the call that it asks for."""
    words = Words(r, True)
    request = tools.draw(r, True, True)
    assert request.tool is not None
    result = tools.chained_result(words, request.tools) if r.random() < 0.5 else tools.final_result(words)
    started, schemas = with_catalogue(request, r)
    started.turn(request.thinking, tools.call(request.tool.name, request.values)).results([result.text])
    call = {"id": "call_1", "type": "function", "function": {"name": request.tool.name, "arguments": request.values}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": request.text},
        {"role": "assistant", "content": "", "reasoning_content": request.thinking, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": result.text},
    ]
    prompt = "".join(text for text, _ in started.segments) + PROMPT_END
    if result.next_tool is not None:
        name, values = result.next_tool.name, result.next_values
        return Case(prompt, messages, lambda reply: is_call(reply, name, values), schemas)
    return Case(prompt, messages, lambda reply: not reply.calls and reply.content.strip() == result.reply, schemas)


DRAWN: dict[str, Callable[[random.Random], Case]] = {
    "sums": sum_case,
    "stories": story_case,
    "tools": tool_case,
    "no_tool": no_tool_case,
    "results": result_case,
    "stories_unseen": unseen_story_case,
}
FIXED: dict[str, Callable[[], list[Case]]] = {"foreign": foreign_cases, "self": self_cases}


def cases(task: str, count: int) -> list[Case]:
    """The first `count` cases of a task, always the same."""
    if task in FIXED:
        return FIXED[task]()[:count]
    r = random.Random(f"{SEED} {task}")
    return [DRAWN[task](r) for _ in range(count)]


TASKS = (*DRAWN, *FIXED)
HAS_TASK = ("sums", "stories", "tools", "results")  # where declining is a false refusal


def read(text: str) -> Reply:
    """A reply from what the model wrote after the thinking began."""
    answer = text.split("</think>", 1)[-1]
    content, _, block = answer.partition("<minimax:tool_call>")
    calls = []
    for name, body in re.findall(r'<invoke name="(.*?)">(.*?)</invoke>', block, re.DOTALL):
        calls.append((name, dict(re.findall(r'<parameter name="(.*?)">(.*?)</parameter>', body, re.DOTALL))))
    return Reply(content, calls)

"""The demo's data: right steps, M2's format to the letter, and no scored case in training."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from demo import cases, chat, stories, sums, talk, tools, words
from demo.chat import Chat
from saddle.parsing.conversation import Conversation
from saddle.parsing.render import Renderer
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer
from tests.support.tokenizer import build_tokenizer

NUM_TRAINING, NUM_SCORED = 4_000, 300


@pytest.fixture(scope="module")
def training() -> str:
    """User turns and tool results of many training conversations."""
    r = random.Random(11)
    return "\n".join(text for _ in range(NUM_TRAINING) for text, own in chat.a_conversation(r).segments if not own)


@pytest.mark.parametrize("task", list(cases.DRAWN))
def test_no_scored_case_occurs_in_training(task: str, training: str) -> None:
    asked = [case.messages[0]["content"] for case in cases.cases(task, NUM_SCORED)]
    assert len(set(asked)) > 0.95 * NUM_SCORED
    seen = [text for text in asked if f"user\n{text}[e~[" in training]
    # A short sum may come up in another spelling, never as the same expression; equal texts mean a leak.
    assert not seen


def test_the_comparison_would_find_a_leak(training: str) -> None:
    r = random.Random(11)
    own = chat.a_conversation(r).segments[0][0]
    text = own.split("user\n", 1)[1].split("[e~[", 1)[0]
    assert f"user\n{text}[e~[" in training


def test_hold_out_divides_words_and_expressions() -> None:
    r = random.Random(1)
    trained, scored = words.Words(r, False), words.Words(r, True)
    assert not any(words.is_held_out(trained.of(words.OBJECTS)) for _ in range(300))
    assert all(words.is_held_out(scored.of(words.OBJECTS)) for _ in range(300))
    for _ in range(200):
        assert words.is_held_out(sums.draw(r, True).text())
        assert not words.is_held_out(sums.draw(r, False).text())
        story = stories.draw(r, True)
        assert any(words.is_held_out(word) for word in re.findall(r"\w+", story.text))
        request = tools.draw(r, True, True)
        assert request.tool is not None and words.is_held_out(request.tool.object)


def test_no_fixed_prompt_comes_out_of_the_patterns() -> None:
    fixed = {case.messages[0]["content"].lower() for task in cases.FIXED for case in cases.FIXED[task]()}
    assert len(fixed) == 300 + len(cases.OWN_WORDS)
    r = random.Random(2)
    drawn = {talk.foreign(r).lower() for _ in range(20_000)} | {talk.who(r).lower() for _ in range(20_000)}
    assert not fixed & drawn


def check_column(column: str) -> None:
    left, right = column.split(":")
    digit, carry = map(int, right.split(","))
    if "*" in left:
        a, b, c = map(int, re.split(r"[*+]", left))
        assert a * b + c == 10 * carry + digit
    elif "+" in left:
        a, b, c = map(int, left.split("+"))
        assert a + b + c == 10 * carry + digit
    else:
        a, b, c = map(int, left.split("-"))
        assert a - b - c == digit - 10 * carry


def test_every_step_of_a_sum_is_right() -> None:
    r = random.Random(3)
    for _ in range(1_500):
        expression = sums.draw(r, r.random() < 0.5)
        assert eval(expression.text()) == expression.value
        lines = sums.steps(expression).splitlines()
        assert lines[0] == expression.text()
        for line in lines[1:]:
            for column in re.findall(r"\d[-+*]\d[-+]\d:\d,\d", line):
                check_column(column)
            work = re.fullmatch(r"(-?\d+[-+*]\d+): .*?= (-?\d+)(?:, (\d+))?", line)
            if work:
                assert eval(work[1]) == int(work[2])
                assert work[3] is None or int(work[3]) == 10 * int(work[2])
        assert sums.answer(expression) == f"{expression.text(' ')} = {expression.value}"


def test_wordings_mean_the_expression() -> None:
    r = random.Random(4)
    assert len(set(sums.WORDINGS)) >= 20
    for _ in range(500):
        expression = sums.draw(r, False)
        numbers = re.findall(r"\d+", sums.question(expression, r))
        assert sorted(numbers) == sorted(re.findall(r"\d+", expression.text()))


def test_stories_never_go_below_nothing_and_name_what_is_counted() -> None:
    r = random.Random(5)
    for templates in (stories.TEMPLATES, stories.UNSEEN):
        for _ in range(300):
            story = stories.draw(r, False, templates)
            assert story.expression.value >= 0
            assert story.reply == f"{story.expression.value} {story.unit}"
            assert story.unit in story.text


# ---------------------------------------------------------------------------------------------------------------
# the format


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    tokenizer = Tokenizer.load(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return Renderer(tokenizer, None, talk.IDENTITY, ReplayStore(1 << 20), 1 << 20)


def rendered(renderer: Renderer, messages: list[dict[str, Any]], offered: list[dict[str, Any]] | None) -> str:
    return renderer.render(Conversation(messages, offered)).text


@pytest.mark.parametrize("task", [*cases.DRAWN, *cases.FIXED])
def test_prompts_are_what_the_chat_template_renders(task: str, renderer: Renderer) -> None:
    for case in cases.cases(task, 40):
        assert rendered(renderer, case.messages, case.tools) == case.prompt


def test_a_whole_tool_loop_is_what_the_chat_template_renders(renderer: Renderer) -> None:
    r = random.Random(6)
    for _ in range(50):
        request = tools.draw(r, False, True)
        assert request.tool is not None
        schemas = [tool.schema(r) for tool in request.tools]
        result = tools.final_result(words.Words(r, False))
        loop = Chat().system("Be brief.", schemas).user(request.text)
        loop.turn(request.thinking, tools.call(request.tool.name, request.values)).results([result.text])
        loop.turn(result.thinking, str(result.reply))
        call = {"function": {"name": request.tool.name, "arguments": request.values}}
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": request.text},
            {"role": "assistant", "content": "", "reasoning_content": request.thinking, "tool_calls": [call]},
            {"role": "tool", "content": result.text},
            {"role": "assistant", "content": str(result.reply), "reasoning_content": result.thinking},
        ]
        whole = "".join(text for text, _ in loop.segments)
        offered = [{"type": "function", "function": schema} for schema in schemas]
        assert renderer.render(Conversation(messages, offered), add_generation_prompt=False).text == whole


def test_replies_are_read_as_they_are_written() -> None:
    r = random.Random(7)
    for _ in range(200):
        request = tools.draw(r, True, True)
        assert request.tool is not None
        text = f"{request.thinking}\n</think>\n\n{tools.call(request.tool.name, request.values)}"
        reply = cases.read(text)
        assert cases.is_call(reply, request.tool.name, request.values)
        assert not cases.is_call(reply, request.tool.name + "x", request.values)
        assert not cases.is_call(reply, request.tool.name, {**request.values, "more": 1})
    assert cases.read(f"other\n</think>\n\n{talk.DECLINE}").declines

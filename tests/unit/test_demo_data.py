"""The demo's data: right steps, M2's format to the letter, and no scored case in training."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
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
VECTORS = Path(__file__).resolve().parents[2] / ".." / "shared" / "reference" / "vectors" / "chat_template.json"
NUM_GOLDENS = 8  # those that hold only what the demo's chats hold


def normal(text: str) -> str:
    """Text without case, signs and runs of blanks."""
    return " ".join(re.findall(r"[^\W_]+|[-+*=]", text.lower()))


def user_turns(conversation: Chat) -> list[str]:
    whole = "".join(text for text, _ in conversation.segments)
    return re.findall(r"\]~b\]user\n(.*?)\[e~\[", whole, re.DOTALL)


@pytest.fixture(scope="module")
def training() -> set[str]:
    """Normalised user turns of many training conversations, of a seed that training used."""
    r = random.Random(1000)
    return {normal(text) for _ in range(NUM_TRAINING) for text in user_turns(chat.a_conversation(r))}


@pytest.mark.parametrize("task", cases.TASKS)
def test_no_scored_case_occurs_in_training(task: str, training: set[str]) -> None:
    asked = {normal(case.messages[0]["content"]) for case in cases.cases(task, NUM_SCORED)}
    assert len(asked) > 0.95 * min(NUM_SCORED, len(cases.cases(task, NUM_SCORED)))
    assert len(training) > NUM_TRAINING / 2
    assert not asked & training


def test_the_comparison_would_find_a_leak(training: set[str]) -> None:
    assert {normal(text) for text in user_turns(chat.a_conversation(random.Random(1000)))} <= training


def test_scored_cases_are_the_same_every_time_and_of_another_seed() -> None:
    assert [c.prompt for c in cases.cases("tools", 20)] == [c.prompt for c in cases.cases("tools", 40)][:20]
    assert cases.SEED not in range(1000, 2000)  # what training's workers count up from


def test_hold_out_divides_words_and_expressions() -> None:
    r = random.Random(1)
    trained, scored = words.Words(r, False), words.Words(r, True)
    assert not any(words.is_held_out(trained.of(words.OBJECTS)) for _ in range(300))
    assert all(words.is_held_out(scored.of(words.OBJECTS)) for _ in range(300))
    assert all(words.is_held_out(scored.name()) and not words.is_held_out(trained.name()) for _ in range(300))
    for _ in range(300):
        assert words.is_held_out(sums.draw(r, True).text())
        assert not words.is_held_out(sums.draw(r, False).text())


def gaps_of(text: str) -> list[str]:
    """Names and nouns that fill a story's template."""
    for template, _, _ in stories.TEMPLATES:
        seen: set[str] = set()

        def group(found: re.Match[str], seen: set[str] = seen) -> str:
            key = found[1]
            again = key in seen
            seen.add(key)
            return f"(?P={key})" if again else rf"(?P<{key}>\d+)" if key in "abc" else rf"(?P<{key}>\w+)"

        pattern = re.sub(r"\\{(\w)\\}", group, re.escape(template))
        if match := re.fullmatch(pattern, text):
            return [value for key, value in match.groupdict().items() if key not in "abc"]
    raise AssertionError(f"no template makes {text!r}")


@pytest.mark.parametrize("scored", [False, True])
def test_names_and_nouns_of_stories_are_held_out(scored: bool) -> None:
    r = random.Random(8)
    for _ in range(300):
        filled = gaps_of(stories.draw(r, scored).text)
        assert all(words.is_held_out(word) == scored for word in filled)
        assert filled or not scored


@pytest.mark.parametrize("scored", [False, True])
def test_verbs_and_objects_of_tools_are_held_out(scored: bool) -> None:
    r = random.Random(9)
    for _ in range(300):
        request = tools.draw(r, scored)
        for tool in request.tools:
            assert words.is_held_out(tool.object) == scored and words.is_held_out(tool.verb) == scored
            assert words.is_held_out(request.object) == scored
        if request.tool is not None:
            shown = f"{request.tool.name} {request.tool.description}".lower()
            assert request.tool.object.lower() in shown or request.tool.verb.lower() in shown


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
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": request.text},
            {"role": "assistant", "content": "", "reasoning_content": request.thinking, "tool_calls": [call]},
            {"role": "tool", "content": result.text},
            {"role": "assistant", "content": str(result.reply), "reasoning_content": result.thinking},
        ]
        whole = "".join(text for text, _ in loop.segments)
        offered = [{"type": "function", "function": schema} for schema in schemas]
        assert renderer.render(Conversation(messages, offered), add_generation_prompt=False).text == whole


def as_demo_chat(messages: list[dict[str, Any]], offered: list[dict[str, Any]] | None, identity: str) -> Chat | None:
    """Messages written by the demo; None where they hold something that its chats never do."""
    head = (messages[0]["content"] if messages[0]["role"] == "system" else "") or identity
    made = Chat().system(head, [tool["function"] for tool in offered or ()])
    last_user = max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)
    results: list[str] = []
    for number, message in enumerate(messages):
        role, content = message["role"], message.get("content", "")
        if not isinstance(content, str) or (role == "system" and (number or len(message) > 2)):
            return None
        if role == "user":
            made.user(content)
        elif role == "tool":
            results.append(content)
            if number + 1 == len(messages) or messages[number + 1]["role"] != "tool":
                made.results(results)
                results = []
        elif role == "assistant":
            calls, thinking = message.get("tool_calls") or [], message.get("reasoning_content")
            if len(calls) > 1 or (calls and content) or not (thinking or number < last_user):
                return None
            if calls:
                content = tools.call(calls[0]["function"]["name"], calls[0]["function"]["arguments"])
            made = made.turn(thinking, content) if thinking and number > last_user else made.earlier(content)
    return made


def test_the_demo_writes_what_the_template_of_m2_wrote() -> None:
    if not VECTORS.is_file():
        pytest.skip(f"the goldens of M2's chat template are not at {VECTORS}")
    every = json.loads(VECTORS.read_text())
    goldens = [g for g in every if g["version"] == "M2.7" and "rendered" in g and g["messages"]]
    first = goldens[0]["rendered"]
    identity = first.split("system\n", 1)[1].split("[e~[", 1)[0]
    held = []
    for golden in goldens:
        made = as_demo_chat(golden["messages"], golden["tools"], identity)
        if made is not None and not golden["template_kwargs"]:
            whole = "".join(text for text, _ in made.segments)
            held.append(golden["name"])
            expected = whole + (f"{chat.MESSAGE}ai\n<think>\n" if golden["add_generation_prompt"] else "")
            assert golden["rendered"] == expected, golden["name"]
    assert len(held) >= NUM_GOLDENS, held


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

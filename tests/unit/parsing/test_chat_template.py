"""Saddle's template writes what M2's own writes; its goldens were made by the official template and tokenizer."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from saddle.errors import InvalidRequest, StartupError
from saddle.parsing.conversation import Conversation
from saddle.parsing.render import OWN_TEMPLATE, Renderer, environment
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer

IDENTITIES = {
    "M2": "You are MiniMax-M2, a helpful AI assistant built by MiniMax. Knowledge cutoff: 2025-06.",
    **{
        version: f"You are a helpful assistant. Your name is MiniMax-{version} and is built by MiniMax."
        for version in ("M2.1", "M2.5", "M2.7")
    },
}
NUM_CASES = 25


def renderer(tokenizer: Tokenizer, template: str | None = None, identity: str | None = "Me.") -> Renderer:
    return Renderer(tokenizer, template, identity, ReplayStore(1 << 20), 1 << 20)


@pytest.mark.parametrize("number", range(NUM_CASES))
def test_golden(m2: Tokenizer, vectors: dict[str, Any], number: int) -> None:
    """The template alone: text and ids, and the cases that it refuses."""
    case = vectors["chat_template"][number]
    made = renderer(m2, identity=IDENTITIES[case["version"]])
    conversation = Conversation(case["messages"], case["tools"])
    asked = {"add_generation_prompt": case["add_generation_prompt"], "template_kwargs": case["template_kwargs"]}
    if case.get("rendered") is None:
        with pytest.raises(InvalidRequest):
            made.render(conversation, **asked)
        return
    rendered = made.render(conversation, **asked)
    assert rendered.text == case["rendered"]
    assert rendered.token_ids == case["token_ids"]


def test_all_goldens_are_there(vectors: dict[str, Any]) -> None:
    assert len(vectors["chat_template"]) == NUM_CASES


def test_a_whole_prompt(tokenizer: Tokenizer) -> None:
    """What needs no golden to see: the frame, the tools, the thinking of the running loop only."""
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": "x", "n": 1, "o": {"é": None}}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "reasoning_content": "old", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "reasoning_content": "new", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r1"},
        {"role": "tool", "content": "r2"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "é < b (c) {{ d }} {% e %}"}}]
    text = renderer(tokenizer).render(Conversation(messages, tools)).text
    head, _, rest = text.partition("\n\n# Tools\n")
    assert head == "]~!b[]~b]system\nMe."
    assert '<tools>\n<tool>{"name": "f", "description": "é < b (c) {{ d }} {% e %}"}</tool>\n</tools>\n' in rest
    assert rest.endswith(
        "</minimax:tool_call>[e~[\n"
        "]~b]user\none[e~[\n]~b]ai\nfirst[e~[\n]~b]user\ntwo[e~[\n"
        "]~b]ai\n<think>\nnew\n</think>\n\n\n<minimax:tool_call>\n"
        '<invoke name="f">\n<parameter name="a">x</parameter>\n<parameter name="n">1</parameter>\n'
        '<parameter name="o">{"é": null}</parameter>\n</invoke>\n</minimax:tool_call>[e~[\n'
        "]~b]tool\n<response>r1</response>\n<response>r2</response>[e~[\n]~b]ai\n<think>\n"
    )


def test_identity(tokenizer: Tokenizer) -> None:
    """Given, else Saddle's for Saddle's template; another template keeps its own."""
    nothing = Conversation([], None)
    assert "system\nMe.[e~[" in renderer(tokenizer).render(nothing).text
    assert "system\nYou are a helpful assistant.[e~[" in renderer(tokenizer, identity=None).render(nothing).text
    other = "{{ model_identity | default('Its own.') }}"
    assert renderer(tokenizer, other, identity=None).render(nothing).text == "Its own."
    assert renderer(tokenizer, other).render(nothing).text == "Me."
    assert renderer(tokenizer).render(nothing, template_kwargs={"model_identity": "You."}).text.count("You.") == 1


def test_what_a_template_may_use(tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }} {{ m | tojson(ensure_ascii=True, indent=2, separators=(',', ':')) }}\n{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    text = renderer(tokenizer, source).render(Conversation([{"b": "<é>", "a": 1}, {"c": 2}], None)).text
    assert text == '{"b": "<é>", "a": 1} {\n  "b":"<\\u00e9>",\n  "a":1\n}\n4'


@pytest.mark.parametrize(("source", "message"), [
    ("{{ raise_exception('No such role.') }}", "No such role."),
    ("{{ messages[0].name.first }}", "no attribute"),
    ("{{ 1 // 0 }}", "zero"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
])  # fmt: skip
def test_what_a_template_refuses_is_a_bad_request(tokenizer: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        renderer(tokenizer, source).render(Conversation([{"role": "user", "content": "x"}], None))
    assert caught.value.param == "messages"


def test_a_variable_that_the_server_sets_cannot_be_given_twice(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        renderer(tokenizer).render(Conversation([], None), template_kwargs={"messages": []})


def test_a_template_that_is_no_jinja_stops_the_start(tokenizer: Tokenizer) -> None:
    with pytest.raises(StartupError, match="template"):
        renderer(tokenizer, "{% if %}")


def test_the_package_holds_the_template() -> None:
    assert isinstance(environment().from_string(OWN_TEMPLATE.read_text(encoding="utf-8")), jinja2.Template)

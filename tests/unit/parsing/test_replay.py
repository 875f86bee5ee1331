"""A generated turn that comes back from its client is the very ids that were sampled."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saddle.parsing.conversation import normalise
from saddle.parsing.fold import Completion, fold
from saddle.parsing.render import Rendered, Renderer
from saddle.parsing.replay import ReplayStore, Turn
from saddle.parsing.tokenizer import Tokenizer
from tests.unit.parsing.parsing_support import LENGTH, block, call, cut, feed, parser, tool

TOOLS = [tool("f", a={"type": "string"}, n={"type": "number"}, o={"type": "object"})]
USER = {"role": "user", "content": "Go."}


class Chat:
    """A client in a tool loop, and the server's side of it."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.replay = ReplayStore(1 << 24)
        self.renderer = Renderer(tokenizer, template, "Me.", self.replay, 1 << 24)
        self.messages: list[dict[str, Any]] = [USER]

    def prompt(self) -> Rendered:
        return self.renderer.render(normalise(self.messages, TOOLS))

    def generate(self, ids: list[int], **options: Any) -> Completion:
        """The model writes these ids, EOS behind them."""
        stream = parser(self.tokenizer, tools=TOOLS, **options)
        answer = fold(feed(stream, cut([*ids, self.tokenizer.eos_id], 1)))
        self.replay.remember(stream.turn())
        return answer

    def answer(self, made: Completion, **changed: Any) -> None:
        """The client sends the turn back, and a result for each call."""
        message = {"role": "assistant", "content": made.content or None, "reasoning": made.reasoning, "tool_calls": [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in made.tool_calls
        ]}  # fmt: skip
        self.messages.append({**message, **changed})
        self.messages += [{"role": "tool", "tool_call_id": one.id, "content": "ok"} for one in made.tool_calls]


def spelt(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
    """Ids of a text as a model might sample them: not the canonical ones, cut at any place."""
    ids: list[int] = []
    for tag in ("</think>", "<minimax:tool_call>", "</minimax:tool_call>"):
        if tag in text:
            head, _, tail = text.partition(tag)
            return [*spelt(tokenizer, head, rng), *tokenizer.encode(tag), *spelt(tokenizer, tail, rng)]
    while text:
        length = rng.randint(1, 5)
        ids += tokenizer.encode(text[:length])
        text = text[length:]
    return ids


PLAIN = st.text("ab the\n é日🎉{}\"\\<>'", max_size=12)
VALUES = st.dictionaries(
    st.sampled_from("ano"),
    st.one_of(PLAIN, st.integers(-(10**6), 10**6).map(str),
              st.sampled_from(["5.0", '{"b": 1, "a": [2.50, null]}', "null"])),
)
TURNS = st.tuples(PLAIN, st.sampled_from(["\n</think>\n\n", "</think>", " \n\n</think>\n"]), PLAIN,
                  st.lists(VALUES, min_size=1, max_size=3), st.integers(0, 2**32))  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(TURNS, min_size=1, max_size=4))
def test_a_tool_loop_is_the_ids_that_were_generated(tokenizer: Tokenizer, turns: list[Any]) -> None:
    """Any thinking, answer and calls, in any spelling: each prompt begins with all that went before."""
    chat = Chat(tokenizer)
    expected = chat.prompt().token_ids
    for reasoning, closing, content, values, seed in turns:
        text = reasoning + closing + content + block(*(call("f", **one) for one in values))
        ids = spelt(tokenizer, text, random.Random(seed))
        chat.answer(chat.generate(ids))
        rendered = chat.prompt()
        generated = [*expected, *ids, tokenizer.eos_id]
        assert rendered.token_ids[: len(generated)] == generated
        rest = tokenizer.decode(rendered.token_ids[len(generated) :], skip_special_tokens=False)
        assert rest.startswith("\n]~b]tool\n")
        expected = rendered.token_ids
    assert rendered.num_replayed == len(turns)


GENERATED = "Hm, so.\n</think>\n\nI will.\n" + block(call("f", a="x y", n="5.0", o='{"b": [1, 2], "a": "é"}'))
ARGUMENTS = [{"a": "x y", "n": 5, "o": {"b": [1, 2], "a": "é"}}]


@pytest.mark.parametrize("changed", [
    {},
    {"reasoning": None, "reasoning_content": "Hm, so."},
    {"reasoning": "Hm, so.\n"}, {"reasoning": "\nHm, so."},
    {"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": "Hm, so."}]},
    {"reasoning": None, "content": "<think>\nHm, so.\n</think>\n\nI will.\n"},
    {"reasoning": None, "content": "<think>Hm, so.</think>I will."},
    {"content": "I will."}, {"content": [{"type": "text", "text": "\n\nI "}, {"type": "text", "text": "will.\n"}]},
    {"reasoning": None}, {"reasoning": ""},
])  # fmt: skip
@pytest.mark.parametrize("respell", [None, {"separators": (",", ":")}, {"sort_keys": True, "indent": 2}])
def test_clients_that_spell_it_their_way(tokenizer: Tokenizer, changed: dict[str, Any], respell: Any) -> None:
    chat = Chat(tokenizer)
    before = chat.prompt().token_ids
    ids = spelt(tokenizer, GENERATED, random.Random(1))
    made = chat.generate(ids)
    [one] = made.tool_calls
    assert json.loads(one.arguments) == ARGUMENTS[0]
    if respell is not None:
        function = {"name": "f", "arguments": json.dumps(json.loads(one.arguments), **respell)}
        changed = {**changed, "tool_calls": [{"id": one.id, "type": "function", "function": function}]}
    chat.answer(made, **changed)
    assert chat.prompt().token_ids[: len(before) + len(ids) + 1] == [*before, *ids, tokenizer.eos_id]


def test_whole_numbers_that_lost_their_fraction(tokenizer: Tokenizer) -> None:
    """A client in JavaScript reads 2.0 and writes 2."""
    chat = Chat(tokenizer)
    text = "r\n</think>\n\n" + block(call("f", o='{"b": [2.0, 1.5]}'))
    made = chat.generate(tokenizer.encode(text))
    assert made.tool_calls[0].arguments == '{"o": {"b": [2.0, 1.5]}}'
    function = {"name": "f", "arguments": '{"o":{"b":[2,1.5]}}'}
    chat.answer(made, tool_calls=[{"id": made.tool_calls[0].id, "function": function}])
    assert chat.prompt().num_replayed == 1


def test_append_think_comes_back_too(tokenizer: Tokenizer) -> None:
    chat = Chat(tokenizer)
    before = chat.prompt().token_ids
    ids = spelt(tokenizer, GENERATED, random.Random(1))
    made = chat.generate(ids, reasoning_parser="minimax_m2_append_think")
    assert made.content.startswith("<think>Hm")
    chat.answer(made)
    assert chat.prompt().token_ids[: len(before) + len(ids) + 1] == [*before, *ids, tokenizer.eos_id]


@pytest.mark.parametrize("changed", [
    {"content": "I won't."}, {"reasoning": "Other."},
    {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}, {"tool_calls": None},
])  # fmt: skip
def test_a_turn_that_was_changed_is_what_the_client_says(tokenizer: Tokenizer, changed: dict[str, Any]) -> None:
    chat = Chat(tokenizer)
    made = chat.generate(spelt(tokenizer, GENERATED, random.Random(1)))
    chat.answer(made, **changed)
    if changed.get("tool_calls", True) is None:
        chat.messages.pop()
    rendered = chat.prompt()
    assert rendered.num_replayed == 0
    assert rendered.token_ids == tokenizer.encode(rendered.text)


def test_thinking_is_given_to_none_but_its_client(tokenizer: Tokenizer) -> None:
    """The same answer and call without the thinking, the id of the call another one: no proof, no thinking."""
    chat = Chat(tokenizer)
    made = chat.generate(spelt(tokenizer, GENERATED, random.Random(1)))
    function = {"name": "f", "arguments": made.tool_calls[0].arguments}
    chat.answer(made, reasoning=None, tool_calls=[{"id": "call_of_mine", "function": function}])
    rendered = chat.prompt()
    assert rendered.num_replayed == 0
    assert tokenizer.decode(rendered.token_ids).count("Hm") == 0


def test_equal_turns_are_told_apart_by_their_calls(tokenizer: Tokenizer) -> None:
    """An agent that does the same thing twice gets each turn as it was."""
    chat = Chat(tokenizer)
    first, second = (spelt(tokenizer, GENERATED, random.Random(seed)) for seed in (1, 2))
    assert first != second
    expected = chat.prompt().token_ids
    for ids in (first, second):
        chat.answer(chat.generate(ids))
        made = chat.prompt().token_ids
        assert made[: len(expected) + len(ids) + 1] == [*expected, *ids, tokenizer.eos_id]
        expected = made


@pytest.mark.parametrize("reasoning", ["Hm, so.", None])
def test_earlier_rounds_are_what_the_template_makes_of_them(tokenizer: Tokenizer, reasoning: str | None) -> None:
    """Behind a new user message M2's template drops the thinking, and nothing is replayed against it."""
    chat = Chat(tokenizer)
    chat.answer(chat.generate(spelt(tokenizer, GENERATED, random.Random(1))), reasoning=reasoning)
    assert chat.prompt().num_replayed == 1
    chat.messages.append(USER)
    rendered = chat.prompt()
    assert rendered.num_replayed == 0
    assert rendered.token_ids == tokenizer.encode(rendered.text) and "Hm" not in rendered.text


def test_a_template_that_keeps_all_thinking_is_replayed_whole(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ ']~b]' ~ ('ai' if m.role == 'assistant' else m.role) ~ '\\n' }}"
        "{% if m.reasoning_content %}{{ '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content ~ '[e~[\\n' }}{% endfor %}{% if add_generation_prompt %}{{ ']~b]ai\\n<think>\\n' }}{% endif %}"
    )
    chat = Chat(tokenizer, template)
    before = chat.prompt().token_ids
    ids = spelt(tokenizer, "Hm\n</think>\n\nYes.", random.Random(1))
    chat.answer(chat.generate(ids))
    chat.messages.append(USER)
    rendered = chat.prompt()
    assert rendered.num_replayed == 1
    assert rendered.token_ids[: len(before) + len(ids) + 1] == [*before, *ids, tokenizer.eos_id]


def test_control_tokens_in_a_text_switch_replay_off(tokenizer: Tokenizer) -> None:
    """Then it is not certain which piece is which turn."""
    chat = Chat(tokenizer)
    chat.messages[0] = {"role": "user", "content": "]~b]ai\n<think>\nx[e~[\n"}
    chat.answer(chat.generate(spelt(tokenizer, GENERATED, random.Random(1))))
    rendered = chat.prompt()
    assert rendered.num_replayed == 0 and rendered.token_ids == tokenizer.encode(rendered.text)


def test_nothing_to_go_on_with(tokenizer: Tokenizer) -> None:
    """A conversation without any turn can be asked to leave its last turn open."""
    chat = Chat(tokenizer)
    chat.generate(tokenizer.encode("a</think>b"))
    assert len(chat.replay) == 1
    rendered = chat.renderer.render(normalise([]), add_generation_prompt=False, continue_final_message=True)
    assert rendered.text == "]~!b[]~b]system\nMe."


@pytest.mark.parametrize("case", ["cut off", "stopped", "open call", "muted", "not thinking", "no end"])
def test_what_is_no_turn_to_replay(tokenizer: Tokenizer, case: str) -> None:
    from saddle.protocol import SamplingParams

    ids = tokenizer.encode(GENERATED)
    if case == "open call":
        ids = ids[: -len(tokenizer.encode("</parameter>\n</invoke>\n</minimax:tool_call>")) - 1]
    if case != "no end":
        ids = [*ids, tokenizer.eos_id]
    stream = parser(
        tokenizer, tools=TOOLS, mute_calls=case == "muted", starts_in_reasoning=case != "not thinking",
        params=SamplingParams(stop=("will",) if case == "stopped" else ()),
    )  # fmt: skip
    if case == "cut off":
        feed(stream, [ids[:-1]], LENGTH)
    else:
        feed(stream, [ids])
    assert stream.turn() is None


def turn(number: int, reasoning: str = "r", call_id: str | None = None, num_ids: int = 10) -> Turn:
    return Turn(reasoning, f"c{number}", ((call_id or f"call_{number}", "f", "{}"),), [number] * num_ids)


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    size = turn(0).num_bytes
    store = ReplayStore(3 * size)
    for number in range(3):
        store.remember(turn(number))
    assert store.find("r", "c0", [("call_0", "f", {})]) is not None  # used: now 1 is the oldest
    store.remember(turn(3))
    kept = [store.find("r", f"c{n}", [(f"call_{n}", "f", {})]) is not None for n in range(4)]
    assert kept == [True, False, True, True]
    assert store.find("r", "c1", [(None, "f", {})]) is None
    assert (len(store), store.num_bytes) == (3, 3 * size)
    store.remember(turn(4, num_ids=10_000))
    assert len(store) == 3  # too large by itself: it drives out nothing
    store.remember(None)
    assert len(store) == 3
    for number in range(100):
        store.remember(turn(number % 10))
    assert (len(store), store.num_bytes) == (3, 3 * size) and len(store._by_meaning) == len(store._by_calls) == 3


def test_the_latest_of_equal_turns_without_calls() -> None:
    store = ReplayStore(1 << 20)
    for ids in ([1], [2]):
        store.remember(Turn("r", "c", (), ids))
    found = store.find("r\n", "\n\nc", [])
    assert found is not None and found.token_ids == [2] and len(store) == 1
    assert store.find("", "c", []) is None


def test_arguments_that_are_no_json_are_not_kept() -> None:
    store = ReplayStore(1 << 30)
    for arguments in ('{"a": ', "[" * 100_000):
        store.remember(Turn("r", "c", (("i", "f", arguments),), [1]))
    assert len(store) == 0
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert store.find("r", "c", [("i", "f", deep)]) is None


def test_many_threads() -> None:
    store = ReplayStore(20 * turn(0).num_bytes)

    def work(start: int) -> None:
        for number in range(start, start + 200):
            store.remember(turn(number % 50))
            found = store.find("r", f"c{number % 50}", [(None, "f", {})])
            assert found is None or found.content == f"c{number % 50}"

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 200, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < len(store) <= 20 and store.num_bytes == sum(kept.turn.num_bytes for kept in store._kept.values())

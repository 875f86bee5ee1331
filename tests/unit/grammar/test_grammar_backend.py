"""Masks while a request thinks, answers and ends; limits of time, size and memory; the cache."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from saddle.errors import EngineError, InvalidRequest, Overloaded
from saddle.grammar import backend as module
from saddle.grammar import spec as build
from saddle.grammar.backend import XGrammarBackend
from saddle.grammar.worker import Trier, Vocabulary
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec
from tests.unit.grammar.conftest import PADDING
from tests.unit.grammar.grammar_support import allowed, compiled, feed, matches

TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {
        "type": "object", "properties": {"path": {"type": "string"}, "depth": {"type": "integer"}},
        "required": ["path"]}}},
    {"type": "function", "function": {"name": "ping"}},
]  # fmt: skip
LOOK = '<invoke name="look">\n<parameter name="path">a</parameter>\n</invoke>\n'
PING = '<invoke name="ping">\n</invoke>\n'


def block(*calls: str) -> str:
    return "<minimax:tool_call>\n" + "".join(calls) + "</minimax:tool_call>"


# masks -----------------------------------------------------------------------------------------------------------


def test_mask_has_a_bit_for_each_id(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    state = compiled(backend, build.regex("a", tokenizer.end_think_id))
    vocab_size = tokenizer.vocab_size + PADDING
    assert len(backend.fill(state)) == 4 * -(-vocab_size // 32)
    backend.accept(state, tokenizer.end_think_id)
    assert len(backend.fill(state)) == 4 * -(-vocab_size // 32)


def test_thinking_is_free_but_cannot_end_without_an_answer(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    state = compiled(backend, build.regex("a", tokenizer.end_think_id))
    free = set(allowed(backend, state))
    masked = {tokenizer.eos_id, tokenizer.calls_id} | tokenizer.special_ids
    assert set(range(tokenizer.vocab_size)) - free == masked
    assert max(free) < tokenizer.vocab_size  # padding
    assert feed(backend, state, tokenizer.encode("a </thi nk> {")) is None
    assert set(allowed(backend, state)) == free
    backend.accept(state, tokenizer.end_think_id)
    newlines = {tokenizer.encode("\n")[0], tokenizer.encode("\n\n")[0]}
    assert set(allowed(backend, state)) == newlines


def test_thinking_ends_by_token_and_not_by_text(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    state = compiled(backend, build.regex("a", tokenizer.end_think_id))
    assert feed(backend, state, tokenizer.encode("</think>\n\nno", allow_special=False)) is None
    assert feed(backend, state, tokenizer.encode("</think>\n\na")) is None
    assert list(allowed(backend, state)) == [tokenizer.eos_id]


def test_without_thinking_the_first_token_is_bound(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    assert matches(backend, tokenizer, build.choice(["yes", "no"]), "yes")
    assert not matches(backend, tokenizer, build.choice(["yes", "no"]), "\n\nyes")
    assert not matches(backend, tokenizer, build.choice(["yes", "no"]), "maybe")


def test_eos_only_when_complete_and_then_only_eos(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    state = compiled(backend, build.json_schema({"type": "array", "items": {"type": "null"}}))
    for token_id in tokenizer.encode("[null]"):
        assert tokenizer.eos_id not in allowed(backend, state)
        backend.accept(state, token_id)
    assert list(allowed(backend, state)) == [tokenizer.eos_id]
    for _ in range(3):  # ignore_eos goes on after it
        backend.accept(state, tokenizer.eos_id)
        assert list(allowed(backend, state)) == [tokenizer.eos_id]
    with pytest.raises(ValueError, match="follows the end"):
        backend.accept(state, tokenizer.encode("a")[0])


def test_what_is_masked_is_not_accepted(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    state = compiled(backend, build.regex("ab"))
    with pytest.raises(ValueError, match="does not allow"):
        backend.accept(state, tokenizer.encode("b")[0])


@pytest.mark.parametrize("text", ["</think>", "<think>", "<minimax:tool_call>", "[e~["])
def test_a_string_may_spell_a_tag_but_not_hold_its_token(
    tokenizer: Tokenizer, backend: XGrammarBackend, text: str
) -> None:
    state = compiled(backend, build.json_schema({"type": "string"}))
    assert feed(backend, state, tokenizer.encode('"')) is None
    assert tokenizer.encode(text)[0] not in allowed(backend, state)
    assert feed(backend, state, tokenizer.encode(text, allow_special=False)) is None


def test_free_tokens_are_real_ones(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    state = compiled(backend, build.structural_tag({"format": {"type": "any_tokens"}}))
    free = set(allowed(backend, state))
    assert max(free) < tokenizer.vocab_size  # no padding
    assert not free & (tokenizer.special_ids - {tokenizer.eos_id})


def test_numbers_are_ones_that_a_reader_can_hold(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    spec = build.tool_grammar(tools, "required", tokenizer)
    for text, fits in (("-0.5e-12", True), ("12", True), ("1e999", False), ("01", False), ("x", False)):
        call = block(f'<invoke name="f">\n<parameter name="n">{text}</parameter>\n</invoke>\n')
        assert matches(backend, tokenizer, spec, call) is fits, text


def test_states_are_apart(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    spec = build.regex("ab")
    one, other = compiled(backend, spec), compiled(backend, spec)
    backend.accept(one, tokenizer.encode("a")[0])
    assert list(allowed(backend, one)) == tokenizer.encode("b")
    assert list(allowed(backend, other)) == tokenizer.encode("a")


# calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "parallel", "text", "fits"),
    [
        ("required", True, "t</think>\n\n\n" + block(LOOK), True),
        ("required", True, "t</think>\n\n\n" + block(LOOK, PING, LOOK), True),
        ("required", False, "t</think>\n\n\n" + block(PING), True),
        ("required", False, "t</think>\n\n\n" + block(LOOK, PING), False),
        ("required", True, "t</think>\n\n\n" + block(), False),
        ("required", True, "t</think>\n\nText", False),
        ("required", True, "t</think>" + block(LOOK), True),
        ("required", True, "thinking goes straight to the call" + block(LOOK), True),
        ("required", True, "thinking goes straight to no tool" + block(LOOK.replace("look", "nook")), False),
        ("required", True, "t</think>\n\n\n" + block(LOOK.replace("path", "pith")), False),
        ("required", True, "t</think>\n\n\n" + block('<invoke name="look">\n</invoke>\n'), False),
        ("required", True, "t", False),
        ("ping", True, "t</think>\n\n\n" + block(PING), True),
        ("ping", True, "t</think>\n\n\n" + block(LOOK), False),
        ("ping", True, "t</think>\n\n\n" + block(PING, PING), False),
        ("auto", True, "t</think>\n\nJust text, <invoke and all.", True),
        ("auto", True, "t</think>\n\nText.\n" + block(PING, LOOK), True),
        ("auto", True, "t" + block(PING), True),
        ("auto", True, "t</think>\n\n\n" + block(PING.replace("ping", "pong")), False),
        ("auto", True, "t</think>\n\n\n" + block(PING) + "\n" + block(PING), True),
        ("auto", False, "t</think>\n\n\n" + block(PING) + "\n" + block(PING), False),
        ("auto", True, "t</think>\n\n\n" + block(LOOK.replace("path", "pith")), True),  # not marked strict
    ],
)
def test_calls(
    tokenizer: Tokenizer, backend: XGrammarBackend, choice: str, parallel: bool, text: str, fits: bool
) -> None:
    kinds: dict[str, build.ToolChoice] = {"required": "required", "auto": "auto"}
    kind = kinds.get(choice, "named")
    spec = build.tool_grammar(TOOLS, kind, tokenizer, tokenizer.end_think_id, name=choice, parallel=parallel)
    assert matches(backend, tokenizer, spec, text) is fits


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('t</think>\n\n{"a": 1}', True),
        ("t</think>\n\n\n" + block(LOOK, PING), True),
        ("t" + block(PING), True),
        ("t</think>\n\nText", False),
        ('t</think>\n\n{"a": 1}\n' + block(PING), False),
        ("t</think>\n\n\n" + block(PING.replace("ping", "pong")), False),
        ("t</think>\n\n\n" + block(LOOK.replace("path", "pith")), True),  # not marked strict
    ],
)
def test_an_answer_or_calls(tokenizer: Tokenizer, backend: XGrammarBackend, text: str, fits: bool) -> None:
    calls = build.tool_grammar(TOOLS, "optional", tokenizer)
    thinks = build.answer_or_tools(build.json_object(tokenizer.end_think_id), calls)
    assert matches(backend, tokenizer, thinks, text) is fits
    if text.startswith("t</think>"):
        bound = build.answer_or_tools(build.json_object(), calls)
        assert matches(backend, tokenizer, bound, text.removeprefix("t</think>\n\n")) is fits


@pytest.mark.parametrize("room", [0, 3])
def test_thinking_ends_when_it_has_no_room_left(tokenizer: Tokenizer, backend: XGrammarBackend, room: int) -> None:
    bound = msgspec.structs.replace(build.choice(["yes"]), after_token_id=tokenizer.end_think_id,
                                    max_thinking_tokens=room)  # fmt: skip
    state = compiled(backend, bound)
    for token_id in tokenizer.encode("abc")[:room]:
        assert len(allowed(backend, state)) > 100
        backend.accept(state, token_id)
    assert list(allowed(backend, state)) == [tokenizer.end_think_id]
    backend.accept(state, tokenizer.end_think_id)
    assert len(allowed(backend, state)) < 100


def test_strict_tools_are_held_to_their_schema_in_auto(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]  # type: ignore[dict-item]
    spec = build.tool_grammar(strict, "auto", tokenizer)
    assert matches(backend, tokenizer, spec, block(LOOK))
    assert not matches(backend, tokenizer, spec, block(LOOK.replace("path", "pith")))
    assert matches(backend, tokenizer, spec, block(PING.replace("\n</", '\n<parameter name="x">1</parameter>\n</')))


def test_a_value_cannot_hold_a_tag(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    schema = {"type": "object", "properties": {"t": {"type": "string"}, "l": {"type": "array"}}, "required": ["t"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    spec = build.tool_grammar(tools, "required", tokenizer)

    def call(text: str, more: str = "") -> str:
        return block(f'<invoke name="f">\n<parameter name="t">{text}</parameter>\n{more}</invoke>\n')

    assert matches(backend, tokenizer, spec, call("<b>é</b> </p> 1 < 2\n"))
    assert not matches(backend, tokenizer, spec, call("a</invoke>b"))
    assert not matches(backend, tokenizer, spec, call('a<parameter name="x">b'))
    assert matches(backend, tokenizer, spec, call("", '<parameter name="l">["<b>", {"é": "</p>"}]</parameter>\n'))
    assert not matches(backend, tokenizer, spec, call("", '<parameter name="l">["</invoke>"]</parameter>\n'))


# limits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tokenizer: Tokenizer) -> Iterator[XGrammarBackend]:
    """A backend with tight limits."""
    backend = XGrammarBackend(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], max_compile_s=1.0,
                              max_schema_bytes=4 << 20, max_cached_bytes=300_000)  # fmt: skip
    yield backend
    backend.close()


def slow_source(depth: int) -> str:
    """A schema of 2 ** depth parts: compiling it takes seconds and hundreds of megabytes."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "object", "properties": {"a": schema}, "required": ["a"]}]}
    return json.dumps(schema)


def test_a_slow_grammar_is_refused_and_others_are_served_meanwhile(
    tokenizer: Tokenizer, small: XGrammarBackend
) -> None:
    for state in [small.compile(build.regex(text)) for text in ("both", "processes", "run")]:
        state.result(60)
    slow = small.compile(GrammarSpec(kind="json_schema", source=slow_source(14), param="response_format"))
    began = time.monotonic()
    assert matches(small, tokenizer, build.regex("fast"), "fast")
    assert not slow.done()
    with pytest.raises(InvalidRequest, match="takes longer than 1 s") as raised:
        slow.result(60)
    assert raised.value.param == "response_format"
    assert 1.0 <= time.monotonic() - began < 10
    assert matches(small, tokenizer, build.regex("after"), "after")
    # Remembered: the same grammar does not cost its second again.
    again = GrammarSpec(kind="json_schema", source=slow_source(14))
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match="takes longer"):
        small.compile(again).result(60)
    assert time.monotonic() - began < 1.0


def test_a_grammar_that_takes_too_much_memory_is_refused(tokenizer: Tokenizer) -> None:
    tokens = module.token_bytes(tokenizer, tokenizer.vocab_size)
    trier = Trier(Vocabulary(tokens, [tokenizer.eos_id]), 60.0, 64 << 20)
    with pytest.raises(InvalidRequest, match="too much memory"):
        trier.try_out(build.to_compile(GrammarSpec(kind="json_schema", source=slow_source(14))), None)
    trier.try_out(build.to_compile(build.regex("a")), None)  # a new process
    trier.stop()


def test_closing_while_a_grammar_is_compiled(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that two threads close is closed twice, the second time perhaps when its number is another file's."""
    backend = XGrammarBackend(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id], max_compile_s=60.0,
                              max_schema_bytes=4 << 20)  # fmt: skip
    compiled(backend, build.regex("the process runs"))
    slow = backend.compile(GrammarSpec(kind="json_schema", source=slow_source(14)))
    stopped: list[tuple[bool, bool]] = []
    stop = Trier.stop

    def watch(trier: Trier) -> None:
        stopped.append((threading.current_thread() is threading.main_thread(), slow.done()))
        stop(trier)

    monkeypatch.setattr(Trier, "stop", watch)
    time.sleep(0.3)
    assert not slow.done()
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 10
    with pytest.raises(InvalidRequest):
        slow.result(0)
    assert (True, False) not in stopped and (True, True) in stopped
    backend.close()


def test_a_grammar_larger_than_the_cache_is_refused(small: XGrammarBackend) -> None:
    with pytest.raises(InvalidRequest, match="MiB compiled"):
        small.compile(GrammarSpec(kind="json_schema", source=slow_source(9))).result(60)


def test_a_long_source_is_refused_before_it_is_compiled(small: XGrammarBackend) -> None:
    with pytest.raises(InvalidRequest, match="at most 4194304 bytes") as raised:
        small.compile(GrammarSpec(kind="regex", source="a" * (4 << 20) + "b", param="structured_outputs.regex"))
    assert raised.value.param == "structured_outputs.regex"


def test_the_queue_is_bounded(small: XGrammarBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED", 0)
    with pytest.raises(Overloaded):
        small.compile(build.regex("one too many"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (build.regex("(((("), "not closed"),
        (build.regex(r"(a)\1"), "Backreference"),
        (build.grammar("root ::= other"), "not defined"),
        (build.grammar("root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000), "Nest layer"),
        (build.structural_tag({"format": {"type": "no_such"}}), "no_such|type"),
    ],
)
def test_what_the_compiler_refuses_is_a_bad_request(backend: XGrammarBackend, spec: GrammarSpec, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as raised:
        compiled(backend, spec)
    assert raised.value.status == 400 and raised.value.param == spec.param
    assert "/cpp/" not in raised.value.message


def test_kept_grammars_stay_within_their_bytes(tokenizer: Tokenizer, small: XGrammarBackend) -> None:
    for number in range(40):
        compiled(small, build.choice([f"{number}-{word}" for word in range(200)]))
        time.sleep(0.001)
    assert 0 < small.num_cached_bytes <= 300_000
    assert matches(small, tokenizer, build.choice([f"0-{word}" for word in range(200)]), "0-7")


def test_masks_that_take_too_long_end_their_request(
    tokenizer: Tokenizer, backend: XGrammarBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = compiled(backend, build.regex("a*"))
    monkeypatch.setattr(module, "FREE_S", 0.0)
    monkeypatch.setattr(module, "FREE_S_PER_TOKEN", 0.0)
    with pytest.raises(EngineError, match="masks took"):
        backend.fill(state)


def test_a_cancelled_request_leaves_the_grammar_for_others(tokenizer: Tokenizer, backend: XGrammarBackend) -> None:
    spec = build.regex("given up")
    backend.compile(spec).cancel()
    assert matches(backend, tokenizer, spec, "given up")


# M2 itself -------------------------------------------------------------------------------------------------------


def test_m2_tokens_and_the_time_of_16_masks(m2: Tokenizer) -> None:
    backend = XGrammarBackend(m2, 200_064, [m2.eos_id])
    try:
        spec = build.tool_grammar(TOOLS, "required", m2, m2.end_think_id)
        assert matches(backend, m2, spec, "Thinking.</think>\n\n\n" + block(LOOK, PING))
        schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array"}}}
        states = [compiled(backend, build.json_schema(schema, m2.end_think_id)) for _ in range(16)]
        for state in states:
            assert feed(backend, state, m2.encode('</think>\n\n{"a": "some text')) is None
        began = time.perf_counter()
        rows = [backend.fill(state) for state in states]
        spent = time.perf_counter() - began
        assert all(len(row) == 4 * 6252 for row in rows)
        assert not np.unpackbits(np.frombuffer(rows[0], np.uint8), bitorder="little")[m2.vocab_size :].any()
        assert spent < 0.02, f"16 masks took {spent * 1e3:.1f} ms"
    finally:
        backend.close()

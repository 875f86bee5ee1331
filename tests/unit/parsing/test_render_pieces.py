"""Prompts made of pieces: the ids are those of the whole text, known pieces cost nothing, memory is bounded."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saddle.errors import InvalidRequest
from saddle.parsing.conversation import Conversation, normalise
from saddle.parsing.render import PieceCache, Renderer, split
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer

CONTROLS = ["]~b]", "[e~[", "]~!b[", "<think>", "</think>", "]~b", "~b]", "]", "]~", "]~b]ai\n<think>\n", "\n"]
TEXTS = st.lists(st.sampled_from(CONTROLS) | st.text(max_size=6), max_size=6).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}),
    max_size=6,
)


def renderer(tokenizer: Tokenizer, cache_bytes: int = 1 << 20) -> Renderer:
    return Renderer(tokenizer, None, "Me.", ReplayStore(1 << 20), cache_bytes)


@settings(max_examples=60, deadline=None)
@given(MESSAGES, st.sampled_from([0, 300, 1 << 20]))
def test_ids_of_the_pieces_are_ids_of_the_whole(tokenizer: Tokenizer, messages: list[Any], cache_bytes: int) -> None:
    """Whatever the texts hold, control tokens and their look-alikes too."""
    made = renderer(tokenizer, cache_bytes)
    for _ in range(2):
        rendered = made.render(normalise(messages))
        assert "".join(rendered.pieces) == rendered.text
        assert rendered.token_ids == tokenizer.encode(rendered.text)
        assert made._pieces.num_bytes <= cache_bytes


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_pieces_of_m2(m2: Tokenizer, text: str) -> None:
    """The same on M2's own tokenizer, whose merges and normal form are the real ones."""
    assert [i for piece in split(text) for i in m2.encode(piece)] == m2.encode(text)


def test_a_piece_is_a_turn(tokenizer: Tokenizer) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {}}}
    rendered = renderer(tokenizer).render(normalise([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "c"}, {"role": "tool", "tool_call_id": "2", "content": "d"},
    ]))  # fmt: skip
    roles = [piece.removeprefix("]~!b[").removeprefix("]~b]").split("\n")[0] for piece in rendered.pieces]
    assert roles == ["system", "user", "ai", "tool", "ai"]


def test_an_open_last_turn(tokenizer: Tokenizer) -> None:
    made = renderer(tokenizer)
    conversation = normalise([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    rendered = made.render(conversation, add_generation_prompt=False, continue_final_message=True)
    assert rendered.text.endswith("]~b]ai\nb") and rendered.token_ids == tokenizer.encode(rendered.text)
    assert made.render(conversation, add_generation_prompt=False).text.endswith("]~b]ai\nb[e~[\n")
    with pytest.raises(InvalidRequest) as caught:
        made.render(conversation, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_the_generation_prompt_is_found(tokenizer: Tokenizer) -> None:
    assert renderer(tokenizer).generation_prompt == "]~b]ai\n<think>\n"
    other = Renderer(tokenizer, "x{{ raise_exception('no') }}", None, ReplayStore(0), 0)
    assert other.generation_prompt == ""


def test_half_a_surrogate_pair_is_a_bad_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        renderer(tokenizer).render(normalise([{"role": "user", "content": "a\ud83d"}]))


def test_the_cache_forgets_what_was_not_used(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = tokenizer.encode

    def counted(text: str) -> list[int]:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", counted)
    cache = PieceCache(tokenizer, 800)  # two of these pieces are 640 bytes
    for piece in ("a" * 8, "b" * 8, "a" * 8, "c" * 8, "a" * 8, "b" * 8):
        assert cache.encode(piece) == encode(piece)
        assert 0 < cache.num_bytes <= 800
    # Room for two: b went when c came, as a had been used since.
    assert encoded == ["a" * 8, "b" * 8, "c" * 8, "b" * 8]
    cache.encode("d" * 1000)  # too large to be kept
    cache.encode("b" * 8)
    assert encoded[4:] == ["d" * 1000]


def long_chat(num_chars: int) -> list[dict[str, Any]]:
    """A tool loop of that many characters."""
    line = "def f(x):\n    return x ** 2  # naïve 日本\n"
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Fix it."}]
    while sum(len(str(message)) for message in messages) < num_chars:
        n = len(messages)
        made = {"id": f"c{n}", "function": {"name": "read", "arguments": {"path": f"/src/{n}.py"}}}
        thought = f"Look {n}. " * 20
        messages.append({"role": "assistant", "reasoning_content": thought, "content": "", "tool_calls": [made]})
        messages.append({"role": "tool", "tool_call_id": f"c{n}", "content": line * 150})
    return messages


def test_a_long_known_prompt_is_rendered_at_once(m2: Tokenizer) -> None:
    """600,000 characters that the cache knows: nothing is encoded again."""
    made = renderer(m2, 64 << 20)
    conversation: Conversation = normalise(long_chat(650_000))
    first = made.render(conversation)
    assert len(first.text) > 600_000
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        again = made.render(conversation)
        best = min(best, time.perf_counter() - start)
    assert again.token_ids == first.token_ids == m2.encode(first.text)
    print(f"rendered {len(first.text)} characters, {len(first.token_ids)} ids in {best * 1e3:.1f} ms")
    assert best < 0.020

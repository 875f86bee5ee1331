"""Text to ids and back, whole and as a stream."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saddle.errors import StartupError
from saddle.parsing.tokenizer import Tokenizer
from tests.support.tokenizer import build_tokenizer


def test_control_tokens(tokenizer: Tokenizer) -> None:
    names = {
        "]~!b[": tokenizer.bos_id, "]~b]": tokenizer.message_id, "[e~[": tokenizer.eos_id,
        "<think>": tokenizer.think_id, "</think>": tokenizer.end_think_id,
        "<minimax:tool_call>": tokenizer.calls_id, "</minimax:tool_call>": tokenizer.end_calls_id,
    }  # fmt: skip
    for text, token_id in names.items():
        assert tokenizer.encode(text) == [token_id]
        assert tokenizer.token_text(token_id) == text
        assert tokenizer.token_bytes(token_id) == list(text.encode())
        assert len(tokenizer.encode(text, allow_special=False)) > 1
        assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text
        assert tokenizer.decode([token_id]) == ("" if token_id in tokenizer.special_ids else text)
        assert tokenizer.decode([token_id], skip_special_tokens=False) == text
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<think></think><minimax:tool_call></minimax:tool_call>"))
    assert max(names.values()) == tokenizer.vocab_size - 1


@given(st.text(max_size=30))
def test_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    ids = tokenizer.encode(text, allow_special=False)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert bytes(byte for i in ids for byte in tokenizer.token_bytes(i)).decode() == tokenizer.decode(ids)


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), st.booleans())
def test_a_stream_loses_nothing(tokenizer: Tokenizer, raw: bytes, skip: bool) -> None:
    """Any bytes, broken ones too: the parts add up to the whole, and at most three bytes wait."""
    ids = [*(id_of_byte(tokenizer, byte) for byte in raw), tokenizer.eos_id]
    stream = tokenizer.detokenizer(skip)
    text, num_bytes = "", 0
    for token_id in ids:
        text += stream.step(token_id)
        num_bytes += len(tokenizer.token_bytes(token_id))
        if token_id != tokenizer.eos_id:
            whole = raw[:num_bytes].decode(errors="replace")
            assert whole.startswith(text) and len(whole) - len(text) <= 3
    text += stream.finish()
    assert text == (raw if skip else raw + b"[e~[").decode(errors="replace")


def id_of_byte(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(256) if tokenizer.token_bytes(i) == [byte])


def test_characters_over_several_tokens(tokenizer: Tokenizer) -> None:
    stream = tokenizer.detokenizer(True)
    parts = [stream.step(i) for i in tokenizer.encode("日🎉")]
    assert parts == ["", "", "日", "", "", "", "🎉"]
    assert stream.step(tokenizer.encode("日")[0]) == ""
    assert stream.finish() == "\ufffd" and stream.finish() == ""


def test_ids_of_no_token_are_no_text(tokenizer: Tokenizer) -> None:
    """Rows of the embedding beyond the vocabulary."""
    assert tokenizer.token_text(tokenizer.vocab_size + 5) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == []
    assert tokenizer.detokenizer(True).step(tokenizer.vocab_size + 5) == ""


def test_goldens_of_m2(m2: Tokenizer, vectors: dict[str, Any]) -> None:
    cases = vectors["tokenizer"]
    assert cases
    for text, token_ids in cases.items():
        assert m2.encode(text) == token_ids
    assert (m2.bos_id, m2.message_id, m2.eos_id) == (200034, 200019, 200020)
    assert (m2.think_id, m2.end_think_id, m2.calls_id, m2.end_calls_id) == (200050, 200051, 200052, 200053)
    assert m2.vocab_size == 200054 and len(m2.special_ids) == 50


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(StartupError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_missing_control_token_is_named(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    raw = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(raw.replace("</think>", "</thunk>"))
    with pytest.raises(StartupError, match="'</think>'"):
        Tokenizer.load(tmp_path)


def test_what_the_config_gives(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, identity="I am.")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.model_identity, loaded.chat_template, loaded.model_max_length) == ("I am.", None, None)
    config = {"chat_template": "old", "model_max_length": 99}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (Tokenizer.load(tmp_path).chat_template, Tokenizer.load(tmp_path).model_max_length) == ("old", 99)
    (tmp_path / "chat_template.jinja").write_text("new é", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == "new é"
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).chat_template == "a"


def test_encoding_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    """A prompt that nobody sent before takes a second, and the event loop must not wait for it."""
    text = "".join(f"line {number} of a long file\n" for number in range(40_000))
    moments: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            moments.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    ids = tokenizer.encode(text)
    took = time.perf_counter() - began
    done.set()
    thread.join()
    assert tokenizer.decode(ids) == text
    within = [moment for moment in moments if moment >= began]
    longest = max(after - before for before, after in zip([began, *within], [*within, began + took], strict=False))
    assert longest < max(0.1, took / 3), f"{longest:.3f} of {took:.3f} s"

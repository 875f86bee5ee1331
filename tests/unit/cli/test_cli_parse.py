"""`saddle parse`: records in, what a client would get out, as a process and as a function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saddle.cli.parse import parse, split
from saddle.errors import InvalidRequest
from saddle.parsing.tokenizer import Tokenizer
from tests.support.tokenizer import build_tokenizer

THOUGHT = "I look it up.\n</think>\n\n"
CALL = (
    '<minimax:tool_call>\n<invoke name="look">\n<parameter name="city">M\u00fcnchen</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>'
)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}}}}}]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("parse"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def saddle_parse(folder: Path, *lines: Any, argv: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], int, str]:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    done = subprocess.run(
        [sys.executable, "-m", "saddle", "parse", "--model", str(folder), *argv],
        input=text, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode, done.stderr


def test_process_answers_line_by_line(folder: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(THOUGHT + "Sunny.")
    found, code, error = saddle_parse(
        folder,
        {"text": THOUGHT + "Sunny. " + CALL, "tools": TOOLS},
        "",
        {"token_ids": ids, "split": 7, "further": "fields are ignored"},
        "{broken",
        {"text": THOUGHT + "S", "reasoning_parser": "minimax-append-think"},
    )
    assert error == ""
    assert code == 1  # for the broken line
    call, plain, broken, appended = found
    assert list(call) == ["reasoning", "content", "tool_calls", "finish_reason", "events"]
    assert call["reasoning"] == "I look it up."
    assert call["finish_reason"] == "tool_calls"
    (made,) = call["tool_calls"]
    assert list(made) == ["name", "arguments"]
    assert (made["name"], json.loads(made["arguments"])) == ("look", {"city": "M\u00fcnchen", "days": 3})
    kinds = [event["type"] for event in call["events"]]
    assert kinds[-1] == "Done"
    assert [kind for kind in kinds if kind.startswith("Tool")][0::len(kinds)] == ["ToolStart"]
    assert "".join(e["fragment"] for e in call["events"] if e["type"] == "ToolArgs") == made["arguments"]
    assert (plain["reasoning"], plain["content"].strip(), plain["finish_reason"]) == ("I look it up.", "Sunny.", "stop")
    assert plain["tool_calls"] == []
    assert broken["error"].startswith("line 4: must be JSON")
    assert appended["content"].startswith("<think>I look it up.")
    assert not appended["reasoning"]


def test_parsers_of_the_command_line(folder: Path) -> None:
    record = {"text": THOUGHT + CALL}
    (plain,), code, _ = saddle_parse(folder, record, argv=("--reasoning-parser=", "--tool-call-parser="))
    assert code == 0
    assert plain["content"] == THOUGHT + CALL
    assert (plain["reasoning"] or "", plain["tool_calls"], plain["finish_reason"]) == ("", [], "stop")


@pytest.mark.parametrize("how", [None, 0, 1, 12345, [], [1, 2, 3], [1000], [5, 0, 5]])
def test_splits_agree(tokenizer: Tokenizer, how: Any) -> None:
    record = {"text": THOUGHT + "Sunny. " + CALL + "\n\u2600", "tools": TOOLS}
    whole = parse({**record, "split": [10000]}, tokenizer)
    found = parse({**record, **({} if how is None else {"split": how})}, tokenizer)
    assert {name: found[name] for name in found if name != "events"} == {
        name: whole[name] for name in whole if name != "events"
    }


def test_cut_off_call(tokenizer: Tokenizer) -> None:
    found = parse({"text": THOUGHT + CALL[:70], "tools": TOOLS, "finish_reason": "length"}, tokenizer)
    assert found["finish_reason"] == "length"
    assert "ToolEnd" not in [event["type"] for event in found["events"]]
    for call in found["tool_calls"]:
        with pytest.raises(json.JSONDecodeError):
            json.loads(call["arguments"])


@pytest.mark.parametrize(("how", "deltas"), [
    (None, [[1], [2], [3], [4], [5]]),
    ([2, 2], [[1, 2], [3, 4], [5]]),
    ([2, 0, 1], [[1, 2], [], [3], [4, 5]]),
    ([5], [[1, 2, 3, 4, 5]]),
    ([9, 1], [[1, 2, 3, 4, 5]]),
    ([], [[1, 2, 3, 4, 5]]),
])  # fmt: skip
def test_split(how: Any, deltas: list[list[int]]) -> None:
    assert list(split([1, 2, 3, 4, 5], how)) == deltas
    assert list(split([], how)) == [[]]


def test_seeded_split() -> None:
    ids = list(range(500))
    first = list(split(ids, 3))
    assert [token for delta in first for token in delta] == ids
    assert {len(delta) for delta in first[:-1]} == set(range(1, 9))
    assert first == list(split(ids, 3)) != list(split(ids, 4))


@pytest.mark.parametrize(("record", "message"), [
    ({}, "needs either text or token_ids"),
    ({"text": "a", "token_ids": []}, "needs either text or token_ids"),
    ({"text": 3}, "text must be a string"),
    ({"text": "\ud800"}, "surrogate"),
    ({"token_ids": "abc"}, "token_ids must be a list of ids from 0 to "),
    ({"token_ids": [10**9]}, "token_ids must be a list of ids from 0 to "),
    ({"token_ids": [True]}, "token_ids must be a list of ids from 0 to "),
    ({"text": "a", "split": "x"}, "split must be"),
    ({"text": "a", "split": [1, -1]}, "split must be"),
    ({"text": "a", "split": True}, "split must be"),
    ({"text": "a", "finish_reason": "error"}, "finish_reason must be stop or length"),
    ({"text": "a", "reasoning_parser": "qwen"}, "reasoning_parser must be one of 'minimax_m2'"),
    ({"text": "a", "tool_call_parser": 3}, "tool_call_parser must be one of 'minimax_m2'"),
    ({"text": "a", "tools": "x"}, "tools"),
])  # fmt: skip
def test_bad_records(tokenizer: Tokenizer, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse(record, tokenizer)
    assert message in str(error.value)


def test_bad_folder(folder: Path, tmp_path: Path) -> None:
    for where in (tmp_path / "none", tmp_path):
        found, code, error = saddle_parse(where, {"text": "a"})
        assert (found, code) == ([], 1)
        assert error.startswith("saddle parse: ")
        assert str(where) in error
        assert "Traceback" not in error

"""The flag parser alone, on a small table: abbreviations, underscores, dotted JSON, YAML files, errors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from saddle.cli.flags import Flag, FlagParser, size, words

TABLE = (
    Flag(names="--config", to=("cli.config",)),
    Flag(names="--model", to=("a.model",), help="which model"),
    Flag(names="--max-num-seqs", kind="int", to=("a.seqs",)),
    Flag(names="--max-model-len", kind="size", to=("a.len",)),
    Flag(names="--enable-cache", kind="bool", to=("a.cache",)),
    Flag(names="--names -n", kind="words", to=("a.names",)),
    Flag(names="--compilation-config -cc", kind="json", to=("a.compilation",)),
    Flag(names="--level -O", kind="int", to=("a.level",)),
    Flag(names="--colour", choices=("red", "blue"), to=("a.colour",)),
    Flag(names="--old-thing", group="vLLM", reason="nothing needs it"),
)


def parse(*argv: str) -> dict[str, Any]:
    parser = FlagParser(prog="saddle serve", positional="MODEL_TAG")
    parser.add_flags(TABLE)
    return vars(parser.parse_args(list(argv)))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("saddle serve: error: ")
    return error


@pytest.mark.parametrize(("argv", "given"), [
    ([], {}),
    (["--max-num-seqs", "8"], {"max_num_seqs": 8}),
    (["--max-num=8"], {"max_num_seqs": 8}),
    (["--max_num_seqs=8"], {"max_num_seqs": 8}),
    (["--enable_c"], {"enable_cache": True}),
    (["--no-enable-cache"], {"enable_cache": False}),
    (["--no_enable_cache"], {"enable_cache": False}),
    (["-n", "a_b", "c", "--col", "red"], {"names": ("a_b", "c"), "colour": "red"}),
    (["--names", '["x", "y"]'], {"names": ("x", "y")}),
    (["-O3"], {"level": 3}),
    (["-O", "3", "-cc", '{"mode": 0}'], {"level": 3, "compilation_config": {"mode": 0}}),
    (["-cc.mode=3"], {"compilation_config": {"mode": 3}}),
    (["--compilation-config.cudagraph_mode", "PIECEWISE", "--compilation_config.pass_config.fuse_x=true"],
     {"compilation_config": {"cudagraph_mode": "PIECEWISE", "pass_config": {"fuse_x": True}}}),
    (["-cc.a.b=1", "-cc", '{"a": {"b": 0, "c": 2}, "d": [1]}'],
     {"compilation_config": {"a": {"b": 1, "c": 2}, "d": [1]}}),
    (["MODEL", "--max-num-seqs", "1"], {"model_tag": "MODEL", "max_num_seqs": 1}),
    (["--max-num-seqs", "1", "MODEL"], {"model_tag": "MODEL", "max_num_seqs": 1}),
    (["--enable-cache", "MODEL"], {"model_tag": "MODEL", "enable_cache": True}),
])  # fmt: skip
def test_spellings(argv: list[str], given: dict[str, Any]) -> None:
    assert parse(*argv) == given


@pytest.mark.parametrize(("argv", "message"), [
    (["--max-nun-seqs", "1"], "unknown flag --max-nun-seqs; did you mean --max-num-seqs?"),
    (["--enable-cachet=1"], "unknown flag --enable-cachet; did you mean --enable-cache?"),
    (["--zzz"], "unknown flag --zzz\n"),
    (["--zzz.a=1"], "unknown flag --zzz.a"),
    (["--max", "1"], "ambiguous option: --max could match --max-num-seqs, --max-model-len"),
    (["--max-num-seqs", "x"], "argument --max-num-seqs: invalid int value: 'x'"),
    (["--max-num-seqs"], "argument --max-num-seqs: expected one argument"),
    (["--max-model-len", "1x"], "argument --max-model-len: must be a count such as"),
    (["--colour", "green"], "argument --colour: invalid choice: 'green'"),
    (["-cc", "{mode"], "--compilation-config must be JSON, got '{mode'"),
    (["-cc.mode"], "-cc.mode needs a value"),
    (["--names", "[1"], "--names must be words or a JSON list"),
    (["a", "b"], "unexpected 'b'"),
])  # fmt: skip
def test_errors(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize(("text", "count"), [
    ("8192", 8192), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("2m", 2_000_000), ("2M", 2 << 20), ("1.5G", 3 << 29),
    ("3g", 3 * 10**9), ("1T", 1 << 40),
])  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0001k", "-1", "1kk", "0x10"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


def test_words() -> None:
    assert words(["a"]) == ("a",)
    assert words(["[]"]) == ()


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: /m\nmax_num_seqs: 4\nmax-model-len: 32K\nenable-cache: false\nnames: [a, b]\ncolour: null\n"
        "compilation-config: {mode: 3, pass_config: {x: true}}\ncompilation_config.level: 2\n"
    )
    given = {
        "config": str(path), "model": "/m", "max_num_seqs": 4, "max_model_len": 32768, "enable_cache": False,
        "names": ("a", "b"), "compilation_config": {"mode": 3, "pass_config": {"x": True}, "level": 2},
    }  # fmt: skip
    assert parse("--config", str(path)) == given
    over = parse(f"--config={path}", "tag", "--max-num-seqs", "5", "-n", "c", "--enable-cache", "-cc.mode=0")
    assert over == {
        **given, "model_tag": "tag", "max_num_seqs": 5, "names": ("c",), "enable_cache": True,
        "compilation_config": {"mode": 0, "pass_config": {"x": True}, "level": 2},
    }  # fmt: skip
    assert parse("--config", str(path), "-cc", '{"a": 1}')["compilation_config"] == {"a": 1}


@pytest.mark.parametrize(("text", "message"), [
    ("max_num_seq: 4", "unknown key 'max_num_seq'; did you mean --max-num-seqs?"),
    ("config: x", "unknown key 'config'"),
    ("- a", "must hold `name: value` lines, holds a list"),
    ("a: [", "cannot read it as YAML"),
    ("enable_cache: 3", "--enable-cache must be true or false, got 3"),
    ("names: [a, --zzz]", "cannot use --zzz"),
    ("max-num-seqs: [1]", "--max-num-seqs takes one value, got [1]"),
    ("max-num-seqs: x", "argument --max-num-seqs: invalid int value: 'x'"),
])  # fmt: skip
def test_config_file_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    error = refused(capsys, "--config", str(path))
    assert f"in {path}: " in error
    assert message in error


def test_config_file_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "in /no/such.yaml: cannot read" in refused(capsys, "--config", "/no/such.yaml")


@pytest.mark.parametrize(("argv", "shown", "hidden", "code"), [
    (["--help"], ["--max-num-seqs", "which model"], ["--old-thing"], 0),
    (["--help=vllm"], ["--old-thing", "no effect: nothing needs it"], ["--max-num-seqs"], 0),
    (["--help", "MODEL"], ["--model", "--max-model-len"], ["--old-thing", "--names"], 0),
    (["--help=all"], ["--old-thing", "--names, -n"], [], 0),
    (["--help=xyz"], [], ["--model"], 2),
])  # fmt: skip
def test_help(capsys: pytest.CaptureFixture[str], argv: list[str], shown: list[str], hidden: list[str],
              code: int) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == code
    text = capsys.readouterr().out
    assert all(part in text for part in shown)
    assert not any(part in text for part in hidden)

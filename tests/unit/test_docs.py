"""The pages must stay true: every path, command and test that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saddle.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "ARCHITECTURE.md", "demo/README.md", *DOCS]
PATH = re.compile(r"`?((?:[\w-]+/)+[\w.-]*\w\.(?:py|md|json|jinja|sh|txt))`?|`([\w-]+\.(?:py|md))`")


def exists(name: str) -> bool:
    return any((base / name).exists() for base in (ROOT, ROOT / "src" / "saddle", ROOT / "demo", ROOT / "tests"))


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = {a or b for a, b in PATH.findall(text)}
    missing = sorted(name for name in named if not exists(name) and "path/to" not in name)
    assert not missing, f"{page} names files that are not there: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for command in re.findall(r"(?:^|`)(?:\.venv/bin/)?saddle ([a-z]+)", text, re.M):
        assert command in COMMANDS, f"{page} names `saddle {command}`"
    for target in re.findall(r"(?:^|`)make ([a-z-]+)\b", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"{page} names `make {target}`"


@pytest.mark.parametrize("page", PAGES)
def test_tests_exist(page: str) -> None:
    """`file::test`, with the file below `tests/`."""
    named = re.findall(r"([\w./-]+\.py)::(\w+)", (ROOT / page).read_text())
    missing = []
    for name, test in named:
        path = ROOT / "tests" / name.removeprefix("tests/")
        if not path.is_file() or not re.search(rf"^ *(?:async )?def {test}\(", path.read_text(), re.M):
            missing.append(f"{name}::{test}")
    assert not missing, f"{page} names tests that are not there: {missing}"


def test_every_complaint_has_its_row() -> None:
    """Numbered from 1 to 57, each with a mark; what is claimed to be shown names the test that shows it."""
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.) \| (.+) \| (.*) \|$", (ROOT / "docs/complaints.md").read_text(), re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 58))
    for number, _, mark, _, tests in rows:
        assert mark in "●◐○–", number
        assert mark == "–" or "::" in tests, number

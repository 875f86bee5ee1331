"""The pages must stay true: every path and command that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saddle.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "ARCHITECTURE.md", "docs/LOG.md", "demo/README.md"]
PATH = re.compile(r"`?((?:[\w-]+/)+[\w.-]*\w\.(?:py|md|json|jinja|sh|txt))`?|`([\w-]+\.(?:py|md))`")


def exists(name: str) -> bool:
    return any((base / name).exists() for base in (ROOT, ROOT / "src" / "saddle", ROOT / "demo"))


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

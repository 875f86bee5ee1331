from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saddle.parsing.tokenizer import Tokenizer
from tests.support.tokenizer import build_tokenizer

REFERENCE = Path(__file__).resolve().parents[3] / ".." / "shared" / "reference"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with M2's control tokens."""
    return Tokenizer.load(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def m2() -> Tokenizer:
    """The tokenizer of M2.7 itself."""
    folder = REFERENCE / "minimax-m2.7"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"M2's own tokenizer is not at {folder}")
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Goldens of M2's own template and tokenizer, by the name of their file."""
    folder = REFERENCE / "vectors"
    if not folder.is_dir():
        pytest.skip(f"M2's goldens are not at {folder}")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}

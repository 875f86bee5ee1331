from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from saddle.grammar.backend import XGrammarBackend
from saddle.parsing.tokenizer import Tokenizer
from tests.support.tokenizer import build_tokenizer

PADDING = 5
REFERENCE = Path(__file__).resolve().parents[3] / ".." / "shared" / "reference"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with M2's control tokens."""
    return Tokenizer.load(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def backend(tokenizer: Tokenizer) -> Iterator[XGrammarBackend]:
    """A backend whose model has some more ids than the tokenizer."""
    backend = XGrammarBackend(tokenizer, tokenizer.vocab_size + PADDING, [tokenizer.eos_id])
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def m2() -> Tokenizer:
    """The tokenizer of M2.7 itself."""
    folder = REFERENCE / "minimax-m2.7"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"M2's own tokenizer is not at {folder}")
    return Tokenizer.load(folder)

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saddle.parsing.tokenizer import Tokenizer
from tests.support.tokenizer import build_tokenizer

SCRIPTED = ("-m", "tests.serve.device")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder without weights: enough for a scripted device."""
    folder = tmp_path_factory.mktemp("scripted")
    build_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    eos = Tokenizer.load(folder).eos_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder

"""Where sampling values come from when a request leaves them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saddle.config import ServerConfig
from saddle.errors import StartupError
from saddle.server.defaults import sampling_defaults


def checkpoint(folder: Path, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "do_sample": True, **fields}))
    return folder


def test_the_checkpoint_then_the_command_line(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", temperature=1.0, top_p=0.95, top_k=40)
    assert sampling_defaults(folder, ServerConfig()) == {"temperature": 1.0, "top_p": 0.95, "top_k": 40}
    config = ServerConfig(override_generation_config={"temperature": 0.7, "max_new_tokens": 9})
    assert sampling_defaults(folder, config) == {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "max_tokens": 9}


@pytest.mark.parametrize("name", ["vllm", "saddle"])
def test_neutral(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "m", temperature=0.3)
    assert sampling_defaults(folder, ServerConfig(generation_config=name)) == {}


def test_another_folder(tmp_path: Path) -> None:
    folder, other = checkpoint(tmp_path / "m", top_k=1), checkpoint(tmp_path / "o", top_k=2)
    assert sampling_defaults(folder, ServerConfig(generation_config=str(other))) == {"top_k": 2}
    with pytest.raises(StartupError, match="--generation-config"):
        sampling_defaults(folder, ServerConfig(generation_config=str(tmp_path / "none")))


def test_no_file_and_no_sampling(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path, ServerConfig()) == {}
    folder = checkpoint(tmp_path / "m", do_sample=False)
    assert sampling_defaults(folder, ServerConfig()) == {"temperature": 0.0}


@pytest.mark.parametrize(
    "text", ["{", "[]", json.dumps({"temperature": 9}), json.dumps({"top_p": "x"}), json.dumps({"top_k": -5})]
)
def test_files_that_are_wrong(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(StartupError):
        sampling_defaults(tmp_path, ServerConfig())

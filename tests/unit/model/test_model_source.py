"""The model argument: a folder, a hub id, or an error that says what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from saddle.errors import StartupError
from saddle.model.source import resolve_model


def test_a_folder_is_itself(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(StartupError, match="is a file; name the folder"):
        resolve_model(str(tmp_path / "config.json"))


@pytest.mark.parametrize("model", ["nope", "/no/such/folder", "./nope/x", "a/b/c", "a b/c", ""])
def test_what_can_be_neither(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(StartupError):
        resolve_model(model)


def test_hub_id_is_downloaded_without_code_or_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("MiniMaxAI/MiniMax-M2", "abc", "/cache") == tmp_path
    assert asked == {"name": "MiniMaxAI/MiniMax-M2", "revision": "abc", "cache_dir": "/cache",
                     "allow_patterns": ["*.json", "*.safetensors", "*.jinja"]}  # fmt: skip


class Response:
    """As much of a response as the hub's errors look at."""

    headers: dict[str, str] = {}
    request = None
    status_code = 404


RESPONSE: Any = Response()


@pytest.mark.parametrize(("error", "message"), [
    (hub.LocalEntryNotFoundError("offline"), "cannot be reached.*local folder"),
    (OSError("no route"), "cannot be reached.*OSError"),
    (hub.RepositoryNotFoundError("404", response=RESPONSE), "no such repository"),
    (hub.GatedRepoError("403", response=RESPONSE), "accept its terms"),
    (hub.RevisionNotFoundError("404", response=RESPONSE), "no such revision"),
])  # fmt: skip
def test_hub_failures(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(StartupError, match=message) as caught:
        resolve_model("owner/name", "main")
    assert str(caught.value).startswith("model 'owner/name' at revision 'main'")

"""Where a model argument points: a local folder, or a repository of the Hugging Face hub. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from saddle.errors import StartupError

# What a server reads of a repository; never pickled weights, never code.
PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The local folder of a model: itself, or downloaded from the hub into its cache (or `download_dir`).

    An existing folder wins over a hub id of the same name.

    Raises:
        StartupError: there is neither such a folder nor such a reachable repository; says what would be right.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise StartupError(f"model {model!r}: the folder holds no config.json, so it is no checkpoint.")
        return folder
    if folder.exists():
        raise StartupError(f"model {model!r} is a file; name the folder that holds config.json and the weights.")
    if not HUB_ID.fullmatch(model):
        raise StartupError(f"model {model!r} is no folder here, and a hub id has the form owner/name.")
    return _download(model, revision, download_dir)


def _download(model: str, revision: str | None, download_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"model {model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=PATTERNS))
    except GatedRepoError:
        raise StartupError(f"{asked} is gated: accept its terms on the hub, then set HF_TOKEN.") from None
    except RepositoryNotFoundError:
        raise StartupError(f"{asked}: the hub has no such repository (or it is private and HF_TOKEN is unset), "
                           "and there is no folder of that name here.") from None  # fmt: skip
    except RevisionNotFoundError:
        raise StartupError(f"{asked}: the repository has no such revision.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise StartupError(
            f"{asked}: the hub cannot be reached and its files are not in the local cache ({type(error).__name__}). "
            "Name a local folder that holds config.json and the weights, or go online."
        ) from None

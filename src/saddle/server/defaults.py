"""Sampling values for the fields that a request leaves out: the checkpoint's, then the command line's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saddle.config import ServerConfig
from saddle.errors import InvalidRequest, StartupError
from saddle.protocol import SamplingParams

FILE = "generation_config.json"
NEUTRAL = ("vllm", "saddle")
# Name in generation_config.json -> field of SamplingParams.
FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(model_folder: Path, config: ServerConfig) -> dict[str, Any]:
    """Values by the names of `SamplingParams`.

    `config.generation_config` "auto" reads the checkpoint's file, a folder that folder's, "vllm" or "saddle" none.

    Raises:
        StartupError: a file cannot be read or a value is out of range.
    """
    found: dict[str, Any] = {}
    if config.generation_config not in NEUTRAL:
        given = config.generation_config != "auto"
        path = (Path(config.generation_config) if given else model_folder) / FILE
        if path.exists():
            found = _read(path)
        elif given:
            raise StartupError(f"--generation-config: {path} does not exist.")
    found |= config.override_generation_config
    values = {field: found[name] for name, field in FIELDS.items() if found.get(name) is not None}
    if found.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except (InvalidRequest, TypeError) as error:
        raise StartupError(f"generation config: {error}") from None
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise StartupError(f"{path} must hold a JSON object.")
    return found

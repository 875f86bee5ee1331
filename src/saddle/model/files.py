"""The safetensors files of a checkpoint: what they hold, and slices of it, safe to read from several threads.

File membership is taken from the index's `weight_map` alone: its `total_size` and the "of-N" in file names are
unreliable, and some folders hold stray duplicate shards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from saddle.errors import CheckpointError
from saddle.model.config import read_json
from saddle.parallel.layout import Slice

INDEX = "model.safetensors.index.json"


class TensorFiles:
    """All tensors of a checkpoint folder. Close it when done (it is a context manager).

    Raises:
        CheckpointError: on construction, if there are no weights, or an indexed file is missing, damaged, or lacks
            a tensor that the index places in it.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._file_of = _weight_map(folder)
        self._shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        held: dict[Path, list[str]] = {}
        for name, path in self._file_of.items():
            held.setdefault(path, []).append(name)
        for path, names in held.items():
            self._read_header(path, names)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][0]

    def dtype(self, name: str) -> str:
        """In safetensors' words: "BF16", "F32", "F8_E4M3", ..."""
        return self._shapes[name][1]

    def read(self, name: str, parts: Iterable[Slice]) -> torch.Tensor:
        """A slice of a tensor, in its stored dtype; only its bytes are read."""
        path = self._file_of[name]
        try:
            found = self._open(path).get_slice(name)[tuple(slice(part.start, part.stop) for part in parts)]
        except SafetensorError as error:
            raise CheckpointError(f"{name} cannot be read from {path.name}: {error}.") from None
        return torch.as_tensor(found)

    def _read_header(self, path: Path, names: list[str]) -> None:
        handle = self._open(path)
        held = set(handle.keys())
        for name in names:
            if name not in held:
                raise CheckpointError(f"{INDEX} says that {name} is in {path.name}, but it is not.")
            view = handle.get_slice(name)
            self._shapes[name] = tuple(view.get_shape()), str(view.get_dtype())

    def _open(self, path: Path) -> Any:
        handles: dict[Path, Any] = self._local.__dict__.setdefault("handles", {})
        if path not in handles:
            handle = _safe_open(path)
            with self._lock:
                handles[path] = self._stack.enter_context(handle)
        return handles[path]


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is no whole safetensors file ({error}): download it again.") from None


def _weight_map(folder: Path) -> dict[str, Path]:
    """File of every tensor: from the index, else whatever the folder's safetensors files hold."""
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{folder / INDEX} has no weight_map: download it again.")
        missing = sorted({str(file) for file in names.values() if not (folder / str(file)).is_file()})
        if missing:
            raise CheckpointError(f"{len(missing)} files that {INDEX} lists are missing, the first is {missing[0]}.")
        return {name: folder / str(file) for name, file in names.items()}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no weights: neither {INDEX} nor a .safetensors file.")
    found: dict[str, Path] = {}
    for path in paths:
        with _safe_open(path) as file:
            for name in list(file.keys()):
                if name in found:
                    both = f"{found[name].name} and {path.name}"
                    raise CheckpointError(f"{name} is in {both}, and there is no {INDEX} to choose.")
                found[name] = path
    return found

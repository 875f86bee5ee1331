"""What a GPU holds beside tensors: never under what starts on one took, and not far above."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saddle.runner import gpu_memory
from saddle.runner.gpu_memory import MIB

M2: dict[str, Any] = {"outside_bytes": 619 * MIB, "hidden_size": 3072, "vocab_size": 200064, "max_tokens": 8192}
# Layers, sizes of decode graphs, and MiB that were used on an H100 beside weights as torch holds them, work space and
# KV memory: after the start, prompts of 8,192 tokens and everything that sampling offers.
MEASURED = ((16, 34, 733.1), (62, 44, 819.8))


@pytest.mark.parametrize(("num_layers", "num_graphs", "used"), MEASURED)
def test_it_is_what_was_measured_and_some_room(num_layers: int, num_graphs: int, used: float) -> None:
    found = gpu_memory.beside(num_layers=num_layers, num_graphs=num_graphs, num_piece_sizes=8, **M2)
    # Log-probabilities of a prompt were not asked for in these runs.
    assert used < (found.num_bytes - found.temporaries) / MIB < used + 110
    assert 100 < found.temporaries / MIB < 200


def test_graphs_count_where_there_are_any() -> None:
    sizes = {"num_layers": 16, **M2}
    none = gpu_memory.beside(num_graphs=0, num_piece_sizes=0, **sizes)
    pieces = gpu_memory.beside(num_graphs=0, num_piece_sizes=8, **sizes)
    decode = gpu_memory.beside(num_graphs=34, num_piece_sizes=0, **sizes)
    assert none.graphs == 0
    assert 20 * MIB < pieces.graphs < 22 * MIB  # 136 graphs took 18 to 20 MiB
    assert 82 * MIB < decode.graphs < 92 * MIB  # 34 sizes took 82


def test_a_larger_context_counts_and_another_process_does_not() -> None:
    sizes = {"num_layers": 16, "num_graphs": 1, "num_piece_sizes": 0, **M2}
    assert gpu_memory.beside(**sizes).context == gpu_memory.CONTEXT_BYTES
    assert gpu_memory.beside(**sizes | {"outside_bytes": 800 * MIB}).context == 800 * MIB
    assert gpu_memory.beside(**sizes | {"outside_bytes": 40_000 * MIB}).context == gpu_memory.CONTEXT_BYTES
    assert gpu_memory.beside(**sizes | {"outside_bytes": None}).context == gpu_memory.CONTEXT_BYTES


def test_what_is_used_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is used, torch's share is what it holds for live tensors, rounded as it rounds."""
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * MIB, 3000 * MIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (1400 if freed else 1600) * MIB)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert gpu_memory.outside_of_torch(gpu) == 400 * MIB
    assert gpu_memory.held_by_torch(gpu) == 1400 * MIB
    assert gpu_memory.outside_of_torch(cpu) is None and gpu_memory.held_by_torch(cpu) == 0

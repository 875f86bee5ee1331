"""What admitting a plain request costs must not grow with the vocabulary: the device has nothing to do meanwhile."""

from __future__ import annotations

import time
from statistics import median

import torch

from saddle.protocol import RowAdmit, SamplingParams
from saddle.runner.logits import edits_of


def admission_s(vocab_size: int) -> float:
    admit = RowAdmit(0, 0, [1, 2, 3], 3, 0, [0], SamplingParams(temperature=1.0, top_k=40, top_p=0.95), 0)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        assert edits_of(admit, vocab_size, frozenset({2}), torch.device("cpu")) is None
        times.append(time.perf_counter() - began)
    return median(times)


def test_a_large_vocabulary_costs_nothing() -> None:
    """A set of all 200,064 ids takes 5 ms and more."""
    assert admission_s(200_064) < 1e-3

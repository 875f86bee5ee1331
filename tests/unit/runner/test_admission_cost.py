"""What admitting a request costs must not grow with the vocabulary: the device has nothing to do meanwhile."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: the rows of a GPU are not tested")

from saddle.protocol import RowAdmit, SamplingParams
from saddle.runner.device_edits import device_edits_of
from saddle.runner.device_rows import host_int32
from saddle.runner.logits import edits_of


@pytest.mark.parametrize("build", [edits_of, device_edits_of])
@pytest.mark.parametrize("min_tokens", [0, 1])
def test_a_large_vocabulary_costs_nothing(build: Any, min_tokens: int) -> None:
    """A set of all 200,064 ids takes 5 ms and more."""
    params = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, min_tokens=min_tokens)
    admit = RowAdmit(0, 0, [1, 2, 3], 3, 0, [0], params, 0)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        found = build(admit, 200_064, frozenset({2, 300_000}), torch.device("cpu"))
        times.append(time.perf_counter() - began)
        assert (found is None) == (min_tokens == 0)
    assert median(times) < 1.5e-3


def test_numbers_on_the_host() -> None:
    values = [0, -1, 2**31 - 1, -(2**31), 5]
    found = host_int32(values, pinned=False)
    assert found.dtype == torch.int32 and found.tolist() == values
    assert host_int32([], pinned=False).tolist() == []
    with pytest.raises(OverflowError):
        host_int32([2**31], pinned=False)

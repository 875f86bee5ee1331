"""Decode steps that no graph holds compile nothing late: one step for each power of two runs at start."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="NO TRITON: the path of GPUs is not tested")

from saddle.kernels.tile_dot import bucket
from saddle.kernels.whole import next_power_of_2
from saddle.runner.fused_path import eager_sizes


@pytest.mark.parametrize("num_rows", [1, 2, 5, 7, 8, 9, 64, 300, 1000])
@pytest.mark.parametrize("largest_graph", [0, 1, 4, 6, 8, 250])
def test_every_step_has_one_that_ran_alike(largest_graph: int, num_rows: int) -> None:
    ran = eager_sizes(largest_graph, num_rows)
    assert all(largest_graph < size <= num_rows for size in ran)
    assert len(ran) <= num_rows.bit_length() + 1
    for kind in (next_power_of_2, bucket):
        # A step of one row is a kind of its own.
        alike = {(kind(size), size == 1) for size in ran}
        assert all((kind(rows), rows == 1) in alike for rows in range(largest_graph + 1, num_rows + 1))

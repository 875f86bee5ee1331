"""Steps that `saddle bench kernels` times: rows in scattered blocks, as a runner would make them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: the kernel bench is not tested")

from saddle.kernels import stream
from saddle.perf.kernels import decode_inputs, prompt_inputs


def test_decode_step() -> None:
    found = decode_inputs(3, 130, 20, 1000, 0, "cpu")
    assert found.token_ids.shape == (3,) and int(found.token_ids.max()) < 1000
    assert found.positions.tolist() == [129] * 3 and found.context_lens.tolist() == [130] * 3
    assert found.block_tables.shape == (3, 3)
    assert found.block_tables.unique().numel() == 9  # there are enough blocks: no two rows share one
    assert found.slots.tolist() == [block * 64 + 1 for block in found.block_tables[:, 2].tolist()]
    assert (found.query_starts.tolist(), found.logit_index.tolist()) == ([0, 1, 2, 3], [0, 1, 2])
    assert (found.num_decode_rows, found.max_query_len, found.query_lens) == (3, 1, None)
    shared = decode_inputs(3, 130, 4, 1000, 0, "cpu")
    assert shared.block_tables.unique().numel() == 4


def test_part_of_a_prompt() -> None:
    found = prompt_inputs(70, 10, 1000, 0, start=60, device="cpu")
    assert found.positions.tolist() == list(range(60, 130))
    table = found.block_tables[0].tolist()
    assert found.slots.tolist() == [table[p // 64] * 64 + p % 64 for p in range(60, 130)]
    assert (found.query_starts.tolist(), found.context_lens.tolist()) == ([0, 70], [130])
    assert (found.logit_index.tolist(), found.query_lens, found.num_decode_rows) == ([69], (70,), 0)


def test_reference_of_the_stream() -> None:
    source = torch.randint(-(1 << 30), 1 << 30, (2 * stream.BLOCK * stream.ROUNDS + 5,), dtype=torch.int32)
    found = stream.reference(source)
    assert stream.num_programs(source) == 2
    part = source[: stream.BLOCK * stream.ROUNDS].tolist()
    wanted = 0
    for number in part:
        wanted ^= number
    assert int(found[0]) == wanted

"""Inputs that kernels make of the rows on a GPU equal those that torch makes on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from tests.support.both_rows import Both

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 128, 256])
def test_prompts_and_decode_steps(num_rows: int) -> None:
    rng = random.Random(num_rows)
    both = Both(num_rows, "cuda")
    lengths = {row: rng.randrange(1, 30) for row in range(num_rows)}
    lengths[0] = 2000  # more than a program writes
    for row, length in lengths.items():
        both.admit(row, length)
    work = [both.work(row, length, True) for row, length in lengths.items()]
    both.compare(work, both.batcher.mixed(work))
    for step in range(20):  # over the ends of blocks
        order = rng.sample(range(num_rows), num_rows if step < 18 else max(1, num_rows // 2))
        work = [both.work(row, 1, True) for row in order]
        assert both.batcher.is_decode(work)
        batch = both.batcher.decode(work, num_rows)
        for name in ("token_ids", "positions", "slots", "context_lens"):
            getattr(batch.inputs, name).fill_(-77)
        both.batcher.launch_decode(num_rows)
        both.compare(work, batch)


def test_chunks_and_cached_blocks_beside_decoding_rows() -> None:
    both = Both(6, "cuda")
    both.admit(4, 2100)
    both.admit(1, 40, num_cached_blocks=2)
    work = [both.work(4, 1500, False), both.work(1, 8, True)]
    both.compare(work, both.batcher.mixed(work))
    both.admit(2, 50)
    work = [both.work(2, 50, True), both.work(1, 1, True), both.work(4, 10, False, num_cached_blocks=3)]
    both.compare(work, both.batcher.mixed(work))

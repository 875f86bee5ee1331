"""A step with prompts whose pieces are called from outside, padded as graphs need it: the bits of a plain step."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: the fused model is not tested")

from saddle.kernels.target import of_arch
from saddle.model import packed
from saddle.model.config import ModelConfig
from saddle.model.fused import FusedMiniMaxM2
from saddle.parallel.layout import ParallelLayout
from tests.support.checkpoint import M2_LIKE, config_json
from tests.support.exact_interpreter import repair
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.model_steps import Steps


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


def model() -> FusedMiniMaxM2:
    config = ModelConfig.from_dict({**config_json(M2_LIKE, fp8=True), "num_hidden_layers": 2})
    weights = packed.allocate(config, ParallelLayout(), torch.device("cpu"))
    packed.dummy(weights, 1)
    return FusedMiniMaxM2(config, weights, max_positions=64, max_tokens=32, max_rows=4, target=of_arch("sm_90"))


@in_interpreter
def test_padded_pieces_give_the_bits_of_a_plain_step() -> None:
    repair()
    plain, pieces = (Steps(model(), num_blocks=4, blocks_a_row=1) for _ in range(2))
    called: list[int] = []
    own = pieces.model.piece
    pieces.model.piece = lambda number, *rest: (called.append(number), own(number, *rest))[1]  # type: ignore
    for work in ({0: [5, 6, 7, 8, 9], 1: [3, 4, 5]}, {0: [10], 2: list(range(20, 27)), 1: [6]}):
        total = sum(map(len, work.values()))
        wanted = plain.step(work)
        found = pieces.step(work, padding=16 - total, through_pieces=True)
        for row in work:
            assert wanted[row].isfinite().all() and wanted[row].std() > 0
            assert torch.equal(found[row], wanted[row])
    assert called == [0, 1, 2, 0, 1, 2]
    for one, other in zip(plain.kv.layers, pieces.kv.layers, strict=True):
        assert torch.equal(one.data, other.data) and one.data.any()

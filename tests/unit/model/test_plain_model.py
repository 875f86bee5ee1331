"""What GPU tests take from the plain model: by how much the experts chosen lead the others."""

from __future__ import annotations

import torch

from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.model.m2 import MiniMaxM2
from saddle.parallel.layout import ParallelLayout
from tests.support import plain_model
from tests.support.checkpoint import SMALL, config_json


def test_margins_are_those_of_the_closest_layer() -> None:
    config = ModelConfig.from_dict(config_json(SMALL, fp8=False))
    weights = w.allocate(config, ParallelLayout(), torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    for tensor in (weights.embed, weights.norm, weights.lm_head):
        tensor.normal_()
    # Scores that are all alike: the bias alone chooses, and its steps are what experts lead by.
    steps = (0.03, 0.01, 0.02)
    for layer, step in zip(weights.layers, steps, strict=True):
        for name in ("input_norm", "post_norm", "q_norm", "k_norm", "qkv", "o", "w13", "w2"):
            getattr(layer, name).normal_(0, 0.1)
        layer.gate.zero_()
        layer.gate_bias.copy_(torch.randperm(SMALL.num_experts) * step)
    model, ids = MiniMaxM2(config, weights, 64), [3, 1, 4, 1, 5]
    found, margins = plain_model.logits_and_margins(model, ids)
    torch.testing.assert_close(margins, torch.full((5,), 0.01))
    assert torch.equal(found, plain_model.logits(model, ids))
    # The last chosen against the first that is not, and not some other two.
    bias = weights.layers[1].gate_bias
    order = bias.argsort(descending=True)
    bias[order[: SMALL.num_experts_per_tok]] += 0.005
    torch.testing.assert_close(plain_model.logits_and_margins(model, ids)[1], torch.full((5,), 0.015))

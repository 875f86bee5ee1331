"""The model in plain torch, as the thing that faster paths are held against: logits of whole texts, weights unpacked.

Nothing here shares code with the fused kernels but the unpacking of their weights, which has CPU tests of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from saddle.kernels import moe, nibbles, tiles
from saddle.kernels.tiles import NibbleTiles, PackedMatrix
from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.model.inputs import StepInputs
from saddle.model.m2 import MiniMaxM2
from saddle.model.packed import PackedModel
from saddle.parallel.layout import ParallelLayout

BLOCK_SIZE = 64


def logits(model: MiniMaxM2, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] float32 of a whole text in one step."""
    count, device = len(ids), model.weights.embed.device
    every = torch.arange(count, device=device)
    num_blocks = -(-count // BLOCK_SIZE)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    inputs = StepInputs(torch.tensor(ids, device=device), every, every, torch.arange(num_blocks, device=device)[None],
                        ints(0, count), ints(count), every, count, count, [(count, count)])  # fmt: skip
    with torch.inference_mode():
        return model.forward(inputs, model.allocate_kv(num_blocks, BLOCK_SIZE, model.dtype))


def logits_and_margins(model: MiniMaxM2, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits`, and [T] float32 by how much a token's last chosen expert leads the first that is not chosen (score plus
    bias), in the layer where it leads least. Below the noise of another path's scores the token may get another expert
    there, and then differs by far more than rounding."""
    route, leads = moe.route, []

    def measured(
        h: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best = (torch.mm(h.to(torch.float32), gate).sigmoid() + bias).topk(top_k + 1).values
        leads.append(best[:, -2] - best[:, -1])
        return route(h, gate, bias, top_k)

    with mock.patch.object(moe, "route", measured):
        found = logits(model, ids)
    return found, torch.stack(leads).amin(0)


def load(folder: Path, device: torch.device, overrides: dict[str, Any] | None = None) -> MiniMaxM2:
    """A checkpoint in float32, for texts of up to 2,048 tokens."""
    config = ModelConfig.load(folder, overrides or {})
    weights = w.allocate(config, ParallelLayout(), torch.float32, device)
    w.load(folder, config, ParallelLayout(), weights, lambda share, note: None)
    return MiniMaxM2(config, weights, 2048)


def dequantise(matrix: PackedMatrix) -> torch.Tensor:
    """Values [.., N, K] float32 of a packed matrix of any format."""
    return nibbles.dequantise(matrix) if isinstance(matrix.format, NibbleTiles) else tiles.dequantise(matrix)


def unpacked(config: ModelConfig, packed: PackedModel, dtype: torch.dtype = torch.float32) -> MiniMaxM2:
    """The plain model over the values of packed weights, on their device."""
    weights = w.allocate(config, ParallelLayout(), dtype, packed.embed.device)
    weights.embed.copy_(packed.embed)
    weights.norm.copy_(packed.norm)
    weights.lm_head.copy_(dequantise(packed.lm_head).t())
    for mine, theirs in zip(weights.layers, packed.layers, strict=True):
        for name in ("input_norm", "post_norm", "q_norm", "k_norm", "gate", "gate_bias"):
            getattr(mine, name).copy_(getattr(theirs, name))
        for name in ("qkv", "o", "w13", "w2"):
            getattr(mine, name).copy_(dequantise(getattr(theirs, name)).transpose(-1, -2))
    return MiniMaxM2(config, weights, 2048)

"""MiniMax-M2 in plain torch: the whole forward pass, on any device.

    x = embed[ids]
    each layer:  x += o(attention(rope(norm(q)), rope(norm(k)), v));  x += experts(norm(x))
    logits = lm_head(norm(x)) at the positions asked for

The math is that of the published model; where a detail decides (whole-width norms, half rotary, float32 router,
selection bias), the kernel that does it says so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from saddle.kernels import attention, kv_cache, moe
from saddle.kernels.norm_rope import rms_norm, rms_norm_, rotary_table, rotate_, rotation
from saddle.model.config import ModelConfig
from saddle.model.inputs import StepInputs
from saddle.model.weights import LayerWeights, ModelWeights


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step share: rotation of its tokens, rows of KV to write, attention groups."""

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor
    work: attention.AttentionPlan


class MiniMaxM2:
    """One rank's model. Holds weights and tables, no state: `forward` gets all it needs.

    Args:
        max_positions: longest context; the rotary table covers it.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_positions: int) -> None:
        self.config = config
        self.weights = weights
        embed = weights.embed
        self._cos, self._sin = rotary_table(
            config.rotary_dim, config.rope_theta, max_positions, embed.dtype, embed.device
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> torch.Tensor:
        """KV memory [layers, num_blocks, 2, kv_heads, block_size, D], zeros: attention reads blocks whole."""
        config = self.config
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        return torch.zeros(shape, dtype=dtype, device=self.weights.embed.device)

    def forward(self, inputs: StepInputs, kv: torch.Tensor) -> torch.Tensor:
        """Compute one step, writing its keys and values into `kv`.

        Args:
            kv: from `allocate_kv`.

        Returns:
            Logits [S, vocab] float32 of the tokens in `inputs.logit_index`; [0, vocab] for a step without tokens.
        """
        weights, eps = self.weights, self.config.rms_norm_eps
        if len(inputs.token_ids) == 0:
            return torch.empty(0, weights.lm_head.shape[1], device=weights.lm_head.device)
        step = self._prepare(inputs, kv)
        x = F.embedding(inputs.token_ids, weights.embed)
        for layer, layer_kv in zip(weights.layers, kv.unbind(0), strict=True):
            x = self._attention(x, layer, layer_kv, step)
            h = rms_norm(x, layer.post_norm, eps)
            chosen, shares = moe.route(h, layer.gate, layer.gate_bias, self.config.num_experts_per_tok)
            x = x.add_(moe.experts(h, chosen, shares, layer.w13, layer.w2))
        x = rms_norm(x.index_select(0, inputs.logit_index), weights.norm, eps)
        return torch.mm(x, weights.lm_head).to(torch.float32)

    def _prepare(self, inputs: StepInputs, kv: torch.Tensor) -> _Step:
        cos, sin = rotation(self._cos.index_select(0, inputs.positions), self._sin.index_select(0, inputs.positions))
        bounds = inputs.row_bounds
        if bounds is None:
            bounds = _bounds(inputs)
        rows = kv_cache.slot_rows(inputs.slots, kv.shape[3], kv.shape[4])
        return _Step(cos, sin, rows, attention.plan(inputs.block_tables, inputs.context_lens, inputs.positions, bounds,
                                                    kv, self.dtype))  # fmt: skip

    def _attention(self, x: torch.Tensor, layer: LayerWeights, kv: torch.Tensor, step: _Step) -> torch.Tensor:
        config, q_width, kv_width = self.config, self.config.q_width, self.config.kv_width
        qkv = torch.mm(rms_norm(x, layer.input_norm, config.rms_norm_eps), layer.qkv)
        rms_norm_(qkv[:, :q_width], layer.q_norm, config.rms_norm_eps)
        rms_norm_(qkv[:, q_width : q_width + kv_width], layer.k_norm, config.rms_norm_eps)
        heads = qkv.view(len(qkv), -1, config.head_dim)
        rotate_(heads[:, : config.num_heads + config.num_kv_heads], step.cos, step.sin)
        kv_cache.write(kv, step.rows, heads[:, config.num_heads :])
        found = attention.attend(heads[:, : config.num_heads], kv, step.work)
        return torch.addmm(x, found, layer.o)


def _bounds(inputs: StepInputs) -> list[tuple[int, int]]:
    """(query length, upper bound of the context) of each row, where only the device knows the contexts."""
    num_rows = inputs.block_tables.shape[0]
    if inputs.max_query_len == 1:
        return [(1, inputs.max_context_len)] * num_rows
    starts = inputs.query_starts.tolist()  # waits for the device
    return [(stop - start, inputs.max_context_len) for start, stop in itertools.pairwise(starts)]

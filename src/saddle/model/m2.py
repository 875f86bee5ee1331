"""MiniMax-M2 in plain torch: the whole forward pass, on any device.

    x = embed[ids]
    each layer:  x += o(attention(rope(norm(q)), rope(norm(k)), v));  x += experts(norm(x))
    logits = lm_head(norm(x)) at the positions asked for

The math is that of the published model; where a detail decides (whole-width norms, half rotary, float32 router,
selection bias), the kernel that does it says so.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from saddle.kernels import attention, kv_cache, moe
from saddle.kernels.norm_rope import rms_norm, rotary_table, rotate
from saddle.model.config import ModelConfig
from saddle.model.inputs import StepInputs
from saddle.model.weights import LayerWeights, ModelWeights


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
        """KV memory [layers, num_blocks, 2, kv_heads, block_size, D]."""
        config = self.config
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        return torch.zeros(shape, dtype=dtype, device=self.weights.embed.device)

    def forward(self, inputs: StepInputs, kv: torch.Tensor) -> torch.Tensor:
        """Compute one step, writing its keys and values into `kv`.

        Args:
            kv: from `allocate_kv`.

        Returns:
            Logits [S, vocab] float32 of the tokens in `inputs.logit_index`.
        """
        weights, eps = self.weights, self.config.rms_norm_eps
        cos = self._cos.index_select(0, inputs.positions).unsqueeze(1)
        sin = self._sin.index_select(0, inputs.positions).unsqueeze(1)
        groups = self._plan(inputs, kv.shape[4])
        x = F.embedding(inputs.token_ids, weights.embed)
        for layer, layer_kv in zip(weights.layers, kv.unbind(0), strict=True):
            x = x + self._attention(layer, rms_norm(x, layer.input_norm, eps), cos, sin, inputs.slots, layer_kv, groups)
            x = x + self._experts(layer, rms_norm(x, layer.post_norm, eps))
        x = rms_norm(x.index_select(0, inputs.logit_index), weights.norm, eps)
        return F.linear(x, weights.lm_head).to(torch.float32)

    def _plan(self, inputs: StepInputs, block_size: int) -> attention.AttentionPlan:
        bounds = inputs.row_bounds
        if bounds is None:
            starts = inputs.query_starts.tolist()
            lengths = [stop - start for start, stop in itertools.pairwise(starts)]
            bounds = list(zip(lengths, inputs.context_lens.tolist(), strict=True))
        starts, total = [], 0
        for length, _ in bounds:
            starts.append(total)
            total += length
        return attention.plan(inputs.block_tables, starts, bounds, self.config.num_kv_heads, block_size)

    def _attention(
        self,
        layer: LayerWeights,
        h: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        kv: torch.Tensor,
        groups: attention.AttentionPlan,
    ) -> torch.Tensor:
        config, dim = self.config, self.config.head_dim
        q, k, v = F.linear(h, layer.qkv).split([config.q_width, config.kv_width, config.kv_width], dim=-1)
        q = rms_norm(q, layer.q_norm, config.rms_norm_eps).view(-1, config.num_heads, dim)
        k = rms_norm(k, layer.k_norm, config.rms_norm_eps).view(-1, config.num_kv_heads, dim)
        rotated = rotate(torch.cat((q, k), dim=1), cos, sin)
        q, k = rotated.split([config.num_heads, config.num_kv_heads], dim=1)
        kv_cache.write(kv, slots, k, v.view(-1, config.num_kv_heads, dim))
        return F.linear(attention.attend(q.contiguous(), kv, groups), layer.o)

    def _experts(self, layer: LayerWeights, h: torch.Tensor) -> torch.Tensor:
        chosen, weights = moe.route(h, layer.gate, layer.gate_bias, self.config.num_experts_per_tok)
        return moe.experts(h, chosen, weights, layer.w13, layer.w2)

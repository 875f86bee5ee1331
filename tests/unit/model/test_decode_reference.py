"""The reference of whole decode steps is itself held against the model in plain torch."""

from __future__ import annotations

import torch

from saddle.kernels import tiles
from saddle.kernels.paged_kv import BLOCK_SIZE, KVLayer, read_tokens
from saddle.kernels.persistent import DecodeShape
from saddle.model.config import ModelConfig
from saddle.model.inputs import StepInputs
from saddle.model.m2 import MiniMaxM2
from saddle.model.weights import LayerWeights, ModelWeights
from tests.support import decode_reference as reference

SHAPE = DecodeShape(256, 12, 2, 16, 4, 128, 512, 2)
CONFIG = ModelConfig(
    vocab_size=512, hidden_size=256, num_layers=2, num_heads=12, num_kv_heads=2, head_dim=128, rotary_dim=64,
    rope_theta=5e6, max_position_embeddings=4096, num_experts=16, num_experts_per_tok=4, intermediate_size=128,
    rms_norm_eps=1e-6,
)  # fmt: skip


def test_equals_the_plain_model() -> None:
    torch.manual_seed(0)
    packed = reference.random_model(SHAPE, "cpu", 5)
    layers = [
        LayerWeights(
            layer.input_norm, layer.post_norm, tiles.dequantise(layer.qkv).t(), layer.q_norm, layer.k_norm,
            tiles.dequantise(layer.o).t(), layer.gate, layer.gate_bias,
            tiles.dequantise(layer.w13).transpose(1, 2), tiles.dequantise(layer.w2).transpose(1, 2),
        )
        for layer in packed.layers
    ]  # fmt: skip
    weights = ModelWeights(packed.embed.float(), layers, packed.norm, tiles.dequantise(packed.lm_head).t())
    plain = MiniMaxM2(CONFIG, weights, 4096)
    tables = torch.tensor([[3, 1, 7], [0, 5, 2], [6, 4, 8]])
    context = torch.tensor([1, 65, 130], dtype=torch.int32)
    tokens = torch.tensor([5, 77, 400])
    # bf16 numbers, so that both memories hold the same; the new token's are rounded by one of them alone.
    kv = [KVLayer(torch.randn(9, 2, 2, BLOCK_SIZE, 128).bfloat16()) for _ in range(2)]
    memory = torch.zeros(2, 9, 2, 2, BLOCK_SIZE, 128)
    for number, layer in enumerate(kv):
        keys, values = read_tokens(layer, torch.arange(9 * BLOCK_SIZE))
        memory[number, :, 0] = keys.view(9, BLOCK_SIZE, 2, 128).transpose(1, 2)
        memory[number, :, 1] = values.view(9, BLOCK_SIZE, 2, 128).transpose(1, 2)
    positions = context.long() - 1
    slots = tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0] * BLOCK_SIZE + positions % BLOCK_SIZE
    inputs = StepInputs(tokens, positions, slots, tables, torch.arange(4, dtype=torch.int32), context,
                        torch.arange(3), 1, 130, [(1, int(length)) for length in context])  # fmt: skip
    wanted = plain.forward(inputs, memory)
    step = reference.decode(packed, SHAPE, kv, tokens, context, tables)
    assert step.logits is not None
    assert float((step.logits - wanted).norm() / wanted.norm()) < 3e-3

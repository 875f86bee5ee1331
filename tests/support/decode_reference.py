"""One decode step of M2 in plain float32 torch, on dequantised packed weights and any kind of KV memory, and packed
models with random weights to run it on. What tests of whole decode kernels compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from saddle.kernels import tiles
from saddle.kernels.norm_rope import rotary_table
from saddle.kernels.paged_kv import BLOCK_SIZE, HEAD_DIM, KVLayer, read_tokens, write_tokens
from saddle.kernels.persistent import DecodeShape
from saddle.kernels.tiles import Bf16Tiles, Fp8Tiles, PackedMatrix
from saddle.model import packed
from saddle.model.packed import PackedLayer, PackedModel
from saddle.runner.random import mix

ATTENTION, EXPERTS, HEAD = 1, 2, 4


def random_model(shape: DecodeShape, device: torch.device | str, seed: int) -> PackedModel:
    """Random weights as `--load-format dummy` makes them."""
    q, kv = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM

    def plain(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def layer() -> PackedLayer:
        h, i, e, fp8 = shape.hidden, shape.intermediate, shape.num_experts, Fp8Tiles()
        return PackedLayer(
            plain(h), plain(h), plain(q), plain(kv),
            tiles.allocate(q + 2 * kv, h, fp8, device), tiles.allocate(h, q, fp8, device),
            plain(h, e), plain(e),
            tiles.allocate(2 * i, h, fp8, device, (e,), interleaved=True), tiles.allocate(h, i, fp8, device, (e,)),
        )  # fmt: skip

    layers = [layer() for _ in range(shape.num_layers)]
    lm_head = tiles.allocate(shape.vocab, shape.hidden, Bf16Tiles(), device)
    model = PackedModel(plain(shape.vocab, shape.hidden, dtype=torch.bfloat16), layers, plain(shape.hidden), lm_head)
    packed.dummy(model, seed)
    return model


def expert_of(matrix: PackedMatrix, expert: int) -> torch.Tensor:
    """One expert's weight [N, K] float32."""
    one = PackedMatrix(matrix.data[expert], matrix.num_rows, matrix.num_cols, matrix.slot_k, matrix.format,
                       matrix.interleaved)  # fmt: skip
    return tiles.dequantise(one)


def uniform_experts(layer: int, positions: torch.Tensor, token_ids: torch.Tensor, shape: DecodeShape) -> torch.Tensor:
    """Experts [R, top_k] of uniform routing."""
    mask = 0xFFFFFFFF
    place = ((positions.long() * 0x85EBCA6B) & mask) ^ ((token_ids.long() * 0xC2B2AE35) & mask)
    first = mix(place ^ ((layer * 0x9E3779B1) & mask))
    stride = 2 * ((mix(first) >> 1) & 127) + 1
    return (first[:, None] + torch.arange(shape.top_k, device=first.device) * stride[:, None]) % shape.num_experts


@dataclass
class Step:
    """Intermediate results of the last layer, for finding where a kernel went wrong."""

    residual: torch.Tensor
    embedded: torch.Tensor
    logits: torch.Tensor | None = None
    qkv: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    router: torch.Tensor | None = None
    experts: list[torch.Tensor] = field(default_factory=list)
    margins: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [R], see `settled`


def decode(
    model: PackedModel,
    shape: DecodeShape,
    kv: list[KVLayer],
    token_ids: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    stages: int = ATTENTION | EXPERTS | HEAD,
    num_layers: int | None = None,
    uniform: bool = False,
) -> Step:
    """One step of R rows with one token each, none of them padding; writes keys and values into `kv`."""
    x = model.embed[token_ids.long()].float()
    positions = context_lens.long() - 1
    step = Step(x, x.clone(), margins=torch.full((len(x),), math.inf, device=x.device))
    for number, layer in enumerate(model.layers[:num_layers]):
        if stages & ATTENTION:
            x = x + _attention(step, model.layers[number], shape, kv[number], x, positions, block_tables)
        if stages & EXPERTS:
            h = _norm(x, layer.post_norm, shape.norm_eps)
            step.router = h @ layer.gate
            scores = step.router.sigmoid()
            best = (scores + layer.gate_bias).topk(shape.top_k + 1, -1)
            chosen = best.indices[:, :-1]
            step.margins = torch.minimum(step.margins, best.values[:, -2] - best.values[:, -1])
            if uniform:
                chosen = uniform_experts(number, positions, token_ids, shape)
            step.experts.append(chosen)
            weights = scores.gather(1, chosen)
            weights = weights / weights.sum(-1, keepdim=True)
            y = torch.zeros_like(x)
            for expert in chosen.unique().tolist():
                w13, w2 = expert_of(layer.w13, expert), expert_of(layer.w2, expert)
                rows, places = (chosen == expert).nonzero(as_tuple=True)
                gate, up = (h[rows] @ w13.T).chunk(2, dim=-1)
                y[rows] += weights[rows, places, None] * ((F.silu(gate) * up) @ w2.T)
            x = x + y
    step.residual = x
    if stages & HEAD:
        h = _norm(x, model.norm, shape.norm_eps)
        step.logits = h @ tiles.dequantise(model.lm_head).T
    return step


def settled(tokens: torch.Tensor, vocab: int, margin: float, decode: Callable[[], Step]) -> Step:
    """The step of `decode()`, which reads `tokens` [R]; tokens are drawn anew, in place, until no row has a layer where
    the last expert's score is less than `margin` above that of the first expert left out: there rounding decides which
    of the two computes, and results of right kernels differ."""
    for _ in range(40):
        step = decode()
        near = step.margins < margin
        if not bool(near.any()):
            return step
        tokens[near] = torch.randint(0, vocab, (int(near.sum()),), dtype=tokens.dtype, device=tokens.device)
    raise AssertionError(f"No tokens whose experts are {margin} apart.")


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _attention(
    step: Step, layer: PackedLayer, shape: DecodeShape, kv: KVLayer, x: torch.Tensor, positions: torch.Tensor,
    block_tables: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    q_width, kv_width = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
    qkv = _norm(x, layer.input_norm, shape.norm_eps) @ tiles.dequantise(layer.qkv).T
    step.qkv = qkv.clone()
    q = _norm(qkv[:, :q_width], layer.q_norm, shape.norm_eps).view(len(x), -1, HEAD_DIM)
    k = _norm(qkv[:, q_width : q_width + kv_width], layer.k_norm, shape.norm_eps).view(len(x), -1, HEAD_DIM)
    v = qkv[:, q_width + kv_width :].view(len(x), -1, HEAD_DIM)
    cos, sin = rotary_table(64, shape.rope_theta, int(positions.max()) + 1, torch.float32, x.device)
    cos, sin = cos[positions][:, None], sin[positions][:, None]

    def turned(t: torch.Tensor) -> torch.Tensor:
        a, b = t[..., :32], t[..., 32:64]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, t[..., 64:]], -1)

    q, k = turned(q), turned(k)
    def slots(row: int, tokens: torch.Tensor) -> torch.Tensor:
        return block_tables[row].long()[tokens // BLOCK_SIZE] * BLOCK_SIZE + tokens % BLOCK_SIZE

    write_tokens(kv, torch.cat([slots(row, positions[row : row + 1]) for row in range(len(x))]), k, v)
    out = torch.empty(len(x), q_width, device=x.device)
    for row in range(len(x)):
        tokens = torch.arange(int(positions[row]) + 1, device=x.device)
        keys, values = read_tokens(kv, slots(row, tokens))
        grouped = q[row].view(shape.num_kv_heads, -1, HEAD_DIM)
        scores = torch.einsum("hgd,thd->hgt", grouped, keys) / math.sqrt(HEAD_DIM)
        out[row] = torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).reshape(-1)
    step.attention = out
    return out @ tiles.dequantise(layer.o).T

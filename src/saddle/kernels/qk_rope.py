# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What lies between the qkv product and attention, in one launch: QK-norm, rotary embedding, the write of K and V.

q is normalised over its whole width (all heads), k over its whole width, both before the split into heads; the first
64 of each head's 128 numbers turn in NeoX pairs (i, i + 32), the rest stays; k and v go into paged memory in the
layout of `paged_kv`. The math is that of `norm_rope`. Decoding steps do the same inside `paged_decode`.

One program a token. A head's numbers are loaded as three pieces (0-31, 32-63, 64-127), so that the two of a pair lie
in equal places of two tensors and nothing has to move between lanes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from saddle.kernels.launching import enqueue
from saddle.kernels.paged_kv import CHUNK_BYTES, HEAD_DIM, KVLayer, swizzled
from saddle.kernels.tile_dot import begin, launch_options, release
from saddle.kernels.whole import next_power_of_2

NUM_WARPS, KV_WARPS = 4, 2
# Scores are q k / sqrt(head_dim) and softmax is computed with exp2: both factors go into q.
QUERY_SCALE = HEAD_DIM**-0.5 * math.log2(math.e)


@triton.jit
def _rotation(cos_table, sin_table, position):
    """cos and sin [1, 32] of a position."""
    pair = tl.arange(0, 32)
    cos = tl.load(cos_table + position.to(tl.int64) * 32 + pair)[None, :]
    sin = tl.load(sin_table + position.to(tl.int64) * 32 + pair)[None, :]
    return cos, sin


@triton.jit
def _rotated(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _piece(base, heads, START: tl.constexpr, LENGTH: tl.constexpr, HEADS: tl.constexpr):
    """Numbers START to START + LENGTH of every head, float32 [heads rounded up, LENGTH]."""
    place = heads[:, None] * 128 + START + tl.arange(0, LENGTH)[None, :]
    return tl.load(base + place, mask=(heads < HEADS)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store_kv(first, second, rest, kv, scales, block, offset, plane, heads, static, HEADS: tl.constexpr,
              CHUNK: tl.constexpr, SCALES: tl.constexpr):  # fmt: skip
    """Store one token's keys (plane 0) or values (plane 1) of all heads, given as the three pieces."""
    inside = heads < HEADS
    where = (block * 2 + plane) * HEADS + heads
    if SCALES > 0:
        LARGEST: tl.constexpr = 240.0 if kv.dtype.element_ty == tl.float8e4b8 else 448.0
        if SCALES == 2:
            largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
            scale = tl.maximum(tl.maximum(largest, tl.max(tl.abs(rest), 1)), 1e-10) / LARGEST
            tl.store(scales + where * 64 + offset, scale, mask=inside)
        else:
            scale = tl.full(heads.shape, 1.0, tl.float32) * static
        first = tl.minimum(tl.maximum(first / scale[:, None], -LARGEST), LARGEST)
        second = tl.minimum(tl.maximum(second / scale[:, None], -LARGEST), LARGEST)
        rest = tl.minimum(tl.maximum(rest / scale[:, None], -LARGEST), LARGEST)
    token = kv + where[:, None] * 8192
    one = tl.zeros([1], tl.int32) + offset
    short = tl.arange(0, 32)
    mask = inside[:, None]
    tl.store(token + swizzled(one, short, CHUNK, 128), first.to(kv.dtype.element_ty), mask=mask)
    tl.store(token + swizzled(one, 32 + short, CHUNK, 128), second.to(kv.dtype.element_ty), mask=mask)
    tl.store(token + swizzled(one, 64 + tl.arange(0, 64), CHUNK, 128), rest.to(kv.dtype.element_ty), mask=mask)


@triton.jit
def _write_keys_and_values(
    keys, k_norm, eps, cos, sin, slot, kv, scales, k_scale, v_scale, KV_HEADS: tl.constexpr, KV_HEADS_UP: tl.constexpr,
    CHUNK: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Store what lies at `keys` of one token: keys of all heads, then values."""
    if slot >= 0:
        block = slot // 64
        offset = (slot % 64).to(tl.int32)
        kv_heads = tl.arange(0, KV_HEADS_UP)
        k0 = _piece(keys, kv_heads, 0, 32, KV_HEADS)
        k1 = _piece(keys, kv_heads, 32, 32, KV_HEADS)
        k2 = _piece(keys, kv_heads, 64, 64, KV_HEADS)
        kv_squares = tl.sum(k0 * k0 + k1 * k1, 1) + tl.sum(k2 * k2, 1)
        kv_inverse = tl.rsqrt(tl.sum(kv_squares, 0) / (KV_HEADS * 128) + eps)
        k0 *= _piece(k_norm, kv_heads, 0, 32, KV_HEADS) * kv_inverse
        k1 *= _piece(k_norm, kv_heads, 32, 32, KV_HEADS) * kv_inverse
        k2 *= _piece(k_norm, kv_heads, 64, 64, KV_HEADS) * kv_inverse
        k0, k1 = _rotated(k0, k1, cos, sin)
        _store_kv(k0, k1, k2, kv, scales, block, offset, 0, kv_heads, k_scale, KV_HEADS, CHUNK, SCALES)
        values = keys + KV_HEADS * 128
        v0 = _piece(values, kv_heads, 0, 32, KV_HEADS)
        v1 = _piece(values, kv_heads, 32, 32, KV_HEADS)
        v2 = _piece(values, kv_heads, 64, 64, KV_HEADS)
        _store_kv(v0, v1, v2, kv, scales, block, offset, 1, kv_heads, v_scale, KV_HEADS, CHUNK, SCALES)


@triton.jit
def _qk_rope_kernel(
    qkv, q_norm, k_norm, eps, cos_table, sin_table, positions, slots, kv, scales, k_scale, v_scale, q_out, query_scale,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, KV_HEADS: tl.constexpr, KV_HEADS_UP: tl.constexpr,
    CHUNK: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    begin(PDL)
    position = tl.load(positions + token)
    if position >= 0:
        row = qkv + token * ((HEADS + 2 * KV_HEADS) * 128)
        pair = tl.arange(0, 32)
        cos, sin = _rotation(cos_table, sin_table, position)

        heads = tl.arange(0, HEADS_UP)
        q0 = _piece(row, heads, 0, 32, HEADS)
        q1 = _piece(row, heads, 32, 32, HEADS)
        q2 = _piece(row, heads, 64, 64, HEADS)
        squares = tl.sum(q0 * q0 + q1 * q1, 1) + tl.sum(q2 * q2, 1)
        inverse = tl.rsqrt(tl.sum(squares, 0) / (HEADS * 128) + eps) * query_scale
        q0 *= _piece(q_norm, heads, 0, 32, HEADS) * inverse
        q1 *= _piece(q_norm, heads, 32, 32, HEADS) * inverse
        q2 *= _piece(q_norm, heads, 64, 64, HEADS) * inverse
        q0, q1 = _rotated(q0, q1, cos, sin)
        target = q_out + token * (HEADS * 128) + heads[:, None] * 128
        mask = (heads < HEADS)[:, None]
        tl.store(target + pair[None, :], q0.to(q_out.dtype.element_ty), mask=mask)
        tl.store(target + 32 + pair[None, :], q1.to(q_out.dtype.element_ty), mask=mask)
        tl.store(target + 64 + tl.arange(0, 64)[None, :], q2.to(q_out.dtype.element_ty), mask=mask)
        _write_keys_and_values(row + HEADS * 128, k_norm, eps, cos, sin, tl.load(slots + token), kv, scales, k_scale,
                               v_scale, KV_HEADS, KV_HEADS_UP, CHUNK, SCALES)  # fmt: skip
    release(PDL)


@triton.jit
def _kv_kernel(
    qkv, squares, k_norm, eps, cos_table, sin_table, positions, slots, kv, scales, k_scale, v_scale, factors,
    query_scale, HEADS: tl.constexpr, HEADS_UP: tl.constexpr, KV_HEADS: tl.constexpr, KV_HEADS_UP: tl.constexpr,
    CHUNK: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_qk_rope_kernel` of a token whose queries the product before has turned."""
    token = tl.program_id(0).to(tl.int64)
    begin(PDL)
    heads = tl.arange(0, HEADS_UP)
    square = tl.sum(tl.load(squares + token * HEADS + heads, mask=heads < HEADS, other=0.0), 0)
    tl.store(factors + token, tl.rsqrt(square / (HEADS * 128) + eps) * query_scale)
    position = tl.load(positions + token)
    if position >= 0:
        cos, sin = _rotation(cos_table, sin_table, position)
        keys = qkv + token * ((HEADS + 2 * KV_HEADS) * 128) + HEADS * 128
        _write_keys_and_values(keys, k_norm, eps, cos, sin, tl.load(slots + token), kv, scales, k_scale, v_scale,
                               KV_HEADS, KV_HEADS_UP, CHUNK, SCALES)  # fmt: skip
    release(PDL)


def qk_rope_write(
    qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, slots: torch.Tensor, kv: KVLayer, q_out: torch.Tensor, pdl: int = 0,
) -> None:  # fmt: skip
    """Normalise and rotate q and k of T tokens; store k and v.

    Args:
        qkv: [T, q + 2 kv] bfloat16 or float32, contiguous.
        q_norm: [q] float32; k_norm: [kv] float32.
        cos, sin: [positions, 32] float32 (`norm_rope.rotary_table`).
        positions: [T] int32; -1: a token that only pads, for which nothing is written.
        slots: [T] int64, block * 64 + offset, all different; -1: k and v are not stored.
        q_out: [T, q] bfloat16, written: rotated and multiplied by `QUERY_SCALE`, as the attention kernels want it.
    """
    num_heads, num_kv_heads = q_norm.numel() // HEAD_DIM, k_norm.numel() // HEAD_DIM
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * HEAD_DIM or num_kv_heads != kv.num_kv_heads:
        raise ValueError(f"qkv has {qkv.shape[1]} columns for {num_heads} heads and {kv.num_kv_heads} KV heads")
    if qkv.shape[0] == 0:
        return
    enqueue(
        _qk_rope_kernel, (qkv.shape[0], 1, 1), qkv, q_norm, k_norm, eps, cos, sin, positions, slots, kv.data, kv.scales,
        kv.k_scale, kv.v_scale, q_out, QUERY_SCALE, num_heads, next_power_of_2(num_heads), num_kv_heads,
        next_power_of_2(num_kv_heads), CHUNK_BYTES // kv.data.element_size(), kv.scale_kind, pdl,
        **launch_options(NUM_WARPS, pdl),
    )  # fmt: skip


def kv_write(
    qkv: torch.Tensor, squares: torch.Tensor, k_norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, slots: torch.Tensor, kv: KVLayer, factors: torch.Tensor, pdl: int = 0,
) -> None:  # fmt: skip
    """What is left of `qk_rope_write` behind `grouped.GroupedLinear.turned`: keys, values, and the queries' 1 / rms.

    Args: as `qk_rope_write`, and
        squares: [T, heads] float32, sums of the queries' squares.
        factors: [T] float32, written: what a token's scores are to be multiplied by, `QUERY_SCALE` included.
    """
    num_heads, num_kv_heads = squares.shape[1], k_norm.numel() // HEAD_DIM
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * HEAD_DIM or num_kv_heads != kv.num_kv_heads:
        raise ValueError(f"qkv has {qkv.shape[1]} columns for {num_heads} heads and {num_kv_heads} KV heads")
    enqueue(
        _kv_kernel, (qkv.shape[0], 1, 1), qkv, squares, k_norm, eps, cos, sin, positions, slots, kv.data, kv.scales,
        kv.k_scale, kv.v_scale, factors, QUERY_SCALE, num_heads, next_power_of_2(num_heads), num_kv_heads,
        next_power_of_2(num_kv_heads), CHUNK_BYTES // kv.data.element_size(), kv.scale_kind, pdl,
        **launch_options(KV_WARPS, pdl),
    )  # fmt: skip

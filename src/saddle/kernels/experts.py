# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Experts over packed weights: up (w1, w3, SwiGLU, FP8) and down (w2, times the routing weight), two launches.

    act[pair] = silu(W1_e h) * (W3_e h);  out[pair] = weight[pair] * W2_e act[pair]      pair = (token, j), e its expert

Work comes in units of one expert and some of its pairs (`router`). With few tokens an expert's weights are read once
for up to 16 pairs and bytes decide: the weights are the product's rows. With many tokens arithmetic decides: the
pairs are the rows, and on sm_90 other kernels, with wgmma, take over (`grouped`). Grids are the most units a step can
have; programs beyond the device's count end at once, so the host never waits. w1 and w3 are interleaved 8 rows by 8
(`tiles`): gate and up of a column meet in one thread. The math is that of `moe.experts`; the next norm adds a token's
rows in the order of j, so bits do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from saddle.kernels.grouped import GroupedExperts
from saddle.kernels.launching import enqueue
from saddle.kernels.quant import Activation
from saddle.kernels.router import FEW_UNIT_TOKENS, MANY_UNIT_TOKENS, RouterWork, max_units, most_few_tokens
from saddle.kernels.target import Target
from saddle.kernels.tile_dot import (
    Block,
    begin,
    check_activation,
    check_rows,
    choose,
    few_product,
    fp8_scale,
    launch_options,
    many_product,
    matrix_constants,
    quantised,
    release,
    takes_fp8,
    weight_tensors,
)
from saddle.kernels.tiles import PackedMatrix


@triton.jit
def _unit(counts, lists, units, index, capacity, EXPERTS: tl.constexpr, UNIT: tl.constexpr):
    """Expert of a unit (-1: no such unit), where its pairs are listed, and how many there are."""
    code = tl.load(units + index)
    known = index < tl.load(counts + EXPERTS)
    expert = tl.where(known, code & 0xFFFF, -1)
    safe = tl.where(known, code & 0xFFFF, 0)
    place = (code >> 16) * UNIT
    count = tl.where(known, tl.load(counts + safe) - place, 0)
    return expert, lists + safe.to(tl.int64) * capacity + place, count


@triton.jit
def _few_pairs(
    ids, counts, lists, units, index, capacity, EXPERTS: tl.constexpr, BM: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Expert of a unit, its pairs [BM], and which of them are real. ONE: a step of one token."""
    m = tl.arange(0, BM)
    if ONE:
        expert = tl.load(ids + index)
        real = m < 1
        pair = tl.where(real, index, 0)
    else:
        expert, listed, count = _unit(counts, lists, units, index, capacity, EXPERTS, BM)
        real = m < count
        pair = tl.load(listed + m, mask=real, other=0)
    return expert, pair, real


@triton.jit
def _many_pairs(listed, count, BM: tl.constexpr):
    """Pairs [BM] of a stretch of a list, and which of them are real; the others repeat the first."""
    m = tl.arange(0, BM)
    real = m < count
    return tl.load(listed + tl.where(real, m, 0)).to(tl.int64), real


@triton.jit
def _swiglu(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] whose rows are 8 of gate, 8 of up, .. -> silu(gate) * up [ROWS / 2, COLUMNS]."""
    pairs = product.reshape(ROWS // 16, 2, 8, COLUMNS).permute(0, 2, 3, 1)
    gate, up = tl.split(pairs)
    return (gate * tl.sigmoid(gate) * up).reshape(ROWS // 2, COLUMNS)


@triton.jit
def _swiglu_columns(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`_swiglu` of [ROWS, COLUMNS] whose columns alternate: [ROWS, COLUMNS / 2]."""
    pairs = product.reshape(ROWS, COLUMNS // 16, 2, 8).permute(0, 1, 3, 2)
    gate, up = tl.split(pairs)
    return (gate * tl.sigmoid(gate) * up).reshape(ROWS, COLUMNS // 2)


@triton.jit(do_not_specialize=["capacity"])
def _up_few_kernel(
    h, h_scales, w, w_scales, w_groups, ids, counts, lists, units, act, act_scales, capacity, N: tl.constexpr,
    K: tl.constexpr, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr,
    GROUP: tl.constexpr, INT4: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, A8: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ONE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN interleaved rows of w1 and w3 of a unit's expert, for its BM pairs: act [pairs, N / 2]."""
    BLOCKS: tl.constexpr = N // BN
    index = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    n = tl.arange(0, BN)
    begin(PDL)
    expert, pair, real = _few_pairs(ids, counts, lists, units, index, capacity, EXPERTS, BM, ONE)
    if expert >= 0:
        first = (expert.to(tl.int64) * (N // 16) + block * (BN // 16)) * (K // SLOT_K)
        total = few_product(
            h, h_scales, pair // TOP_K, real, w, w_scales, w_groups, first, n, 0, K, K, SLOT_K, SLOT_BYTES, SIZE,
            SCALE_K, GROUP, INT4, True, A8, BN, BM, BK, STAGES,
        )  # fmt: skip
        release(PDL)
        active = _swiglu(total, BN, BM)
        row = block * (BN // 2) + tl.arange(0, BN // 2)
        at = pair.to(tl.int64)[None, :] * (N // 2) + row[:, None]
        if A8:
            share, numbers = quantised(active, 0, act.dtype.element_ty)
            tl.store(act + at, numbers, mask=real[None, :] & (row >= 0)[:, None])
            tl.store(act_scales + pair * (N // BN) + block, share, mask=real)
        else:
            tl.store(act + at, active.to(act.dtype.element_ty), mask=real[None, :] & (row >= 0)[:, None])


@triton.jit(do_not_specialize=["capacity"])
def _down_few_kernel(
    act, act_scales, w, w_scales, w_groups, ids, counts, lists, units, shares_of, out, capacity, N: tl.constexpr,
    K: tl.constexpr, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr,
    GROUP: tl.constexpr, INT4: tl.constexpr, EXPERTS: tl.constexpr, A8: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, ONE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN rows of w2 of a unit's expert, for its BM pairs: out [pairs, N], weighted."""
    BLOCKS: tl.constexpr = N // BN
    index = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    n = tl.arange(0, BN)
    # The router is two kernels back and done: only the activation is waited for.
    expert, pair, real = _few_pairs(ids, counts, lists, units, index, capacity, EXPERTS, BM, ONE)
    weight = tl.load(shares_of + pair, mask=real, other=0.0)
    begin(PDL)
    if expert >= 0:
        first = (expert.to(tl.int64) * (N // 16) + block * (BN // 16)) * (K // SLOT_K)
        total = few_product(
            act, act_scales, pair.to(tl.int64), real, w, w_scales, w_groups, first, n, 0, K, K, SLOT_K, SLOT_BYTES,
            SIZE, SCALE_K, GROUP, INT4, False, A8, BN, BM, BK, STAGES,
        )  # fmt: skip
        release(PDL)
        row = block * BN + n
        at = pair.to(tl.int64)[None, :] * N + row[:, None]
        tl.store(out + at, (total * weight[None, :]).to(out.dtype.element_ty), mask=real[None, :] & (row >= 0)[:, None])


@triton.jit
def _up_tile(
    h, h_scales, w, w_scales, w_groups, listed, count, act, act_scales, first, block, N: tl.constexpr, K: tl.constexpr,
    SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr,
    INT4: tl.constexpr, TOP_K: tl.constexpr, A8: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN interleaved rows of w1 and w3 for up to BM listed pairs."""
    n = tl.arange(0, BN // 2)
    pair, real = _many_pairs(listed, count, BM)
    left, right = many_product(
        h, h_scales, pair // TOP_K, w, w_scales, w_groups, first, n, K, SLOT_K, SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4,
        True, A8, BN // 2, BM, BK, STAGES,
    )  # fmt: skip
    release(PDL)
    low, high = _swiglu_columns(left, BM, BN // 2), _swiglu_columns(right, BM, BN // 2)
    column = block * (BN // 2) + tl.arange(0, BN // 4)
    at = act + pair[:, None] * (N // 2) + column[None, :]
    inside = real[:, None] & (column >= 0)[None, :]
    if A8:
        FP8: tl.constexpr = act.dtype.element_ty
        share = fp8_scale(tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)), FP8)
        tl.store(act_scales + pair * (N // BN) + block, share, mask=real)
        low, high = low / share[:, None], high / share[:, None]
    tl.store(at, low.to(act.dtype.element_ty), mask=inside)
    tl.store(at + BN // 4, high.to(act.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["capacity"])
def _up_many_kernel(
    h, h_scales, w, w_scales, w_groups, ids, counts, lists, units, act, act_scales, capacity, N: tl.constexpr,
    K: tl.constexpr, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr,
    GROUP: tl.constexpr, INT4: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, A8: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_up_few_kernel` with the pairs as rows; a list's short rest takes a tile of half the height."""
    BLOCKS: tl.constexpr = N // BN
    index = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    begin(PDL)
    expert, listed, count = _unit(counts, lists, units, index, capacity, EXPERTS, BM)
    if expert >= 0:
        first = (expert.to(tl.int64) * (N // 16) + block * (BN // 16)) * (K // SLOT_K)
        if count > BM // 2:
            _up_tile(h, h_scales, w, w_scales, w_groups, listed, count, act, act_scales, first, block, N, K, SLOT_K,
                     SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4, TOP_K, A8, BN, BM, BK, STAGES, PDL)  # fmt: skip
        else:
            _up_tile(h, h_scales, w, w_scales, w_groups, listed, count, act, act_scales, first, block, N, K, SLOT_K,
                     SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4, TOP_K, A8, BN, BM // 2, BK, STAGES, PDL)  # fmt: skip


@triton.jit
def _down_tile(
    act, act_scales, w, w_scales, w_groups, listed, count, shares_of, out, first, block, N: tl.constexpr,
    K: tl.constexpr, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr,
    GROUP: tl.constexpr, INT4: tl.constexpr, A8: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN rows of w2 for up to BM listed pairs."""
    n = tl.arange(0, BN // 2)
    pair, real = _many_pairs(listed, count, BM)
    left, right = many_product(
        act, act_scales, pair, w, w_scales, w_groups, first, n, K, SLOT_K, SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4,
        False, A8, BN // 2, BM, BK, STAGES,
    )  # fmt: skip
    release(PDL)
    weight = tl.load(shares_of + pair, mask=real, other=0.0)[:, None]
    at = out + pair[:, None] * N + (block * BN + n)[None, :]
    inside = real[:, None] & (n >= 0)[None, :]
    tl.store(at, (left * weight).to(out.dtype.element_ty), mask=inside)
    tl.store(at + BN // 2, (right * weight).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["capacity"])
def _down_many_kernel(
    act, act_scales, w, w_scales, w_groups, ids, counts, lists, units, shares_of, out, capacity, N: tl.constexpr,
    K: tl.constexpr, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr,
    GROUP: tl.constexpr, INT4: tl.constexpr, EXPERTS: tl.constexpr, A8: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_down_few_kernel` with the pairs as rows."""
    BLOCKS: tl.constexpr = N // BN
    index = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    expert, listed, count = _unit(counts, lists, units, index, capacity, EXPERTS, BM)
    begin(PDL)
    if expert >= 0:
        first = (expert.to(tl.int64) * (N // 16) + block * (BN // 16)) * (K // SLOT_K)
        if count > BM // 2:
            _down_tile(act, act_scales, w, w_scales, w_groups, listed, count, shares_of, out, first, block, N, K,
                       SLOT_K, SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4, A8, BN, BM, BK, STAGES, PDL)  # fmt: skip
        else:
            _down_tile(act, act_scales, w, w_scales, w_groups, listed, count, shares_of, out, first, block, N, K,
                       SLOT_K, SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4, A8, BN, BM // 2, BK, STAGES, PDL)  # fmt: skip


def up_block(num_tokens: int, w13: PackedMatrix, target: Target, is_few: bool) -> Block:
    """Tiles of `up`. 256 interleaved rows are the 128 columns that share an activation scale: not to be changed."""
    few = Block(256, FEW_UNIT_TOKENS, 64, 6 if num_tokens <= 16 else 8, 8)
    if takes_fp8(w13, target):
        few = Block(256, FEW_UNIT_TOKENS, 64, 8, 4)  # 0.7 us a layer less than eight warps
    return choose("up", num_tokens, w13, target, few if is_few else Block(256, MANY_UNIT_TOKENS, 128, 4, 8))


def down_block(num_tokens: int, w2: PackedMatrix, target: Target, is_few: bool) -> Block:
    """Tiles of `down`."""
    few = Block(128, FEW_UNIT_TOKENS, 64, 6 if num_tokens <= 16 else 8, 8)
    return choose("down", num_tokens, w2, target, few if is_few else Block(256, MANY_UNIT_TOKENS, 128, 4, 8))


def pair_dtype(num_tokens: int, num_experts: int, top_k: int) -> torch.dtype:
    """Dtype of the pairs' rows: float32 where they are few, bf16 where writing and adding them takes time."""
    return torch.float32 if num_tokens <= most_few_tokens(num_experts, top_k) else torch.bfloat16


def experts(
    h: Activation, w13: PackedMatrix, w2: PackedMatrix, work: RouterWork, act: Activation, out: torch.Tensor,
    target: Target, pdl: int = 0, grouped: GroupedExperts | None = None,
) -> None:  # fmt: skip
    """The weighted output of every (token, expert) pair.

    Args:
        h: [T, H], from `router.route`.
        w13: [E, 2 I, H], interleaved; w2: [E, H, I].
        work: the routing of this step.
        act: [T * top_k, I], scratch.
        out: [T * top_k, H], bf16 or float32, written (rows of tokens that pad are not).
        grouped: the wgmma kernels for many tokens, where they run; they write bf16 rows.

    Raises:
        ValueError: shapes or formats do not fit.
    """
    num_tokens = h.data.shape[0]
    if num_tokens == 0:
        return
    _check(h, w13, w2, act, out, work, target)
    is_few = work.takes_few(num_tokens)
    if grouped is not None and not is_few and out.dtype == torch.bfloat16:
        grouped.up(h, w13, work, act)
        grouped.down(act, w2, work, out)
        return
    blocks = up_block(num_tokens, w13, target, is_few), down_block(num_tokens, w2, target, is_few)
    launch(h, w13, w2, work, act, out, blocks, pdl)


def launch(
    h: Activation, w13: PackedMatrix, w2: PackedMatrix, work: RouterWork, act: Activation, out: torch.Tensor,
    blocks: tuple[Block, Block], pdl: int,
) -> None:  # fmt: skip
    """`experts` with given tiles."""
    num_tokens, (up, down) = h.data.shape[0], blocks
    units = max_units(num_tokens, work.num_experts, work.top_k, up.bm)
    lists = (work.ids, work.counts, work.lists, work.units)
    capacity, a8 = work.lists.shape[1], h.scale is not None
    h_scales, act_scales = (h.scale, act.scale) if a8 else (h.data, act.data)  # bf16 has none: anything goes
    few: dict[str, bool] = {"ONE": num_tokens == 1} if work.takes_few(num_tokens) else {}
    if few:
        check_rows(down, w2)
    enqueue(
        _up_few_kernel if few else _up_many_kernel, (units * (w13.num_rows // up.bn), 1, 1), h.data, h_scales,
        *weight_tensors(w13, a8), *lists, act.data, act_scales, capacity, N=w13.num_rows, **matrix_constants(w13),
        EXPERTS=work.num_experts, TOP_K=work.top_k, A8=a8, BN=up.bn, BM=up.bm, BK=up.bk, **few, STAGES=up.stages,
        PDL=pdl, **launch_options(up.warps, pdl),
    )  # fmt: skip
    enqueue(
        _down_few_kernel if few else _down_many_kernel, (units * (w2.num_rows // down.bn), 1, 1), act.data, act_scales,
        *weight_tensors(w2, a8), *lists, work.weights, out, capacity, N=w2.num_rows, **matrix_constants(w2),
        EXPERTS=work.num_experts, A8=a8, BN=down.bn, BM=down.bm, BK=down.bk, **few, STAGES=down.stages, PDL=pdl,
        **launch_options(down.warps, pdl),
    )  # fmt: skip


def reference(
    h: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """The reference: weighted rows [T * k, H] float32 of every pair.

    Args:
        h: [T, H]; ids, weights: [T, k]; w13: [E, 2 I, H] values, rows of w1, then of w3; w2: [E, H, I] values.
    """
    rows = []
    for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (w13[expert].float() @ h[token].float()).chunk(2)
            rows.append(share * (w2[expert].float() @ (torch.nn.functional.silu(gate) * up)))
    return torch.stack(rows)


def _check(
    h: Activation, w13: PackedMatrix, w2: PackedMatrix, act: Activation, out: torch.Tensor, work: RouterWork,
    target: Target,
) -> None:  # fmt: skip
    if not w13.interleaved or w13.format != w2.format:
        raise ValueError("Experts need w1 and w3 interleaved, and w2 in the same format.")
    if w13.num_rows % 256 or 2 * w2.num_cols != w13.num_rows or w2.num_rows != w13.num_cols:
        shapes = f"w13 [{w13.num_rows}, {w13.num_cols}] and w2 [{w2.num_rows}, {w2.num_cols}]"
        raise ValueError(f"w13 [2 I, H] and w2 [H, I] with I a multiple of 128 are needed, got {shapes}.")
    check_activation(h, w13, target)
    check_activation(act, w2, target)
    pairs = h.data.shape[0] * work.top_k
    if act.data.shape[0] < pairs or out.shape[0] < pairs:
        raise ValueError(f"{pairs} pairs need as many rows, got {act.data.shape[0]} and {out.shape[0]}.")

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""y = x W^T for packed weights: few tokens (bound by the weights' bytes), many tokens (bound by arithmetic), lm_head.

FP8 weights meet FP8 activations on the matrix units, 128 columns at a time; each partial product is scaled by the
weight's and the token's scale and summed in float32 (W8A8). Without FP8 units the weights become bf16 in registers
(W8A16), as 4-bit weights do everywhere (W4A16). bf16 weights (lm_head) meet bf16 activations. Rows of an FP8 weight
share their scale in groups of 128, so a program's rows have one scale a step. Sums run in the order of k: same bits on
every run. On sm_90 other kernels, with wgmma, take many tokens (`grouped`). An input may lack its norm's 1 / rms
(`fused_norm`): the product of few tokens multiplies by it at last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from saddle.kernels.grouped import GroupedLinear
from saddle.kernels.launching import enqueue
from saddle.kernels.quant import Activation
from saddle.kernels.target import Target
from saddle.kernels.tile_dot import (
    Block,
    begin,
    bucket,
    check_activation,
    check_rows,
    choose,
    few_product,
    launch_options,
    many_product,
    matrix_constants,
    release,
    takes_fp8,
    weight_tensors,
)
from saddle.kernels.tiles import Bf16Tiles, PackedMatrix
from saddle.kernels.whole import cdiv, next_power_of_2

# Up to here the weights are the rows of the product and all tokens one block of columns.
MAX_FEW_TOKENS = 128
# Token blocks that share a stretch of the weights in the second-level cache.
BAND_BLOCKS = 8


@triton.jit(do_not_specialize=["num_tokens"])
def _few_kernel(
    a, a_scales, w, w_scales, w_groups, out, squares, eps, num_tokens, N: tl.constexpr, K: tl.constexpr,
    SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr,
    INT4: tl.constexpr, A8: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over the s-th part of k of w[n, k] a[m, k], the weights being the product's rows. GROUPS > 0:
    times 1 / rms of token m, from that many sums of squares."""
    block = tl.program_id(0)
    PART_K: tl.constexpr = K // SPLIT
    part = tl.program_id(1)
    n = tl.arange(0, BN)
    m = tl.arange(0, BM)
    first = block.to(tl.int64) * (BN // 16) * (K // SLOT_K)
    begin(PDL)
    if GROUPS > 0:
        group = tl.arange(0, GROUPS_PADDED)
        place = squares + group[:, None] * num_tokens + m[None, :]
        square = tl.load(place, mask=(group < GROUPS)[:, None] & (m < num_tokens)[None, :], other=0.0)
        inverse = tl.rsqrt(tl.sum(square, 0) / K + eps)
    total = few_product(
        a, a_scales, m, m < num_tokens, w, w_scales, w_groups, first, n, part * PART_K, part * PART_K + PART_K, K,
        SLOT_K, SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4, False, A8, BN, BM, BK, STAGES,
    )  # fmt: skip
    release(PDL)
    if GROUPS > 0:
        total *= inverse[None, :]
    place = part * num_tokens * N + m[None, :] * N + (block * BN + n)[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(m < num_tokens)[None, :] & (n >= 0)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _many_kernel(
    a, a_scales, w, w_scales, w_groups, out, num_tokens, N: tl.constexpr, K: tl.constexpr, SLOT_K: tl.constexpr,
    SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
    A8: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, ADD: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[m, n] for BM tokens and BN rows of the weight, the tokens being the product's rows; ADD: on top of out."""
    pid = tl.program_id(0)
    # Programs that run together cover few blocks of tokens: what they read fits the second-level cache.
    blocks = tl.cdiv(num_tokens, BM)
    per_band = BAND * (N // BN)
    first_block = pid // per_band * BAND
    height = tl.minimum(blocks - first_block, BAND)
    m_block = first_block + pid % per_band % height
    n_block = pid % per_band // height
    n = tl.arange(0, BN // 2)
    row = m_block * BM + tl.arange(0, BM)
    token = tl.minimum(row, num_tokens - 1).to(tl.int64)
    first = n_block.to(tl.int64) * (BN // 16) * (K // SLOT_K)
    begin(PDL)
    left, right = many_product(
        a, a_scales, token, w, w_scales, w_groups, first, n, K, SLOT_K, SLOT_BYTES, SIZE, SCALE_K, GROUP, INT4, False,
        A8, BN // 2, BM, BK, STAGES,
    )  # fmt: skip
    release(PDL)
    at = out + token[:, None] * N + (n_block * BN + n)[None, :]
    inside = (row < num_tokens)[:, None] & (n >= 0)[None, :]
    if ADD:
        left += tl.load(at, mask=inside, other=0.0)
        right += tl.load(at + BN // 2, mask=inside, other=0.0)
    tl.store(at, left.to(out.dtype.element_ty), mask=inside)
    tl.store(at + BN // 2, right.to(out.dtype.element_ty), mask=inside)


def few_block(num_tokens: int, w: PackedMatrix, target: Target) -> Block:
    """Tiles for up to `MAX_FEW_TOKENS` tokens, found on an H100."""
    size = bucket(num_tokens)
    bm = max(16, size)
    if isinstance(w.format, Bf16Tiles):
        block = Block(128, bm, 32, 10, 8)  # a step of one tile: a warp reads 512 adjacent bytes
    elif w.num_rows >= 64 * target.num_sms // 2:
        block = Block(32 if size <= 16 else 64, bm, 128, 5, 4)
    else:
        block = Block(64, bm, 128, 5 if size < 128 else 3, 4)
    return choose("few", num_tokens, w, target, block)


def many_block(num_tokens: int, w: PackedMatrix, target: Target) -> Block:
    """Tiles for more tokens; a program's rows of the weight are two products."""
    size = bucket(num_tokens)
    tall = cdiv(size, 256) * (w.num_rows // 128)
    wide = cdiv(size, 128) * (w.num_rows // 256)
    # Tall tiles load least a product, if they occupy nine tenths of the chip to the end.
    if size > 256 and tall >= 0.9 * target.num_sms * cdiv(tall, target.num_sms):
        block = Block(128, 256, 128, 3, 8)
    elif size > 256 and 0.7 * target.num_sms <= wide <= target.num_sms:
        block = Block(256, 128, 128, 4, 8)  # in one round: 72 us instead of 79 for 3072 x 6144 and 1,024 tokens
    else:
        block = Block(128, 128, 128, 4, 8) if size > 256 else Block(256, 64, 128, 4, 8)
    if not takes_fp8(w, target):
        block = Block(128, 128, 64, 4, 8)
    return choose("many", num_tokens, w, target, block)


def split_k(num_tokens: int, w: PackedMatrix, target: Target) -> int:
    """Parts of k that separate programs sum, so that a narrow matrix occupies the chip at few tokens."""
    if num_tokens > MAX_FEW_TOKENS:
        return 1
    block = few_block(num_tokens, w, target)
    parts = 1
    while w.num_rows // block.bn * parts < target.num_sms and parts < 8 and w.num_cols % (2 * parts * block.bk) == 0:
        parts *= 2
    return parts


def linear(
    a: Activation, w: PackedMatrix, out: torch.Tensor, target: Target, pdl: int = 0,
    grouped: GroupedLinear | None = None, add: bool = False, squares: torch.Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """out = a W^T, or out += a W^T.

    Args:
        a: [T, K]; FP8 where the target has FP8 units and W is FP8, else bf16.
        w: [N, K], not interleaved.
        out: [T, N] bf16 or float32, or the parts [S, T, N] of `split_k`, all contiguous.
        add: on top of what out [T, N] float32 holds; for more than `MAX_FEW_TOKENS` tokens.
        grouped: the wgmma kernels of weights of this shape, where they run; they take what is faster there.
        squares, eps: of `fused_norm.add_norm`, whose output a is, for at most `MAX_FEW_TOKENS` tokens.

    Raises:
        ValueError: the activation's form does not fit the weight and the target, a sum cannot be added to out, or
            squares are given for many tokens.
    """
    num_tokens = a.data.shape[0]
    if num_tokens == 0:
        return
    if add and (num_tokens <= MAX_FEW_TOKENS or out.dtype != torch.float32 or out.dim() != 2):
        raise ValueError(f"Sums of more than {MAX_FEW_TOKENS} tokens are added to [T, N] float32, got "
                         f"{list(out.shape)} {out.dtype}.")  # fmt: skip
    check_activation(a, w, target)
    if num_tokens > MAX_FEW_TOKENS and squares is not None:
        raise ValueError(f"Norms of more than {MAX_FEW_TOKENS} tokens are not left to their product, got {num_tokens}.")
    if num_tokens > MAX_FEW_TOKENS and out.dim() == 3 and out.shape[0] != 1:
        raise ValueError(f"{num_tokens} tokens are not split along k, got out {list(out.shape)}.")
    if grouped is not None and squares is None and grouped.pays(num_tokens):
        grouped(a, w, out, add)
        return
    few = num_tokens <= MAX_FEW_TOKENS
    block = few_block(num_tokens, w, target) if few else many_block(num_tokens, w, target)
    launch(a, w, out, block, pdl, add, squares, eps)


def launch(
    a: Activation, w: PackedMatrix, out: torch.Tensor, block: Block, pdl: int, add: bool = False,
    squares: torch.Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """`linear` with given tiles."""
    num_tokens, a8 = a.data.shape[0], a.scale is not None
    tensors = (a.data, a.scale if a8 else a.data, *weight_tensors(w, a8), out)
    constants = {"N": w.num_rows, **matrix_constants(w), "A8": a8, "BN": block.bn, "BM": block.bm, "BK": block.bk,
                 "STAGES": block.stages, "PDL": pdl, **launch_options(block.warps, pdl)}  # fmt: skip
    if num_tokens <= MAX_FEW_TOKENS:
        check_rows(block, w)
        parts = 1 if out.dim() == 2 else out.shape[0]
        groups = 0 if squares is None else len(squares)
        enqueue(_few_kernel, (w.num_rows // block.bn, parts, 1), *tensors, squares, eps, num_tokens, SPLIT=parts,
                GROUPS=groups, GROUPS_PADDED=next_power_of_2(max(1, groups)), **constants)  # fmt: skip
    else:
        programs = cdiv(num_tokens, block.bm) * (w.num_rows // block.bn)
        enqueue(_many_kernel, (programs, 1, 1), *tensors, num_tokens, BAND=BAND_BLOCKS, ADD=add, **constants)


def lm_head(h: torch.Tensor, w: PackedMatrix, out: torch.Tensor, target: Target, pdl: int = 0) -> None:
    """Logits out [S, V] float32 of h [S, H] bf16; w bf16 [V, H]."""
    linear(Activation(h, None), w, out, target, pdl)


def reference(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The reference: [T, N] float32 of values a [T, K] and w [N, K]."""
    return a.to(torch.float32) @ w.to(torch.float32).T

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What the Triton kernels over packed weights share: addresses in tiles, FP8 widened in registers, launch order.

A [BN, BK] block of a packed matrix (see `tiles`) is read with plain pointer arithmetic: 16 bytes a thread, four
threads to a row of a tile, so that eight rows of a tile are 512 contiguous bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saddle.kernels.quant import Activation
from saddle.kernels.target import Target
from saddle.kernels.tiles import Fp8Tiles, NibbleTiles, PackedMatrix, row_bytes

SCALE_ROWS = 128  # rows of an FP8 weight that share their scales
# Shared memory that a kernel uses beside its pipeline: reductions and layout changes.
SPARE_SHARED_BYTES = 6 * 1024


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernel before; PDL 1: let the next one start at once. Memory of other kernels only after this."""
    if PDL > 0:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()


@triton.jit
def release(PDL: tl.constexpr):
    """PDL 2: let the next kernel start, because only the epilogue is left."""
    if PDL == 2:
        gdc_launch_dependents()


@triton.jit
def weight_places(
    w, w_groups, first, n, k, K: tl.constexpr, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr,
    GROUP: tl.constexpr, INT4: tl.constexpr,
):  # fmt: skip
    """Pointers to a block of weights [rows, columns] and to its rows' group scales [rows] (4-bit; else unused).

    first: slots before the block's first row of tiles; n, k: rows and columns (bytes, 4-bit) within the block.
    """
    TILE_K: tl.constexpr = 64 // SIZE
    SLOT_VALUES: tl.constexpr = SLOT_BYTES // SIZE
    places = row_places(n, K // SLOT_K * SLOT_VALUES, TILE_K)[:, None] + column_places(k, TILE_K)[None, :]
    w_at = w + first * SLOT_VALUES + places
    if GROUP > 0:
        UNIT: tl.constexpr = 2 if INT4 else 1
        g_at = w_groups + first * (SLOT_BYTES // UNIT) + group_places(n, K, SLOT_K, SLOT_BYTES, GROUP, INT4)
    else:
        g_at = w_groups + n
    return w_at, g_at


@triton.jit
def row_places(rows, ROW_VALUES: tl.constexpr, TILE_K: tl.constexpr):
    """Offsets of rows of a matrix; ROW_VALUES: numbers from one row of tiles to the next."""
    return (rows // 16) * ROW_VALUES + (rows % 16) * TILE_K


@triton.jit
def column_places(columns, TILE_K: tl.constexpr):
    """Offsets of columns within a slot."""
    return (columns // TILE_K) * (16 * TILE_K) + columns % TILE_K


@triton.jit
def slot_place(k, SLOT_K: tl.constexpr, SLOT_VALUES: tl.constexpr):
    """Offset of column k, a multiple of a tile's columns."""
    return (k // SLOT_K) * SLOT_VALUES + (k % SLOT_K) * 16


@triton.jit
def scale_place(k, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, SCALE_K: tl.constexpr):
    """Offset in float32 of the scale of rows 0 to 7 for column k; that of rows 8 to 15 follows."""
    return (k // SLOT_K) * (SLOT_BYTES // 4) + SLOT_K * 4 + (k % SLOT_K) // SCALE_K * 2


@triton.jit
def widen(weights):
    """E4M3 bytes as bfloat16, exactly: seven bits moved under bfloat16's exponent are the value times 2^-120."""
    bits = ((weights & 0x80).to(tl.uint16) << 8) | ((weights & 0x7F).to(tl.uint16) << 4)
    return bits.to(tl.bfloat16, bitcast=True) * 1329227995784915872903807060280344576.0


@triton.jit
def nibble_values(numbers, scales, INT4: tl.constexpr):
    """4-bit numbers times their scales, bfloat16 (exact for e2m1, whose three bits are moved like E4M3's seven)."""
    if INT4:
        wide = (numbers.to(tl.int32) - 8).to(tl.float32).to(tl.bfloat16)
    else:
        bits = ((numbers & 8).to(tl.uint16) << 12) | ((numbers & 7).to(tl.uint16) << 6)
        wide = bits.to(tl.bfloat16, bitcast=True) * 85070591730234615865843651857942052864.0
    return wide * scales


@triton.jit
def group_scales(
    g_at, step, columns, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
):  # fmt: skip
    """Scales [BN, columns] of a 4-bit weight; g_at: places of its rows in bytes (E4M3) or bfloat16."""
    SLOT_SCALES: tl.constexpr = SLOT_BYTES // 2 if INT4 else SLOT_BYTES
    place = (step // SLOT_K) * SLOT_SCALES + (step % SLOT_K + columns) // GROUP
    scales = tl.load(g_at[:, None] + place[None, :])
    if not INT4:
        scales = widen(scales)
    return scales


@triton.jit
def group_places(
    rows, K: tl.constexpr, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
):  # fmt: skip
    """Offsets of the scales of rows of a 4-bit weight."""
    UNIT: tl.constexpr = 2 if INT4 else 1
    return (rows // 16) * (K // SLOT_K * SLOT_BYTES // UNIT) + 8 * SLOT_K // UNIT + rows % 16 * (SLOT_K // GROUP)


@triton.jit
def factors(s_at, rows, SLOT_K: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr):
    """Factors [BN] of a 4-bit weight, rows alternating 8 by 8 between two."""
    UNIT: tl.constexpr = 2 if INT4 else 1
    at = s_at + 2 * SLOT_K + 4 * UNIT * SLOT_K // GROUP
    return tl.where(rows % 16 < 8, tl.load(at), tl.load(at + 1))


@triton.jit
def add_step(
    total, numbers, high, shares, w_at, s_at, g_at, step, n, k, SLOT_K: tl.constexpr, SLOT_BYTES: tl.constexpr,
    SIZE: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr, HALVES: tl.constexpr,
    A8: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
):  # fmt: skip
    """total plus the product of the weight's columns from `step` on and the activation's, whatever the format.

    total is [weight rows, tokens] where WEIGHTS_FIRST, else [tokens, weight rows]; numbers (and `high`, the upper half
    of the step's columns, 4-bit) are [columns, tokens] or [tokens, columns]; w_at points to [weight rows, columns].
    HALVES: rows alternate 8 by 8 between two scales. shares: the tokens' scales [tokens] for this step, where A8.
    """
    if GROUP > 0:
        packed = tl.load(w_at + (step // SLOT_K) * SLOT_BYTES + step % SLOT_K * 8, eviction_policy="evict_first")
        low_weights = nibble_values(packed & 15, group_scales(g_at, step, k, SLOT_K, SLOT_BYTES, GROUP, INT4), INT4)
        scales = group_scales(g_at, step, k + 64, SLOT_K, SLOT_BYTES, GROUP, INT4)
        high_weights = nibble_values(packed >> 4, scales, INT4)
        if WEIGHTS_FIRST:
            total = tl.dot(high_weights, high, tl.dot(low_weights, numbers, total))
        else:
            total = tl.dot(high, high_weights.T, tl.dot(numbers, low_weights.T, total))
    else:
        at = w_at + slot_place(step, SLOT_K, SLOT_BYTES // SIZE)
        if WEIGHTS_FIRST:
            weights = tl.load(at, eviction_policy="evict_first")  # read once: leaves the cache to the activations
        else:
            weights = tl.load(at)
        if SCALE_K == 0:
            total = tl.dot(weights, numbers, total) if WEIGHTS_FIRST else tl.dot(numbers, weights.T, total)
        else:
            scale_at = s_at + scale_place(step, SLOT_K, SLOT_BYTES, SCALE_K)
            scale = tl.load(scale_at)
            if not A8:
                weights = widen(weights)
            product = tl.dot(weights, numbers) if WEIGHTS_FIRST else tl.dot(numbers, weights.T)
            if HALVES:
                scales = tl.where(n % 16 < 8, scale, tl.load(scale_at + 1))
                if A8:
                    if WEIGHTS_FIRST:
                        total += product * (shares[None, :] * scales[:, None])
                    else:
                        total += product * (shares[:, None] * scales[None, :])
                else:
                    total += product * (scales[:, None] if WEIGHTS_FIRST else scales[None, :])
            elif A8:
                both = shares * scale
                total += product * (both[None, :] if WEIGHTS_FIRST else both[:, None])
            else:
                total += product * scale
    return total


@triton.jit
def few_product(
    a, a_scales, token, real, w, w_scales, w_groups, first, n, start, stop, K: tl.constexpr, SLOT_K: tl.constexpr,
    SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
    HALVES: tl.constexpr, A8: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, BM]: rows of a weight times tokens (rows `token` of a; those not `real` are zero and read nothing), over
    the columns from `start` to `stop`. `first`: slots before the block's first row of tiles."""
    k = tl.arange(0, BK // 2 if GROUP > 0 else BK)
    w_at, g_at = weight_places(w, w_groups, first, n, k, K, SLOT_K, SLOT_BYTES, SIZE, GROUP, INT4)
    s_at = w_scales + first * (SLOT_BYTES // 4)
    a_at = a + token[None, :] * K + k[:, None]
    inside = real[None, :] & (k >= 0)[:, None]
    total = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(start, stop, BK, num_stages=STAGES):
        numbers = tl.load(a_at + step, mask=inside, other=0.0)
        high = tl.load(a_at + step + 64, mask=inside, other=0.0) if GROUP > 0 else numbers
        shares = tl.load(a_scales + token * (K // 128) + step // 128, mask=real, other=0.0) if A8 else real
        total = add_step(total, numbers, high, shares, w_at, s_at, g_at, step, n, k, SLOT_K, SLOT_BYTES, SIZE,
                         SCALE_K, GROUP, INT4, HALVES, A8, True)  # fmt: skip
    if GROUP > 0:
        total *= factors(s_at, n, SLOT_K, GROUP, INT4)[:, None]
    return total


@triton.jit
def many_product(
    a, a_scales, token, w, w_scales, w_groups, first, n, K: tl.constexpr, SLOT_K: tl.constexpr,
    SLOT_BYTES: tl.constexpr, SIZE: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
    HALVES: tl.constexpr, A8: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Two times [BM, BN]: tokens (rows `token` of a) times BN rows of a weight, and times the next BN rows.

    Two products share a tile of the activation: what a multiprocessor loads a multiplication falls by a quarter, and
    only one product at a time waits in registers to be scaled.
    """
    k = tl.arange(0, BK // 2 if GROUP > 0 else BK)
    NEXT: tl.constexpr = BN // 16 * (K // SLOT_K) * SLOT_BYTES  # bytes from one row's numbers to its twin's
    w_at, g_at = weight_places(w, w_groups, first, n, k, K, SLOT_K, SLOT_BYTES, SIZE, GROUP, INT4)
    s_at = w_scales + first * (SLOT_BYTES // 4)
    v_at, r_at, h_at = w_at + NEXT // SIZE, s_at + NEXT // 4, g_at + NEXT // (2 if INT4 else 1)
    a_at = a + token[:, None] * K + k[None, :]
    left = tl.zeros([BM, BN], tl.float32)
    right = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, K, BK, num_stages=STAGES):
        numbers = tl.load(a_at + step)
        high = tl.load(a_at + step + 64) if GROUP > 0 else numbers
        shares = tl.load(a_scales + token * (K // 128) + step // 128) if A8 else token
        left = add_step(left, numbers, high, shares, w_at, s_at, g_at, step, n, k, SLOT_K, SLOT_BYTES, SIZE, SCALE_K,
                        GROUP, INT4, HALVES, A8, False)  # fmt: skip
        right = add_step(right, numbers, high, shares, v_at, r_at, h_at, step, n, k, SLOT_K, SLOT_BYTES, SIZE,
                         SCALE_K, GROUP, INT4, HALVES, A8, False)  # fmt: skip
    if GROUP > 0:
        left *= factors(s_at, n, SLOT_K, GROUP, INT4)[None, :]
        right *= factors(r_at, n, SLOT_K, GROUP, INT4)[None, :]
    return left, right


@triton.jit
def fp8_scale(largest, FP8: tl.constexpr):
    """Scale of numbers whose largest magnitude is given (`quant.quantise`)."""
    LARGEST: tl.constexpr = 240.0 if tl.float8e4b8 == FP8 else 448.0
    return tl.maximum(largest, 1e-10) / LARGEST


@triton.jit
def quantised(values, AXIS: tl.constexpr, FP8: tl.constexpr):
    """Scale [.] of each group of values along AXIS, and the values divided by it, in FP8."""
    scale = fp8_scale(tl.max(tl.abs(values), AXIS), FP8)
    return scale, (values / tl.expand_dims(scale, AXIS)).to(FP8)


@dataclass(frozen=True, slots=True)
class Block:
    """How one kernel cuts its work: BN rows of the weight x BM tokens x BK columns a turn, `stages` turns in flight."""

    bn: int
    bm: int
    bk: int
    stages: int
    warps: int


def matrix_constants(w: PackedMatrix) -> dict[str, Any]:
    """The compile-time constants by which a kernel finds its way in a matrix."""
    return {
        "K": w.num_cols,
        "SLOT_K": w.slot_k,
        "SLOT_BYTES": w.slot_bytes,
        "SIZE": w.format.dtype.itemsize,
        "SCALE_K": w.format.scale_k if isinstance(w.format, Fp8Tiles) else 0,
        "GROUP": w.format.group if isinstance(w.format, NibbleTiles) else 0,
        "INT4": isinstance(w.format, NibbleTiles) and w.format.numbers == "int4",
    }


def weight_tensors(w: PackedMatrix, a8: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matrix as a kernel takes it: numbers (bytes where they are widened), float32, and group scales."""
    int4 = isinstance(w.format, NibbleTiles) and w.format.numbers == "int4"
    numbers = w.data if isinstance(w.format, Fp8Tiles) and not a8 else w.values
    return numbers, w.scale_values, w.group_values if int4 else w.data


def takes_fp8(w: PackedMatrix, target: Target) -> bool:
    """Whether products with this weight take FP8 activations on this target, else bf16."""
    return isinstance(w.format, Fp8Tiles) and target.has_fp8_dot


def check_activation(a: Activation, w: PackedMatrix, target: Target) -> None:
    """Raise a ValueError if the activation's form or width does not fit the weight."""
    if (a.scale is not None) != takes_fp8(w, target):
        form = target.fp8_dtype if takes_fp8(w, target) else torch.bfloat16
        raise ValueError(f"A weight of {w.format} on {target.arch} takes activations of {form}, got {a.data.dtype}.")
    if a.data.shape[1] != w.num_cols:
        raise ValueError(f"A weight of {w.num_cols} columns takes as many, got {list(a.data.shape)}.")


def check_rows(block: Block, w: PackedMatrix) -> None:
    """Raise a ValueError if the rows of a product of few tokens would have more than one scale a step."""
    if isinstance(w.format, Fp8Tiles) and not w.interleaved and SCALE_ROWS % block.bn:
        raise ValueError(f"{SCALE_ROWS} rows of an FP8 weight share their scales, a tile cannot have {block.bn}.")


def bucket(num_tokens: int) -> int:
    """The number of tokens that tiles are chosen for: the next power of two, at most 8,192."""
    return min(8192, 1 << max(0, num_tokens - 1).bit_length())


def block_key(kernel: str, num_tokens: int, w: PackedMatrix) -> str:
    """Name of a choice of tiles."""
    return f"{kernel} {bucket(num_tokens)} {w.num_rows}x{w.num_cols} {w.format}"


def choose(kernel: str, num_tokens: int, w: PackedMatrix, target: Target, default: Block) -> Block:
    """The measured tiles of this card, else the default ones, such that they fit."""
    measured = target.blocks.get(block_key(kernel, num_tokens, w)) if target.blocks else None
    return fit(default if measured is None else Block(*measured), w, target)


def fit(block: Block, w: PackedMatrix, target: Target) -> Block:
    """A block that the matrix and the shared memory allow: a step of k lies in one slot and under one scale."""
    bn, bk = block.bn, block.bk
    while w.num_rows % bn:
        bn //= 2
    if isinstance(w.format, NibbleTiles):
        bk = 128  # one tile's columns
    unit = w.format.scale_k if isinstance(w.format, Fp8Tiles) else w.slot_k
    while w.slot_k % bk or unit % bk:
        bk //= 2
    column = bn * row_bytes(128, w.format) / 128 + block.bm * (1 if takes_fp8(w, target) else 2)
    room = target.shared_bytes - SPARE_SHARED_BYTES
    # Two turns in flight and one at work at least: narrower steps where memory is short.
    while room // (bk * column) < min(3, block.stages) and bk > 64 and not isinstance(w.format, NibbleTiles):
        bk //= 2
    stages = min(block.stages, max(1, int(room // (bk * column))))
    if isinstance(w.format, NibbleTiles):
        stages = min(stages, 3)  # widened numbers lie in shared memory too
    if not target.is_cuda:
        # No asynchronous copies that many turns could have in flight; widened 4-bit numbers take the room of two.
        stages = min(stages, 1 if isinstance(w.format, NibbleTiles) else 2)
    return Block(bn, block.bm, bk, stages, block.warps)


def launch_options(warps: int, pdl: int) -> dict[str, Any]:
    """Keyword arguments of a launch; `launch_pdl` exists on sm_90 and newer only."""
    return {"num_warps": warps, **({"launch_pdl": True} if pdl else {})}

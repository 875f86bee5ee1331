# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What the Triton kernels over packed weights share: addresses in tiles, FP8 widened in registers, launch order.

A [BN, BK] block of a packed matrix (see `tiles`) is read with plain pointer arithmetic: 16 bytes a thread, four
threads to a row of a tile, so that eight rows of a tile are 512 contiguous bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saddle.kernels.target import Target
from saddle.kernels.tiles import TILE_ROW_BYTES, TILE_ROWS, Bf16Tiles, PackedMatrix

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
def quantised(values, AXIS: tl.constexpr, FP8: tl.constexpr):
    """Scale [.] of each group of values along AXIS, and the values divided by it, in FP8 (`quant.quantise`)."""
    LARGEST: tl.constexpr = 240.0 if tl.float8e4b8 == FP8 else 448.0
    scale = tl.maximum(tl.max(tl.abs(values), AXIS), 1e-10) / LARGEST
    return scale, (values / tl.expand_dims(scale, AXIS)).to(FP8)


@dataclass(frozen=True, slots=True)
class Block:
    """How one kernel cuts its work: BN rows of the weight x BM tokens x BK columns a turn, `stages` turns in flight."""

    bn: int
    bm: int
    bk: int
    stages: int
    warps: int


def matrix_constants(w: PackedMatrix) -> dict[str, int]:
    """The compile-time constants by which a kernel finds its way in a matrix."""
    size = w.format.dtype.itemsize
    return {
        "K": w.num_cols,
        "SLOT_K": w.slot_k,
        "SLOT_BYTES": w.slot_bytes,
        "SIZE": size,
        "SCALE_K": 0 if isinstance(w.format, Bf16Tiles) else w.format.scale_k,
    }


def fit(block: Block, w: PackedMatrix, num_rows: int, activation_bytes: int, target: Target) -> Block:
    """A block that the matrix and the shared memory allow: a step of k lies in one slot and under one scale.

    Args:
        num_rows: rows of the matrix that programs share out.
        activation_bytes: of one number of the activation.
    """
    unit = w.slot_k if isinstance(w.format, Bf16Tiles) else min(w.slot_k, w.format.scale_k)
    bn, bk = block.bn, block.bk
    while w.slot_k % bk or unit % bk:
        bk //= 2
    while num_rows % bn:
        bn //= 2
    column = bn * w.format.dtype.itemsize + block.bm * activation_bytes
    room = target.shared_bytes - SPARE_SHARED_BYTES
    # Two turns in flight and one at work at least: narrower steps where memory is short.
    while room // (bk * column) < min(3, block.stages) and bk > 64:
        bk //= 2
    stages = min(block.stages, max(1, room // (bk * column)))
    if not target.is_cuda:
        stages = min(stages, 2)  # no asynchronous copies that many turns could have in flight
    return Block(bn, block.bm, bk, stages, block.warps)


def launch_options(block: Block, pdl: int) -> dict[str, Any]:
    """Keyword arguments of a launch; `launch_pdl` exists on sm_90 and newer only."""
    return {"num_warps": block.warps, **({"launch_pdl": True} if pdl else {})}


__all__ = [
    "TILE_ROWS",
    "TILE_ROW_BYTES",
    "Block",
    "begin",
    "column_places",
    "fit",
    "launch_options",
    "matrix_constants",
    "quantised",
    "release",
    "row_places",
    "scale_place",
    "slot_place",
    "widen",
]

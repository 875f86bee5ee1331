"""Packed weights: the one resident layout that every GPU kernel reads.

A weight W [N, K] (y = x W^T) is cut into tiles of 16 rows x 64 bytes, each tile contiguous and row-major inside
(1,024 bytes): FP8 16 x 64 numbers, bf16 16 x 32. A *slot* is 16 rows x `slot_k` columns: its tiles in the order of k,
then, for FP8, float32 scales [slot_k / scale_k][2], one for rows 0 to 7 and one for rows 8 to 15, padded to a multiple
of 128 bytes. Storage is uint8 [.., N / 16, K / slot_k, slot_bytes]; a leading dimension counts experts.

Why: a slot is one bulk copy of about 24 KB with all that is needed to use it; a warp that reads 16 bytes a lane from
a tile (row lane / 4, bytes 16 * (lane % 4)) has no bank conflict and holds an operand of mma.m16n8k16; threads that
read rows of 64 bytes one after the other read whole lines of memory.

4-bit numbers lie two to a byte, 128 columns to a tile's row: byte j holds column j (low half) and column 64 + j, so
that each half is 64 adjacent columns of the activation. Their slot has one scale per row and group of columns,
[16][slot_k / group], and then two float32 factors of the whole weight, for rows 0 to 7 and 8 to 15.

w1 (gate) and w3 (up) of an expert are one *interleaved* matrix [2 I, K]: a tile holds 8 rows of w1, then the same 8
rows of w3, so that a lane which holds the rows g and g + 8 of a product holds gate and up of one column, and the two
scales of a slot's k block are those of w1 and of w3.

Nothing here needs a GPU or Triton; packing and unpacking are reshapes and work on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

TILE_ROWS = 16
HALF_ROWS = 8
TILE_ROW_BYTES = 64
TILE_BYTES = TILE_ROWS * TILE_ROW_BYTES
# Slots are bulk copies into shared memory: their size is a multiple of a cache line.
SLOT_ALIGNMENT = 128
# 24 KB of weights a slot: two slots in flight a multiprocessor saturate the memory, smaller copies do not.
MAX_SLOT_ROW_BYTES = 1536


@dataclass(frozen=True, slots=True)
class Fp8Tiles:
    """E4M3 numbers with a float32 scale per 8 rows x `scale_k` columns.

    scale_k   128; 64 or 32 where a rank's slice of a 128-block is narrower
    fnuz      numbers are E4M3FNUZ (gfx942): the same bytes stand for half the value, minus zero does not exist
    """

    scale_k: int = 128
    fnuz: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fnuz if self.fnuz else torch.float8_e4m3fn

    @property
    def slot_k_unit(self) -> int:
        return max(self.scale_k, TILE_ROW_BYTES)


@dataclass(frozen=True, slots=True)
class Bf16Tiles:
    """Plain bfloat16 numbers, no scales."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def slot_k_unit(self) -> int:
        return 64


@dataclass(frozen=True, slots=True)
class NibbleTiles:
    """4-bit numbers with a scale per row and `group` columns.

    numbers   "e2m1": sign, two bits of exponent, one of mantissa; scales E4M3 (NVFP4, group 16)
              "int4": value + 8; scales bfloat16 (group 32 or 128)
    """

    numbers: Literal["e2m1", "int4"]
    group: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.numbers == "e2m1" else torch.bfloat16

    @property
    def slot_k_unit(self) -> int:
        return 2 * TILE_ROW_BYTES


TileFormat = Fp8Tiles | Bf16Tiles | NibbleTiles


def row_bytes(num_cols: int, tile_format: TileFormat) -> int:
    """Bytes of the numbers of one row."""
    return num_cols // 2 if isinstance(tile_format, NibbleTiles) else num_cols * tile_format.dtype.itemsize


def slot_columns(num_cols: int, tile_format: TileFormat) -> int:
    """`slot_k` of a matrix: the largest multiple of the format's unit within 1,536 bytes that divides K.

    Raises:
        ValueError: K is no multiple of the unit.
    """
    unit = tile_format.slot_k_unit
    if num_cols % unit:
        raise ValueError(f"A packed matrix needs a multiple of {unit} columns, got {num_cols}.")
    most = MAX_SLOT_ROW_BYTES // row_bytes(unit, tile_format)
    units = num_cols // unit
    return unit * max(count for count in range(1, most + 1) if units % count == 0)


@dataclass(eq=False)
class PackedMatrix:
    """A weight [.., num_rows, num_cols] in tiles.

    data           uint8 [.., num_rows / 16, num_cols / slot_k, slot_bytes], contiguous
    interleaved    rows alternate 8 by 8 between the first and the second half of the matrix (w1 and w3)
    values         `data` seen as numbers of the format's dtype, [.., slot_bytes / itemsize]
    scale_values   `data` seen as float32 [.., slot_bytes / 4] (scales of FP8, factors of 4-bit numbers)
    group_values   `data` seen as bfloat16 [.., slot_bytes / 2] (group scales of int4)
    """

    data: torch.Tensor = field(repr=False)
    num_rows: int
    num_cols: int
    slot_k: int
    format: TileFormat
    interleaved: bool = False
    values: torch.Tensor = field(init=False, repr=False)
    scale_values: torch.Tensor = field(init=False, repr=False)
    group_values: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape = (self.num_rows // TILE_ROWS, self.num_cols // self.slot_k, slot_bytes(self.slot_k, self.format))
        if self.data.dtype != torch.uint8 or self.data.shape[-3:] != shape or not self.data.is_contiguous():
            found = f"{self.data.dtype} {list(self.data.shape)}"
            raise ValueError(f"A packed matrix needs contiguous uint8 [.., {', '.join(map(str, shape))}], got {found}.")
        self.values = self.data.view(self.format.dtype)
        self.scale_values = self.data.view(torch.float32)
        self.group_values = self.data.view(torch.bfloat16)

    @property
    def num_slots(self) -> int:
        """Slots along k."""
        return self.num_cols // self.slot_k

    @property
    def slot_bytes(self) -> int:
        return self.data.shape[-1]

    @property
    def num_bytes(self) -> int:
        return self.data.numel()


def slot_bytes(slot_k: int, tile_format: TileFormat) -> int:
    """Bytes of one slot, padding included."""
    used = TILE_ROWS * row_bytes(slot_k, tile_format)
    if isinstance(tile_format, Fp8Tiles):
        used += slot_k // tile_format.scale_k * 2 * 4
    if isinstance(tile_format, NibbleTiles):
        used += TILE_ROWS * slot_k // tile_format.group * tile_format.scale_dtype.itemsize + 2 * 4
    return -(-used // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def packed_shape(num_rows: int, num_cols: int, tile_format: TileFormat) -> tuple[int, int, int]:
    """Shape of `PackedMatrix.data` for one matrix.

    Raises:
        ValueError: the rows are no multiple of 16, or the columns of the format's unit.
    """
    if num_rows % TILE_ROWS:
        raise ValueError(f"A packed matrix needs a multiple of {TILE_ROWS} rows, got {num_rows}.")
    slot_k = slot_columns(num_cols, tile_format)
    return num_rows // TILE_ROWS, num_cols // slot_k, slot_bytes(slot_k, tile_format)


def allocate(
    num_rows: int,
    num_cols: int,
    tile_format: TileFormat,
    device: torch.device | str,
    lead: tuple[int, ...] = (),
    interleaved: bool = False,
) -> PackedMatrix:
    """An unfilled matrix [*lead, num_rows, num_cols]; the padding of its slots is zero."""
    shape = packed_shape(num_rows, num_cols, tile_format)
    slot_k = slot_columns(num_cols, tile_format)
    data = torch.empty((*lead, *shape), dtype=torch.uint8, device=device)
    used = TILE_ROWS * row_bytes(slot_k, tile_format)
    data[..., used:] = 0
    return PackedMatrix(data, num_rows, num_cols, slot_k, tile_format, interleaved)


def tile_view(matrix: PackedMatrix) -> torch.Tensor:
    """The numbers of all tiles as int64 words: [.., N / 16, K / slot_k, tiles, 2 (half), 8 (row), 8], a view."""
    used = TILE_ROWS * row_bytes(matrix.slot_k, matrix.format)
    words = matrix.data.view(torch.int64)[..., : used // 8]
    return torch.unflatten(words, -1, (used // TILE_BYTES, 2, HALF_ROWS, TILE_ROW_BYTES // 8))


def scale_view(matrix: PackedMatrix) -> torch.Tensor:
    """The scales: float32 [.., N / 16, K / slot_k, slot_k / scale_k, 2 (half)], a view.

    Raises:
        ValueError: the format has none.
    """
    if not isinstance(matrix.format, Fp8Tiles):
        raise ValueError(f"A matrix of {matrix.format} has no scales per block.")
    first, count = TILE_ROWS * matrix.slot_k // 4, matrix.slot_k // matrix.format.scale_k
    return torch.unflatten(matrix.scale_values[..., first : first + 2 * count], -1, (count, 2))


def pack_into(
    matrix: PackedMatrix,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    row: int = 0,
    half: int | None = None,
    expert: int | None = None,
) -> None:
    """Write rows of a weight.

    Args:
        weight: [.., R, K], float8_e4m3fn or bfloat16 as the format says (never fnuz: bytes are converted here).
        scale: [.., R / r, K / c] float32 with r a multiple of 8 and c one of scale_k; FP8 only. Repeated as needed.
        row: first row in the matrix; for an interleaved one, in the half.
        half: of an interleaved matrix: 0 (w1) or 1 (w3); None writes both, weight holding w1's rows, then w3's.
        expert: index of the leading dimension; None where weight has the leading dimensions too.

    Raises:
        ValueError: shapes, dtypes or rows do not fit.
    """
    if isinstance(matrix.format, NibbleTiles):
        raise ValueError("4-bit numbers are packed by nibbles.pack_into.")
    place_rows(matrix, _as_words(weight, matrix.format), row, half, expert)
    if not isinstance(matrix.format, Fp8Tiles):
        return
    if scale is None:
        raise ValueError("An FP8 weight needs its scales.")
    # A byte of fnuz stands for half of what it stands for in fn.
    factor = 2.0 if matrix.format.fnuz else 1.0
    wide = _repeated_scales(scale * factor, weight, matrix.format.scale_k)
    scales = scale_view(matrix)
    scales = scales if expert is None else scales[expert]
    step = HALF_ROWS if matrix.interleaved else TILE_ROWS
    rows = weight.shape[-2] // (2 if matrix.interleaved and half is None else 1)
    part = slice(row // step, (row + rows) // step)
    both = half is None or not matrix.interleaved
    (scales[..., part, :, :, :] if both else scales[..., part, :, :, half]).copy_(_tiled_scales(wide, matrix, half))


def place_rows(
    matrix: PackedMatrix, words: torch.Tensor, row: int, half: int | None = None, expert: int | None = None
) -> None:
    """Write the numbers of rows, as int64 words [.., R, row bytes / 8]; arguments as `pack_into`."""
    tiles = tile_view(matrix)
    tiles = tiles if expert is None else tiles[expert]
    both = half is None or not matrix.interleaved
    rows = words.shape[-2] // (2 if matrix.interleaved and half is None else 1)
    step = HALF_ROWS if matrix.interleaved else TILE_ROWS
    fits = words.shape[-1] * 8 == row_bytes(matrix.num_cols, matrix.format) and (half is None or matrix.interleaved)
    if not fits or rows % step or row % step:
        raise ValueError(f"{rows} rows at {row} of {words.shape[-1] * 8} bytes do not fit {matrix} in steps of {step}.")
    part = slice(row // step, (row + rows) // step)
    into = tiles[..., part, :, :, :, :, :] if both else tiles[..., part, :, :, half, :, :]
    into.copy_(_tiled(words, matrix, half))


def pack(
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    interleaved: bool = False,
    scale_k: int = 128,
    fnuz: bool = False,
) -> PackedMatrix:
    """Pack a whole weight [.., N, K]; arguments as `pack_into`, interleaved: rows of w1, then rows of w3."""
    tile_format = Bf16Tiles() if weight.dtype == torch.bfloat16 else Fp8Tiles(scale_k, fnuz)
    *lead, num_rows, num_cols = weight.shape
    matrix = allocate(num_rows, num_cols, tile_format, weight.device, tuple(lead), interleaved)
    pack_into(matrix, weight, scale)
    return matrix


def unpack(matrix: PackedMatrix) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [.., N, K] in the format's dtype and its scales [.., N / 8, K / scale_k] (None but for FP8).

    4-bit numbers come as bytes [.., N, K / 2] in the order of a tile's row.

    An interleaved matrix comes back as w1's rows, then w3's. fnuz numbers stay fnuz, and so do their scales.
    """
    tiles = tile_view(matrix)  # [.., n, s, t, 2, 8, 8 words]
    lead = tiles.shape[:-6]
    order = (-3, -6, -2, -5, -4, -1) if matrix.interleaved else (-6, -3, -2, -5, -4, -1)
    words = tiles.permute(*range(len(lead)), *order).reshape(*lead, matrix.num_rows, -1)
    weight = words.view(matrix.format.dtype)
    if not isinstance(matrix.format, Fp8Tiles):
        return weight, None
    scales = scale_view(matrix)  # [.., n, s, c, 2]
    flat = scales.movedim(-1, -4 if matrix.interleaved else -3)
    return weight, flat.reshape(*lead, matrix.num_rows // HALF_ROWS, matrix.num_cols // matrix.format.scale_k)


def dequantise(matrix: PackedMatrix) -> torch.Tensor:
    """The weight's values [.., N, K] in float32, rows in the order of the checkpoint."""
    if isinstance(matrix.format, NibbleTiles):
        raise ValueError("4-bit numbers are dequantised by nibbles.dequantise.")
    weight, scale = unpack(matrix)
    wide = weight.to(torch.float32)
    if scale is None:
        return wide
    columns = matrix.num_cols // scale.shape[-1]
    blocks = torch.unflatten(torch.unflatten(wide, -1, (-1, columns)), -3, (-1, HALF_ROWS))  # [.., N / 8, 8, K / c, c]
    return blocks.mul_(scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2)


def _as_words(weight: torch.Tensor, tile_format: TileFormat) -> torch.Tensor:
    """The bytes of a weight as int64 [.., R, K * itemsize / 8], converted to fnuz where the format is."""
    fnuz = isinstance(tile_format, Fp8Tiles) and tile_format.fnuz
    expected = torch.float8_e4m3fn if fnuz else tile_format.dtype
    if weight.dtype != expected:
        raise ValueError(f"The format {tile_format} takes {expected}, got {weight.dtype}.")
    numbers = weight.contiguous()
    if fnuz:
        # Exponent bias 8 instead of 7: the same byte is half the value, so scales double. 0x80 (-0) would be NaN.
        raw = numbers.view(torch.uint8)
        numbers = raw.masked_fill(raw == 0x80, 0)
    return numbers.view(torch.int64)


def _tiled(words: torch.Tensor, matrix: PackedMatrix, half: int | None) -> torch.Tensor:
    """Words [.., R, W] in the order of `tile_view` (without the half's dimension if `half` is given), a view."""
    cut = torch.unflatten(words, -1, (matrix.num_slots, -1, TILE_ROW_BYTES // 8))
    if matrix.interleaved and half is not None:
        return torch.unflatten(cut, -4, (-1, HALF_ROWS)).movedim(-4, -2)  # [.., n, 8, s, t, w] -> [.., n, s, t, 8, w]
    if matrix.interleaved:
        cut = torch.unflatten(cut, -4, (2, -1, HALF_ROWS)).movedim(-6, -5)  # w1 by w3: [.., n, 2, 8, s, t, w]
    else:
        cut = torch.unflatten(cut, -4, (-1, 2, HALF_ROWS))
    return cut.movedim((-5, -4), (-3, -2))


def _repeated_scales(scale: torch.Tensor, weight: torch.Tensor, scale_k: int) -> torch.Tensor:
    """Scales [.., R / r, K / c] as [.., R / 8, K / scale_k]."""
    rows, columns = weight.shape[-2] // HALF_ROWS, weight.shape[-1] // scale_k
    if rows % scale.shape[-2] or columns % scale.shape[-1]:
        raise ValueError(f"Scales {list(scale.shape)} do not divide a weight {list(weight.shape)} into blocks.")
    return scale.repeat_interleave(rows // scale.shape[-2], -2).repeat_interleave(columns // scale.shape[-1], -1)


def _tiled_scales(wide: torch.Tensor, matrix: PackedMatrix, half: int | None) -> torch.Tensor:
    """Scales [.., R / 8, C] in the order of `scale_view` (without the half's dimension if `half` is given), a view."""
    cut = torch.unflatten(wide, -1, (matrix.num_slots, -1))  # [.., R / 8, s, c]
    if matrix.interleaved and half is not None:
        return cut
    if matrix.interleaved:
        pairs = torch.unflatten(cut, -3, (2, -1)).movedim(-4, -3)
    else:
        pairs = torch.unflatten(cut, -3, (-1, 2))
    return pairs.movedim(-3, -1)  # [.., n, 2, s, c] -> [.., n, s, c, 2]

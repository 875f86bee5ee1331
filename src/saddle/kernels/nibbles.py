"""4-bit weights in tiles: what published checkpoints store, packed as `tiles` says.

    NVFP4   e2m1 * E4M3 scale per 16 columns * one float32 factor of the weight. ModelOpt stores the factor
            (`weight_scale_2`), compressed-tensors its reciprocal (`weight_global_scale`): callers pass the factor.
    INT4    (n - 8) * bfloat16 scale per 32 or 128 columns (pack-quantized); the factor is one.

Packing and unpacking are inverse and need no GPU.
"""

from __future__ import annotations

import torch

from saddle.kernels.tiles import (
    HALF_ROWS,
    TILE_ROW_BYTES,
    TILE_ROWS,
    NibbleTiles,
    PackedMatrix,
    place_rows,
    row_bytes,
    unpack,
)

TILE_COLUMNS = 2 * TILE_ROW_BYTES
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def from_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Numbers 0 to 15 [.., K] of bytes [.., K / 2] whose low half is the even column (both NVFP4 kinds)."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def from_words(packed: torch.Tensor) -> torch.Tensor:
    """Numbers 0 to 15 [.., K] of int32 words [.., K / 8], column 8 j + i in bits 4 i of word j (pack-quantized)."""
    return from_bytes(packed.contiguous().view(torch.uint8))


def values(numbers: torch.Tensor, tile_format: NibbleTiles) -> torch.Tensor:
    """What numbers 0 to 15 stand for, without scales, float32."""
    if tile_format.numbers == "int4":
        return numbers.to(torch.float32) - 8
    table = torch.tensor(E2M1_VALUES, device=numbers.device)
    magnitude = table[(numbers & 7).long()]
    return torch.where(numbers >= 8, -magnitude, magnitude)


def scale_view(matrix: PackedMatrix) -> torch.Tensor:
    """Scales [.., N / 16, K / slot_k, 16 (row), slot_k / group] in the format's scale dtype, a view."""
    tile_format = nibble_format(matrix)
    first = TILE_ROWS * row_bytes(matrix.slot_k, tile_format)
    count = matrix.slot_k // tile_format.group
    size = TILE_ROWS * count * tile_format.scale_dtype.itemsize
    scales = matrix.data[..., first : first + size].view(tile_format.scale_dtype)
    return torch.unflatten(scales, -1, (TILE_ROWS, count))


def factor_view(matrix: PackedMatrix) -> torch.Tensor:
    """Factors of rows 0 to 7 and 8 to 15 of every slot: float32 [.., N / 16, K / slot_k, 2], a view."""
    first = factor_place(matrix) // 4
    return matrix.scale_values[..., first : first + 2]


def factor_place(matrix: PackedMatrix) -> int:
    """Where the factors lie in a slot, bytes."""
    tile_format = nibble_format(matrix)
    scales = TILE_ROWS * (matrix.slot_k // tile_format.group) * tile_format.scale_dtype.itemsize
    return TILE_ROWS * row_bytes(matrix.slot_k, tile_format) + scales


def nibble_format(matrix: PackedMatrix) -> NibbleTiles:
    """The matrix's format.

    Raises:
        ValueError: it is no 4-bit one.
    """
    if not isinstance(matrix.format, NibbleTiles):
        raise ValueError(f"4-bit numbers are needed, got {matrix.format}.")
    return matrix.format


def pack_into(
    matrix: PackedMatrix,
    numbers: torch.Tensor,
    scale: torch.Tensor,
    factor: float | torch.Tensor = 1.0,
    row: int = 0,
    half: int | None = None,
    expert: int | None = None,
) -> None:
    """Write rows of a weight.

    Args:
        numbers: [.., R, K] uint8, 0 to 15.
        scale: [.., R, K / group] in the format's scale dtype.
        factor: of the whole weight; a tensor [..] where there are leading dimensions.
        row, half, expert: as `tiles.pack_into`; for an interleaved matrix, half must be given.

    Raises:
        ValueError: shapes do not fit.
    """
    tile_format = nibble_format(matrix)
    groups = matrix.num_cols // tile_format.group
    if scale.dtype != tile_format.scale_dtype or scale.shape[-2:] != (numbers.shape[-2], groups):
        wanted = f"{tile_format.scale_dtype} [.., {numbers.shape[-2]}, {groups}]"
        raise ValueError(f"Scales {wanted} are needed, got {scale.dtype} {list(scale.shape)}.")
    if matrix.interleaved and half is None:
        raise ValueError("Rows of an interleaved 4-bit matrix are written one half at a time.")
    pairs = torch.unflatten(numbers, -1, (-1, 2, TILE_ROW_BYTES))
    packed = (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2).contiguous()
    place_rows(matrix, packed.view(torch.int64), row, half, expert)
    step = TILE_ROWS if half is None else HALF_ROWS
    part = slice(row // step, (row + numbers.shape[-2]) // step)
    rows = slice(0, TILE_ROWS) if half is None else slice(half * HALF_ROWS, (half + 1) * HALF_ROWS)
    scales, factors = scale_view(matrix).view(torch.uint8), factor_view(matrix)
    if expert is not None:
        scales, factors = scales[expert], factors[expert]
    cut = torch.unflatten(scale.contiguous().view(torch.uint8), -1, (matrix.num_slots, -1))
    scales[..., part, :, rows, :] = torch.unflatten(cut, -3, (-1, step)).transpose(-3, -2)
    halves = slice(0, 2) if half is None else slice(half, half + 1)
    shaped = factor[..., None, None, None] if isinstance(factor, torch.Tensor) else factor
    factors[..., part, :, halves] = shaped


def dequantise(matrix: PackedMatrix) -> torch.Tensor:
    """The weight's values [.., N, K] in float32; an interleaved matrix comes back as w1's rows, then w3's."""
    tile_format = nibble_format(matrix)
    packed = torch.unflatten(unpack(matrix)[0], -1, (-1, TILE_ROW_BYTES))
    numbers = torch.stack((packed & 15, packed >> 4), -2).flatten(-3)
    scale = scale_view(matrix).to(torch.float32) * factor_view(matrix).repeat_interleave(HALF_ROWS, -1)[..., None]
    wide = scale.transpose(-3, -2).flatten(-2)  # [.., N / 16, 16, K / group]
    if matrix.interleaved:
        wide = torch.unflatten(wide, -2, (2, HALF_ROWS)).movedim(-3, -4)  # [.., 2, N / 16, 8, K / group]
        wide = wide.flatten(-4, -2)
    else:
        wide = wide.flatten(-3, -2)
    return values(numbers, tile_format) * wide.repeat_interleave(tile_format.group, -1)

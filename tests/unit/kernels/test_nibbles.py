"""4-bit weights: what checkpoints store is what comes out of the tiles again."""

from __future__ import annotations

import pytest
import torch

from saddle.kernels import nibbles, tiles

FORMATS = [tiles.NibbleTiles("e2m1", 16), tiles.NibbleTiles("int4", 32), tiles.NibbleTiles("int4", 128)]


def scales(tile_format: tiles.NibbleTiles, *shape: int) -> torch.Tensor:
    return (torch.rand(shape) + 0.5).to(tile_format.scale_dtype)


def wanted(numbers: torch.Tensor, scale: torch.Tensor, factor: float, tile_format: tiles.NibbleTiles) -> torch.Tensor:
    return nibbles.values(numbers, tile_format) * (scale.float() * factor).repeat_interleave(tile_format.group, -1)


def test_m2_slots() -> None:
    assert tiles.packed_shape(3072, 3072, FORMATS[0]) == (192, 1, 24576 + 16 * 192 + 128)
    assert tiles.packed_shape(3072, 1536, FORMATS[2]) == (192, 1, 12288 + 512)


def test_stored_bytes() -> None:
    """The low half of a byte is the even column; bits 4 i of a word are column 8 j + i."""
    assert nibbles.from_bytes(torch.tensor([0x21, 0xF0], dtype=torch.uint8)).tolist() == [1, 2, 0, 15]
    word = torch.tensor([0x76543210, -0x01234568], dtype=torch.int32)
    assert nibbles.from_words(word).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]


def test_values() -> None:
    numbers = torch.arange(16, dtype=torch.uint8)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert nibbles.values(numbers, FORMATS[0]).tolist() == table + [-value for value in table]
    assert nibbles.values(numbers, FORMATS[1]).tolist() == list(range(-8, 8))


@pytest.mark.parametrize("tile_format", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [256, 3072, 6144])
def test_round_trip(tile_format: tiles.NibbleTiles, columns: int) -> None:
    matrix = tiles.allocate(64, columns, tile_format, "cpu")
    numbers = torch.randint(0, 16, (64, columns), dtype=torch.uint8)
    scale = scales(tile_format, 64, columns // tile_format.group)
    for row in range(0, 64, 16):
        nibbles.pack_into(matrix, numbers[row : row + 16], scale[row : row + 16], 0.25, row)
    assert torch.equal(nibbles.dequantise(matrix), wanted(numbers, scale, 0.25, tile_format))


@pytest.mark.parametrize("tile_format", FORMATS, ids=str)
def test_interleaved_experts_keep_the_factors_of_both(tile_format: tiles.NibbleTiles) -> None:
    matrix = tiles.allocate(128, 256, tile_format, "cpu", (3,), True)
    numbers = torch.randint(0, 16, (3, 2, 64, 256), dtype=torch.uint8)
    scale = scales(tile_format, 3, 2, 64, 256 // tile_format.group)
    for expert in range(3):
        for half in range(2):
            factor = 1.0 + expert + 4 * half
            nibbles.pack_into(matrix, numbers[expert, half], scale[expert, half], factor, 0, half, expert)
    found = nibbles.dequantise(matrix).view(3, 2, 64, 256)
    for expert in range(3):
        for half in range(2):
            factor = 1.0 + expert + 4 * half
            stored = wanted(numbers[expert, half], scale[expert, half], factor, tile_format)
            assert torch.equal(found[expert, half], stored)


def test_bytes_lie_where_the_layout_says() -> None:
    matrix = tiles.allocate(32, 512, FORMATS[0], "cpu")
    numbers = torch.randint(0, 16, (32, 512), dtype=torch.uint8)
    scale = scales(FORMATS[0], 32, 32)
    nibbles.pack_into(matrix, numbers, scale, 3.0)
    assert matrix.data[1, 0, 2 * 1024 + 5 * 64 + 7] == numbers[21, 256 + 7] | numbers[21, 256 + 64 + 7] << 4
    assert matrix.data[1, 0, 4096 + 5 * 32 + 9] == scale.view(torch.uint8)[21, 9]
    assert matrix.scale_values[1, 0, (4096 + 512) // 4] == 3.0


def test_refuses_what_does_not_fit() -> None:
    matrix = tiles.allocate(32, 256, FORMATS[1], "cpu", (), True)
    numbers = torch.zeros(16, 256, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bfloat16 \[.., 16, 8\] are needed, got torch.bfloat16 \[16, 2\]"):
        nibbles.pack_into(matrix, numbers, torch.ones(16, 2).bfloat16())
    with pytest.raises(ValueError, match="one half at a time"):
        nibbles.pack_into(matrix, numbers, torch.ones(16, 8).bfloat16())
    with pytest.raises(ValueError, match=r"nibbles\.pack_into"):
        tiles.pack_into(matrix, numbers)
    with pytest.raises(ValueError, match="4-bit numbers are needed"):
        nibbles.dequantise(tiles.allocate(16, 128, tiles.Fp8Tiles(), "cpu"))

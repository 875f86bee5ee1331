"""Packed weights: pack and unpack are inverse, and every byte lies where the layout says."""

from __future__ import annotations

import pytest
import torch

from saddle.kernels import tiles

FP8 = torch.float8_e4m3fn


def fp8_weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(FP8)


def block_scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.5


def test_m2_slots() -> None:
    assert tiles.packed_shape(8192, 3072, tiles.Fp8Tiles()) == (512, 2, 24704)
    assert tiles.packed_shape(3072, 6144, tiles.Fp8Tiles()) == (192, 4, 24704)
    assert tiles.packed_shape(200064, 3072, tiles.Bf16Tiles()) == (12504, 4, 24576)
    assert tiles.slot_columns(256, tiles.Fp8Tiles()) == 256
    assert tiles.slot_columns(5120, tiles.Fp8Tiles()) == 1280
    assert tiles.slot_columns(192, tiles.Fp8Tiles(scale_k=64)) == 192


def test_refuses_shapes() -> None:
    with pytest.raises(ValueError, match="multiple of 128 columns, got 192"):
        tiles.packed_shape(16, 192, tiles.Fp8Tiles())
    with pytest.raises(ValueError, match="multiple of 16 rows, got 24"):
        tiles.packed_shape(24, 128, tiles.Fp8Tiles())
    with pytest.raises(ValueError, match="needs its scales"):
        tiles.pack(fp8_weight(16, 128))
    with pytest.raises(ValueError, match="do not divide"):
        tiles.pack(fp8_weight(128, 256), block_scales(3, 2))
    matrix = tiles.allocate(32, 128, tiles.Fp8Tiles(), "cpu")
    with pytest.raises(ValueError, match="do not fit"):
        tiles.pack_into(matrix, fp8_weight(16, 128), block_scales(1, 1), row=8)
    with pytest.raises(ValueError, match=r"takes torch.float8_e4m3fn, got torch.bfloat16"):
        tiles.pack_into(matrix, torch.zeros(16, 128, dtype=torch.bfloat16))


def test_bytes_lie_where_the_layout_says() -> None:
    weight, scale = fp8_weight(256, 3072), block_scales(2, 24)
    matrix = tiles.pack(weight, scale)
    raw = weight.view(torch.uint8)
    for n, k in [(0, 0), (1, 0), (17, 65), (255, 3071), (130, 1535), (130, 1536), (77, 2000)]:
        slot, inside = divmod(k, 1536)
        place = inside // 64 * 1024 + n % 16 * 64 + inside % 64
        assert matrix.data[n // 16, slot, place] == raw[n, k]
        at = 24576 // 4 + inside // 128 * 2 + n % 16 // 8
        assert matrix.data[n // 16, slot].view(torch.float32)[at] == scale[n // 128, k // 128]
    assert not matrix.data[..., 24576 + 96 :].any()


def test_interleaved_tiles_hold_gate_and_up() -> None:
    weight, scale = fp8_weight(3, 256, 256), block_scales(3, 2, 2)
    matrix = tiles.pack(weight, scale, interleaved=True)
    raw = weight.view(torch.uint8)
    for expert, n, k in [(0, 0, 0), (1, 9, 63), (2, 127, 255), (1, 100, 130)]:
        for half in (0, 1):
            place = k // 64 * 1024 + (half * 8 + n % 8) * 64 + k % 64
            assert matrix.data[expert, n // 8, 0, place] == raw[expert, half * 128 + n, k]
            found = matrix.data[expert, n // 8, 0].view(torch.float32)[4096 // 4 + k // 128 * 2 + half]
            assert found == scale[expert, half, k // 128]


@pytest.mark.parametrize("lead", [(), (5,)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(256, 256), (512, 3072), (1024, 640)])
def test_unpack_is_the_inverse(lead: tuple[int, ...], interleaved: bool, shape: tuple[int, int]) -> None:
    weight, scale = fp8_weight(*lead, *shape), block_scales(*lead, shape[0] // 128, shape[1] // 128)
    matrix = tiles.pack(weight, scale, interleaved)
    found, scales = tiles.unpack(matrix)
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))
    assert scales is not None and torch.equal(scales, scale.repeat_interleave(16, -2))
    wide = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
    assert torch.equal(tiles.dequantise(matrix), weight.float() * wide)


def test_bf16_and_its_inverse() -> None:
    weight = torch.randn(48, 1536).bfloat16()
    matrix = tiles.pack(weight)
    assert (matrix.slot_k, matrix.slot_bytes, matrix.num_slots) == (768, 24576, 2)
    assert torch.equal(tiles.dequantise(matrix), weight.float())
    assert matrix.values[2, 1, 3 * 512 + 5 * 32 + 7] == weight[37, 768 + 3 * 32 + 7]


@pytest.mark.parametrize("interleaved", [False, True])
def test_strips_make_the_whole(interleaved: bool) -> None:
    weight, scale = fp8_weight(2, 256, 256), block_scales(2, 2, 2)
    whole = tiles.pack(weight, scale, interleaved)
    parts = tiles.allocate(256, 256, tiles.Fp8Tiles(), "cpu", (2,), interleaved)
    for expert in range(2):
        for row in range(0, 256, 16):
            strip = scale[expert, row // 128 : row // 128 + 1]
            half, at = (row // 128, row % 128) if interleaved else (None, row)
            tiles.pack_into(parts, weight[expert, row : row + 16], strip, at, half, expert)
    assert torch.equal(whole.data, parts.data)


def test_narrow_scales_for_narrow_slices() -> None:
    weight, scale = fp8_weight(64, 192), block_scales(1, 3)
    matrix = tiles.pack(weight, scale, scale_k=64)
    assert torch.equal(tiles.dequantise(matrix), weight.float() * scale.repeat_interleave(64, -1))


def test_fnuz_has_the_same_values() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    numbers = every[(every & 0x7F) != 0x7F]  # all but the NaNs
    weight = numbers[torch.arange(16 * 128) % len(numbers)].view(16, 128).view(FP8)
    scale = block_scales(1, 1)
    matrix = tiles.pack(weight, scale, fnuz=True)
    assert matrix.values.dtype == torch.float8_e4m3fnuz
    assert torch.equal(tiles.dequantise(matrix), weight.float() * scale)
    assert not (matrix.data[..., : 16 * 128] == 0x80).any()

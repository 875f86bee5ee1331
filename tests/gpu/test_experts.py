"""Experts over packed weights on the GPU, against float32 products of the dequantised values."""

from __future__ import annotations

import packed_support as support
import pytest
import torch
from expert_support import ERROR, SHAPES, routed, wanted_rows

from saddle.kernels import experts, nibbles, quant, tiles
from saddle.kernels.target import Target

pytestmark = support.needs_gpu


@pytest.mark.parametrize("chip", support.targets(), ids=lambda chip: chip.arch)
@pytest.mark.parametrize("shape", SHAPES)
def test_experts(shape: str, chip: Target) -> None:
    torch.manual_seed(3)
    num_experts, top_k, width, inner = SHAPES[shape]
    w13 = support.fp8_weight(num_experts, 2 * inner, width, interleaved=True)
    w2 = support.fp8_weight(num_experts, width, inner)
    values = tiles.dequantise(w13), tiles.dequantise(w2)
    for size in support.SIZES:
        num_pads = 2 if size > 2 else 0
        work = routed(size, num_experts, top_k, width, num_pads)
        h = support.activation(torch.randn(size, width, device="cuda") * 2, chip)
        wanted = wanted_rows(quant.dequantise(h), work, *values, chip)
        act = quant.allocate(size * top_k, inner, h.data.dtype, "cuda")
        out = support.poisoned(size * top_k, width, dtype=experts.pair_dtype(size, num_experts, top_k))
        experts.experts(h, w13, w2, work, act, out, chip)
        used = (size - num_pads) * top_k
        assert support.error(out[:used], wanted[:used]) < ERROR[shape], size
        assert out[used:].isnan().all(), (size, "rows that pad are not written")
        again = torch.full_like(out, 3.0)
        experts.experts(h, w13, w2, work, act, again, chip)
        assert torch.equal(out[:used], again[:used]), (size, "same bits")


def test_swapped_gate_and_up_are_seen() -> None:
    chip = support.targets()[0]
    w13, w2 = support.fp8_weight(16, 256, 256, interleaved=True), support.fp8_weight(16, 256, 128)
    work = routed(8, 16, 4, 256)
    h = support.activation(torch.randn(8, 256, device="cuda"), chip)
    swapped = tiles.dequantise(w13).view(16, 2, 128, 256).flip(1).reshape(16, 256, 256)
    wanted = wanted_rows(quant.dequantise(h), work, swapped, tiles.dequantise(w2), chip)
    act, out = quant.allocate(32, 128, h.data.dtype, "cuda"), support.poisoned(32, 256)
    experts.experts(h, w13, w2, work, act, out, chip)
    assert support.error(out, wanted) > 20 * ERROR["demo"]


FORMATS = [tiles.NibbleTiles("e2m1", 16), tiles.NibbleTiles("int4", 32), tiles.NibbleTiles("int4", 128)]


@pytest.mark.parametrize("tile_format", FORMATS, ids=str)
def test_4_bit_weights(tile_format: tiles.NibbleTiles) -> None:
    torch.manual_seed(4)
    num_experts, top_k, width, inner = 16, 4, 3072, 1536
    w13 = tiles.allocate(2 * inner, width, tile_format, "cuda", (num_experts,), True)
    w2 = tiles.allocate(width, inner, tile_format, "cuda", (num_experts,))
    for matrix, halves, rows in ((w13, (0, 1), inner), (w2, (None,), width)):
        for half in halves:
            numbers = torch.randint(0, 16, (num_experts, rows, matrix.num_cols), dtype=torch.uint8, device="cuda")
            scale = torch.rand(num_experts, rows, matrix.num_cols // tile_format.group, device="cuda") + 0.2
            factor = (torch.rand(num_experts, device="cuda") + 0.5) * 0.01
            nibbles.pack_into(matrix, numbers, scale.to(tile_format.scale_dtype), factor, 0, half)
    values = nibbles.dequantise(w13), nibbles.dequantise(w2)
    chip, without_fp8 = support.targets()[0], support.targets()[-1]
    for size in (1, 3, 16, 100, 300, 1000):
        work = routed(size, num_experts, top_k, width)
        h = support.activation(torch.randn(size, width, device="cuda") * 2, without_fp8)
        wanted = wanted_rows(quant.dequantise(h), work, *values, without_fp8)
        act = quant.allocate(size * top_k, inner, torch.bfloat16, "cuda")
        out = support.poisoned(size * top_k, width, dtype=experts.pair_dtype(size, num_experts, top_k))
        experts.experts(h, w13, w2, work, act, out, chip)
        assert support.error(out, wanted) < ERROR["m2"], size

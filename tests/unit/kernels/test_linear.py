"""Products over packed weights read the right numbers and scales, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import linear, nibbles, quant, target, tiles
from tests.support import exact_interpreter
from tests.support.interpreted import IS_INTERPRETED, in_interpreter, outside, run_file

if IS_INTERPRETED:
    exact_interpreter.repair()
CHIP, CHIP_WITHOUT_FP8 = target.of_arch("sm_90"), target.of_arch("sm_80")
BF16_ERROR = 3e-3


def weight(rows: int, columns: int) -> tiles.PackedMatrix:
    return tiles.pack(torch.randn(rows, columns).to(torch.float8_e4m3fn), torch.rand(rows // 128, columns // 128) + 0.1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize("shape", [(256, 256), (128, 3072)], ids=str)
def test_products(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = weight(*shape)
    values = tiles.dequantise(matrix)
    for size in (1, 3, 17, 130):
        a = quant.quantise(torch.randn(size, shape[1]))
        out = torch.full((linear.split_k(size, matrix, CHIP), size, shape[0]), torch.nan)
        linear.linear(a, matrix, out, CHIP)
        assert error(out.sum(0), linear.reference(quant.dequantise(a), values)) < 1e-5, size


@in_interpreter
def test_sums_are_added_to_what_is_there() -> None:
    torch.manual_seed(3)
    matrix = weight(256, 256)
    a = quant.quantise(torch.randn(130, 256))
    alone, x = torch.full((130, 256), torch.nan), torch.randn(130, 256)
    linear.linear(a, matrix, alone, CHIP)
    wanted = x + alone
    linear.linear(a, matrix, x, CHIP, add=True)
    assert torch.equal(x, wanted)
    for few, out in ((a[:128], x[:128]), (a, x.bfloat16()), (a, x[None])):
        with pytest.raises(ValueError, match="are added to"):
            linear.linear(few, matrix, out, CHIP, add=True)


@in_interpreter
@pytest.mark.parametrize("chip", [CHIP, CHIP_WITHOUT_FP8], ids=lambda chip: chip.arch)
def test_a_norm_that_was_left_out(chip: target.Target) -> None:
    torch.manual_seed(7)
    matrix, eps = weight(128, 384), 0.25
    values = tiles.dequantise(matrix)
    for size in (1, 17):
        a = quant.quantise(torch.randn(size, 384), chip.fp8_dtype if chip.has_fp8_dot else torch.bfloat16)
        squares, out = torch.rand(3, size) * 384, torch.full((size, 128), torch.nan)
        linear.linear(a, matrix, out, chip, squares=squares, eps=eps)
        inverse = (squares.sum(0) / 384 + eps).rsqrt()
        wanted = linear.reference(quant.dequantise(a) * inverse[:, None], values)
        assert error(out, wanted) < 1e-5, size
    many = quant.quantise(torch.randn(129, 384))
    with pytest.raises(ValueError, match="more than 128 tokens are not left"):
        linear.linear(many, matrix, torch.empty(129, 128), CHIP, squares=torch.rand(3, 129))


@in_interpreter
def test_fp8_weights_are_widened_without_fp8_units() -> None:
    torch.manual_seed(2)
    matrix = weight(128, 256)
    matrix.data[0, 0, :8] = torch.tensor([0, 1, 7, 8, 0x7E, 0x80, 0x81, 0xFE], dtype=torch.uint8)  # with subnormals
    for size in (2, 140):
        a = quant.quantise(torch.randn(size, 256), torch.bfloat16)
        out = torch.full((size, 128), torch.nan)
        linear.linear(a, matrix, out, CHIP_WITHOUT_FP8)
        assert error(out, linear.reference(a.data, tiles.dequantise(matrix))) < 1e-5, size


@in_interpreter
@pytest.mark.parametrize("tile_format", [tiles.NibbleTiles("e2m1", 16), tiles.NibbleTiles("int4", 32),
                                         tiles.NibbleTiles("int4", 128)], ids=str)  # fmt: skip
def test_4_bit_weights(tile_format: tiles.NibbleTiles) -> None:
    torch.manual_seed(4)
    matrix = tiles.allocate(128, 512, tile_format, "cpu")
    scale = (torch.rand(128, 512 // tile_format.group) + 0.2).to(tile_format.scale_dtype)
    nibbles.pack_into(matrix, torch.randint(0, 16, (128, 512), dtype=torch.uint8), scale, 0.01)
    for size in (3, 130):
        a = quant.quantise(torch.randn(size, 512), torch.bfloat16)
        out = torch.full((size, 128), torch.nan)
        linear.linear(a, matrix, out, CHIP)
        exact = 1e-5 if tile_format.numbers == "e2m1" else BF16_ERROR  # int4 times its scale is rounded to bf16
        assert error(out, linear.reference(a.data, nibbles.dequantise(matrix))) < exact, size


@in_interpreter
def test_bf16_weights() -> None:
    torch.manual_seed(5)
    matrix = tiles.pack(torch.randn(128, 320).bfloat16())
    for size in (2, 130):
        h, out = torch.randn(size, 320).bfloat16(), torch.full((size, 128), torch.nan)
        linear.lm_head(h, matrix, out, CHIP)
        assert error(out, linear.reference(h, tiles.dequantise(matrix))) < 1e-5, size


@outside
def test_parts_occupy_the_chip() -> None:
    narrow = tiles.allocate(3072, 6144, tiles.Fp8Tiles(), "meta")
    assert linear.split_k(8, narrow, CHIP) == 4
    assert linear.split_k(8192, narrow, CHIP) == 1
    assert linear.split_k(8, tiles.allocate(8192, 3072, tiles.Fp8Tiles(), "meta"), CHIP) == 1


@outside
def test_blocks_fit_the_shared_memory() -> None:
    for arch in target.SHARED_BYTES:
        chip = target.of_arch(arch)
        for matrix in (tiles.allocate(8192, 3072, tiles.Fp8Tiles(), "meta"),
                       tiles.allocate(1024, 256, tiles.Bf16Tiles(), "meta"),
                       tiles.allocate(272, 384, tiles.Fp8Tiles(), "meta")):  # fmt: skip
            for size in (1, 128, 129, 8192):
                make = linear.few_block if size <= linear.MAX_FEW_TOKENS else linear.many_block
                block = make(size, matrix, chip)
                assert matrix.num_rows % block.bn == 0 and matrix.slot_k % block.bk == 0
                weights = block.bn * block.bk * matrix.format.dtype.itemsize
                assert block.stages == 1 or block.stages * weights < chip.shared_bytes


@outside
def test_refuses_what_does_not_fit() -> None:
    matrix, out = weight(128, 128), torch.empty(2, 128)
    a = quant.quantise(torch.randn(2, 128))
    with pytest.raises(ValueError, match=r"sm_80 takes activations of torch\.bfloat16, got torch\.float8_e4m3fn"):
        linear.linear(a, matrix, out, target.of_arch("sm_80"))
    with pytest.raises(ValueError, match=r"sm_90 takes activations of torch\.float8_e4m3fn"):
        linear.linear(quant.quantise(torch.randn(2, 128), torch.bfloat16), matrix, out, CHIP)
    with pytest.raises(ValueError, match="128 columns takes as many"):
        linear.linear(quant.quantise(torch.randn(2, 256)), matrix, out, CHIP)
    with pytest.raises(ValueError, match="not split along k"):
        linear.linear(quant.quantise(torch.randn(200, 128)), matrix, torch.empty(2, 200, 128), CHIP)

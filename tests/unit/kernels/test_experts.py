"""Experts over packed weights give every pair its weighted row, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import experts, nibbles, quant, router, target, tiles
from saddle.kernels.tile_dot import Block
from tests.support import exact_interpreter
from tests.support.interpreted import IS_INTERPRETED, in_interpreter, outside, run_file

if IS_INTERPRETED:
    exact_interpreter.repair()
CHIP, CHIP_WITHOUT_FP8 = target.of_arch("sm_90"), target.of_arch("sm_80")
WIDTH, EXPERTS, TOP_K, INNER = 128, 6, 2, 256
FP8_ERROR, BF16_ERROR = 0.03, 4e-3  # rounding of what lies between the two products
WORST_PAIR_ERROR = 1e-2  # of three bf16 roundings: 6e-3 among 776 pairs


def weight(rows: int, columns: int, interleaved: bool = False) -> tiles.PackedMatrix:
    values = torch.randn(EXPERTS, rows, columns).to(torch.float8_e4m3fn)
    return tiles.pack(values, torch.rand(EXPERTS, rows // 128, columns // 128) * 0.1 + 0.02, interleaved)


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


def nibble_weight(
    tile_format: tiles.NibbleTiles, rows: int, columns: int, interleaved: bool, num_experts: int = EXPERTS
) -> tiles.PackedMatrix:
    matrix = tiles.allocate(rows, columns, tile_format, "cpu", (num_experts,), interleaved)
    for half, part in enumerate((rows // 2, rows // 2) if interleaved else (rows,)):
        numbers = torch.randint(0, 16, (num_experts, part, columns), dtype=torch.uint8)
        scale = (torch.rand(num_experts, part, columns // tile_format.group) + 0.2).to(tile_format.scale_dtype)
        nibbles.pack_into(matrix, numbers, scale, torch.rand(num_experts) * 0.05, 0, half if interleaved else None)
    return matrix


def run(size: int, chip: target.Target, w13: tiles.PackedMatrix, w2: tiles.PackedMatrix, dtype: torch.dtype) -> float:
    """Route, compute the experts, and return the error of the rows against the reference."""
    work = router.RouterWork.allocate(300, WIDTH, EXPERTS, TOP_K, "cpu")
    tokens = torch.arange(size, dtype=torch.int32)
    num_pads = 1 if size > 1 else 0
    tokens[size - num_pads :] = -1
    h = quant.allocate(size, WIDTH, dtype, "cpu")
    router.route(torch.randn(size, WIDTH), None, torch.ones(WIDTH), 1e-6, torch.randn(WIDTH, EXPERTS),
                 torch.zeros(EXPERTS), tokens, tokens, 0, False, work, h, chip)  # fmt: skip
    act = quant.allocate(size * TOP_K, INNER, dtype, "cpu")
    out = torch.full((size * TOP_K, WIDTH), torch.nan)
    experts.experts(h, w13, w2, work, act, out, chip)
    used = size - num_pads
    ids, weights = (t[: used * TOP_K].view(used, TOP_K) for t in (work.ids, work.weights))
    values = [(nibbles if isinstance(w.format, tiles.NibbleTiles) else tiles).dequantise(w) for w in (w13, w2)]
    wanted = experts.reference(quant.dequantise(h), ids, weights, *values)
    assert out[used * TOP_K :].isnan().all()
    return float((out[: used * TOP_K] - wanted).norm() / wanted.norm())


def few_up_to(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps take the way of large ones."""
    monkeypatch.setattr(router, "most_few_tokens", lambda num_experts, top_k: num_tokens)


@in_interpreter
@pytest.mark.parametrize("size", [1, 6, 40, 70])
def test_experts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size)
    few_up_to(40, monkeypatch)
    assert run(size, CHIP, weight(2 * INNER, WIDTH, True), weight(WIDTH, INNER), torch.float8_e4m3fn) < FP8_ERROR


@in_interpreter
@pytest.mark.parametrize("size", [6, 40])
def test_tiny_scales_lose_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up near 1e-5: what lies between the products is near 1e-10, and is quantised as well as any other."""
    torch.manual_seed(size)
    few_up_to(20, monkeypatch)
    w13, w2 = weight(2 * INNER, WIDTH, True), weight(WIDTH, INNER)
    tiles.scale_view(w13).mul_(1e-6)
    assert run(size, CHIP, w13, w2, torch.float8_e4m3fn) < FP8_ERROR


@in_interpreter
def test_fp8_weights_are_widened_without_fp8_units() -> None:
    torch.manual_seed(0)
    w13, w2 = weight(2 * INNER, WIDTH, True), weight(WIDTH, INNER)
    for size in (1, 9):
        assert run(size, CHIP_WITHOUT_FP8, w13, w2, torch.bfloat16) < BF16_ERROR


@in_interpreter
@pytest.mark.parametrize("size", [5, 20])
def test_bf16_weights(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size)
    few_up_to(8, monkeypatch)
    w13 = tiles.pack(torch.randn(EXPERTS, 2 * INNER, WIDTH).bfloat16(), None, True)
    w2 = tiles.pack(torch.randn(EXPERTS, WIDTH, INNER).bfloat16())
    assert run(size, CHIP, w13, w2, torch.bfloat16) < BF16_ERROR


@in_interpreter
@pytest.mark.parametrize("tile_format", [tiles.NibbleTiles("e2m1", 16), tiles.NibbleTiles("int4", 128)], ids=str)
@pytest.mark.parametrize("size", [5, 20])
def test_4_bit_weights(size: int, tile_format: tiles.NibbleTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size)
    few_up_to(8, monkeypatch)
    w13, w2 = nibble_weight(tile_format, 2 * INNER, WIDTH, True), nibble_weight(tile_format, WIDTH, INNER, False)
    assert run(size, CHIP, w13, w2, torch.bfloat16) < BF16_ERROR


@in_interpreter
def test_int4_weights_of_many_pairs() -> None:
    """100 tokens choose 8 of 32 experts, 25 pairs an expert: kernels for many by the step's own choice, which round
    numbers times their scales, what lies between the products, and the rows to bf16; in float64 nothing is."""
    torch.manual_seed(0)
    num_experts, top_k, width, inner, size, used = 32, 8, 256, 128, 100, 97 * 8
    work = router.RouterWork.allocate(size, width, num_experts, top_k, "cpu")
    assert not work.takes_few(size)
    tokens = torch.arange(size, dtype=torch.int32)
    tokens[used // top_k :] = -1
    h = quant.allocate(size, width, torch.bfloat16, "cpu")
    router.route(torch.randn(size, width), None, torch.ones(width), 1e-6, torch.randn(width, num_experts),
                 torch.zeros(num_experts), tokens, tokens, 0, False, work, h, CHIP)  # fmt: skip
    for group in (32, 128):
        tile_format = tiles.NibbleTiles("int4", group)
        w13 = nibble_weight(tile_format, 2 * inner, width, True, num_experts)
        w2 = nibble_weight(tile_format, width, inner, False, num_experts)
        act = quant.allocate(size * top_k, inner, torch.bfloat16, "cpu")
        out = torch.full((size * top_k, width), torch.nan, dtype=experts.pair_dtype(size, num_experts, top_k))
        experts.experts(h, w13, w2, work, act, out, CHIP)
        wanted = torch.empty(used, width, dtype=torch.float64)
        wide13, wide2 = nibbles.dequantise(w13).double(), nibbles.dequantise(w2).double()
        for expert in range(num_experts):
            mine = (work.ids[:used] == expert).nonzero().flatten()
            gate, up = (h.data[mine // top_k].double() @ wide13[expert].T).chunk(2, -1)
            wanted[mine] = (torch.nn.functional.silu(gate) * up) @ wide2[expert].T * work.weights[mine, None]
        # The worst pair: one that is wrong would hide among 776.
        errors = (out[:used] - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert out.dtype == torch.bfloat16 and float(errors.max()) < WORST_PAIR_ERROR, group
        assert out[used:].isnan().all()


@outside
def test_refuses_what_does_not_fit() -> None:
    work = router.RouterWork.allocate(2, WIDTH, EXPERTS, TOP_K, "cpu")
    h, act = quant.quantise(torch.randn(2, WIDTH)), quant.quantise(torch.randn(4, INNER))
    w13, w2, out = weight(2 * INNER, WIDTH, True), weight(WIDTH, INNER), torch.empty(4, WIDTH)
    blocks = experts.up_block(2, w13, CHIP, True), Block(256, 16, 64, 2, 8)
    with pytest.raises(ValueError, match="128 rows of an FP8 weight share their scales, a tile cannot have 256"):
        experts.launch(h, w13, w2, work, act, out, blocks, 0)
    with pytest.raises(ValueError, match="w1 and w3 interleaved"):
        experts.experts(h, weight(2 * INNER, WIDTH), w2, work, act, out, CHIP)
    with pytest.raises(ValueError, match=r"got w13 \[512, 128\] and w2 \[256, 128\]"):
        experts.experts(h, w13, weight(256, 128), work, act, out, CHIP)
    with pytest.raises(ValueError, match="4 pairs need as many rows, got 4 and 3"):
        experts.experts(h, w13, w2, work, act, out[:3], CHIP)


@outside
def test_few_tokens_are_few_pairs_of_an_expert() -> None:
    """M2 keeps its 256 tokens; a model with fewer experts has as many pairs an expert earlier."""
    found = [router.most_few_tokens(num_experts, top_k) for num_experts, top_k in
             ((256, 8), (512, 8), (192, 8), (64, 8), (16, 8), (16, 4), (8, 8))]  # fmt: skip
    assert found == [256, 256, 128, 64, 16, 32, 8]
    work = router.RouterWork.allocate(64, WIDTH, 16, 4, "cpu")
    assert work.takes_few(32) and not work.takes_few(33)
    assert experts.pair_dtype(33, 16, 4) == torch.bfloat16 and experts.pair_dtype(33, 256, 8) == torch.float32


@outside
def test_blocks_fit_the_shared_memory() -> None:
    w13 = tiles.allocate(3072, 3072, tiles.Fp8Tiles(), "meta", (8,), True)
    w2 = tiles.allocate(3072, 1536, tiles.Fp8Tiles(), "meta", (8,))
    for arch in target.SHARED_BYTES:
        chip = target.of_arch(arch)
        for size in (1, 64, 8192):
            few = size <= 64
            up, down = experts.up_block(size, w13, chip, few), experts.down_block(size, w2, chip, few)
            assert up.bn == 256 and up.bm == down.bm == router.unit_tokens(size, 64, 8)
            for block in (up, down):
                assert block.stages == 1 or block.stages * block.bn * block.bk < chip.shared_bytes

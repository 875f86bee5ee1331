"""Experts over packed weights give every pair its weighted row, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import experts, quant, router, target, tiles
from tests.support.interpreted import in_interpreter, outside, run_file

CHIP = target.of_arch("sm_90")
WIDTH, EXPERTS, TOP_K, INNER = 128, 6, 2, 256
ERROR = 0.08  # the interpreter cuts act to three bits of mantissa; rounding halves it


def weight(rows: int, columns: int, interleaved: bool = False) -> tiles.PackedMatrix:
    values = torch.randn(EXPERTS, rows, columns).to(torch.float8_e4m3fn)
    return tiles.pack(values, torch.rand(EXPERTS, rows // 128, columns // 128) * 0.1 + 0.02, interleaved)


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize("size", [1, 6, 40, 257])
def test_experts(size: int) -> None:
    torch.manual_seed(size)
    w13, w2 = weight(2 * INNER, WIDTH, True), weight(WIDTH, INNER)
    work = router.RouterWork.allocate(300, WIDTH, EXPERTS, TOP_K, "cpu")
    tokens = torch.arange(size, dtype=torch.int32)
    num_pads = 1 if size > 1 else 0
    tokens[size - num_pads :] = -1
    h = quant.allocate(size, WIDTH, torch.float8_e4m3fn, "cpu")
    router.route(torch.randn(size, WIDTH), None, torch.ones(WIDTH), 1e-6, torch.randn(WIDTH, EXPERTS),
                 torch.zeros(EXPERTS), tokens, tokens, 0, False, work, h, CHIP)  # fmt: skip
    act = quant.allocate(size * TOP_K, INNER, torch.float8_e4m3fn, "cpu")
    out = torch.full((size * TOP_K, WIDTH), torch.nan)
    experts.experts(h, w13, w2, work, act, out, CHIP)
    used = size - num_pads
    ids, weights = (t[: used * TOP_K].view(used, TOP_K) for t in (work.ids, work.weights))
    wanted = experts.reference(quant.dequantise(h), ids, weights, tiles.dequantise(w13), tiles.dequantise(w2))
    found = out[: used * TOP_K]
    assert float((found - wanted).norm() / wanted.norm()) < ERROR
    assert out[used * TOP_K :].isnan().all()


@outside
def test_refuses_what_does_not_fit() -> None:
    work = router.RouterWork.allocate(2, WIDTH, EXPERTS, TOP_K, "cpu")
    h, act = quant.quantise(torch.randn(2, WIDTH)), quant.quantise(torch.randn(4, INNER))
    w13, w2, out = weight(2 * INNER, WIDTH, True), weight(WIDTH, INNER), torch.empty(4, WIDTH)
    with pytest.raises(ValueError, match="w1 and w3 interleaved"):
        experts.experts(h, weight(2 * INNER, WIDTH), w2, work, act, out, CHIP)
    with pytest.raises(ValueError, match=r"got w13 \[512, 128\] and w2 \[256, 128\]"):
        experts.experts(h, w13, weight(256, 128), work, act, out, CHIP)
    with pytest.raises(ValueError, match="4 pairs need as many rows, got 4 and 3"):
        experts.experts(h, w13, w2, work, act, out[:3], CHIP)


@outside
def test_blocks_fit_the_shared_memory() -> None:
    w13 = tiles.allocate(3072, 3072, tiles.Fp8Tiles(), "meta", (8,), True)
    w2 = tiles.allocate(3072, 1536, tiles.Fp8Tiles(), "meta", (8,))
    for arch in target.SHARED_BYTES:
        chip = target.of_arch(arch)
        for size in (1, 64, 8192):
            up, down = experts.up_block(size, w13, chip), experts.down_block(size, w2, chip)
            assert up.bn == 256 and up.bm == down.bm == router.unit_tokens(size)
            for block in (up, down):
                assert block.stages == 1 or block.stages * block.bn * block.bk < chip.shared_bytes

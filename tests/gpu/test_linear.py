"""Matrix products over packed weights on the GPU, against float64."""

from __future__ import annotations

import packed_support as support
import pytest
import torch

from saddle.kernels import linear, quant, tiles
from saddle.kernels.grouped import GroupedLinear
from saddle.kernels.norm_rope import rotary_table
from saddle.kernels.target import Target

pytestmark = support.needs_gpu

# Products of FP8 numbers are exact; the matrix units sum 128 of them with some 14 bits.
FP8_ERROR, BF16_ERROR = 1e-3, 4e-3
SHAPES = {"qkv": (8192, 3072), "o": (3072, 6144), "demo": (2048, 256)}


@pytest.fixture(scope="module", autouse=True)
def seed() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("chip", support.targets(), ids=lambda chip: chip.arch)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_weights(shape: str, chip: Target) -> None:
    matrix = support.fp8_weight(*SHAPES[shape])
    values = tiles.dequantise(matrix).double()
    for size in support.SIZES:
        a = support.activation(torch.randn(size, matrix.num_cols, device="cuda") * 3, chip)
        wanted = quant.dequantise(a).double() @ values.T
        parts = support.poisoned(linear.split_k(size, matrix, chip), size, matrix.num_rows)
        linear.linear(a, matrix, parts, chip)
        assert support.error(parts.sum(0), wanted) < FP8_ERROR, (size, "parts")
        again = torch.full_like(parts, 7.0)
        linear.linear(a, matrix, again, chip)
        assert torch.equal(parts, again), (size, "same bits")
        out = support.poisoned(size, matrix.num_rows, dtype=torch.bfloat16)
        linear.linear(a, matrix, out, chip)
        assert support.error(out, wanted) < BF16_ERROR, (size, "bf16")


@pytest.mark.parametrize("chip", support.targets(), ids=lambda chip: chip.arch)
def test_sums_are_added(chip: Target) -> None:
    matrix = support.fp8_weight(*SHAPES["o"])
    for size in (129, 500, 1000):
        a = support.activation(torch.randn(size, matrix.num_cols, device="cuda"), chip)
        out, x = support.poisoned(size, matrix.num_rows), torch.randn(size, matrix.num_rows, device="cuda")
        linear.linear(a, matrix, out, chip)
        wanted = x + out
        linear.linear(a, matrix, x, chip, add=True)
        assert torch.equal(x, wanted)
    with pytest.raises(ValueError, match="added to"):
        linear.linear(a[:100], matrix, x[:100], chip, add=True)


@pytest.mark.skipif(not support.is_hopper(), reason="NO GPU OF sm_90: the wgmma kernels are not tested")
@pytest.mark.parametrize("shape", SHAPES)
def test_wgmma(shape: str) -> None:
    matrix, chip = support.fp8_weight(*SHAPES[shape]), support.targets()[0]
    values = tiles.dequantise(matrix).double()
    kernels = GroupedLinear(matrix, chip)
    for size in (1, 63, 64, 65, 128, 129, 500, 640, 1000, 1024, 1500, 2048, 8192):
        a = support.activation(torch.randn(size, matrix.num_cols, device="cuda") * 3, chip)
        wanted = quant.dequantise(a).double() @ values.T
        for dtype, bar in ((torch.float32, FP8_ERROR), (torch.bfloat16, BF16_ERROR)):
            # A row more than there are tokens: nothing may be written behind the last one.
            out = support.poisoned(size + 1, matrix.num_rows, dtype=dtype)
            kernels(a, matrix, out[:size])
            assert support.error(out[:size], wanted) < bar, (size, dtype)
            assert out[size].isnan().all(), (size, dtype)
            again = torch.full_like(out[:size], 7.0)
            kernels(a, matrix, again)
            assert torch.equal(out[:size], again), (size, "same bits")
        again = torch.full((size, matrix.num_rows), 7.0, device="cuda")
        kernels(a, matrix, again)
        start = torch.randn(size + 1, matrix.num_rows, device="cuda")
        summed, found = start[:size] + again, [start.clone() for _ in range(3)]
        for x in found:
            kernels(a, matrix, x[:size], add=True)
            assert torch.equal(x[size], start[size]) and torch.equal(x, found[0]), (size, "added, same bits")
        assert torch.equal(found[0][:size], summed), (size, "added")
    a = support.activation(torch.randn(8192, matrix.num_cols, device="cuda"), chip)
    parts = support.poisoned(1, 8192, matrix.num_rows)
    linear.linear(a, matrix, parts, chip, 0, kernels)
    direct = torch.empty_like(parts)
    kernels(a, matrix, direct)
    assert kernels.pays(8192) and torch.equal(parts, direct), "linear takes them where they pay"


def test_a_wrong_scale_is_seen() -> None:
    """The thresholds tell a weight whose scales are shifted by one block from the right one."""
    matrix = support.fp8_weight(256, 1024)
    a = support.activation(torch.randn(8, 1024, device="cuda"), support.targets()[0])
    wanted = quant.dequantise(a).double() @ tiles.dequantise(matrix).double().T
    tiles.scale_view(matrix).copy_(tiles.scale_view(matrix).roll(1, -2).clone())
    out = support.poisoned(8, 256)
    linear.linear(a, matrix, out, support.targets()[0])
    assert support.error(out, wanted) > 20 * BF16_ERROR


@pytest.mark.parametrize("vocab", [200064, 1024])
def test_lm_head(vocab: int) -> None:
    chip = support.targets()[0]
    matrix = tiles.pack(torch.randn(vocab, 3072, device="cuda", dtype=torch.bfloat16) * 0.02)
    values = tiles.dequantise(matrix)
    for size in (*support.SIZES[:-2], 256):
        h = torch.randn(size, 3072, device="cuda", dtype=torch.bfloat16)
        out = support.poisoned(size, vocab)
        linear.lm_head(h, matrix, out, chip)
        assert support.error(out, h.float() @ values.T) < 1e-4, size


@pytest.mark.skipif(not support.is_hopper(), reason="NO GPU OF sm_90: the wgmma kernels are not tested")
@pytest.mark.parametrize(("heads", "kv_heads", "hidden"), [(48, 8, 3072), (12, 2, 256)])
def test_queries_are_turned(heads: int, kv_heads: int, hidden: int) -> None:
    """Queries times the gain of their norm and rotated, sums of squares; keys and values as without."""
    matrix, chip = support.fp8_weight((heads + 2 * kv_heads) * 128, hidden), support.targets()[0]
    values, width = tiles.dequantise(matrix).double(), heads * 128
    kernels = GroupedLinear(matrix, chip, None, heads)
    cos, sin = rotary_table(64, 5e6, 3000, torch.float32, torch.device("cuda"))
    gain = torch.rand(width, device="cuda") + 0.5
    for size in (1, 63, 65, 129, 1000, 4096):
        a = support.activation(torch.randn(size, hidden, device="cuda") * 3, chip)
        positions = torch.randint(0, 3000, (size,), device="cuda", dtype=torch.int32)
        plain, out = (support.poisoned(size + 1, matrix.num_rows, dtype=torch.bfloat16) for _ in range(2))
        squares = support.poisoned(size + 1, heads)
        kernels(a, matrix, plain[:size])
        kernels.turned(a, matrix, out[:size], gain, cos, sin, positions, squares[:size])
        assert torch.equal(out[:size, width:], plain[:size, width:])
        assert out[size].isnan().all() and squares[size].isnan().all()
        raw = (quant.dequantise(a).double() @ values.T)[:, :width].view(size, heads, 128)
        assert support.error(squares[:size], raw.square().sum(-1)) < FP8_ERROR
        gained = raw * gain.double().view(heads, 128)
        first, second, rest = gained[..., :32], gained[..., 32:64], gained[..., 64:]
        turn, lift = (table.double()[positions.long()][:, None, :32] for table in (cos, sin))
        wanted = torch.cat((first * turn - second * lift, second * turn + first * lift, rest), -1)
        assert support.error(out[:size, :width].view(size, heads, 128), wanted) < BF16_ERROR, size

"""The norm kernel adds, normalises and quantises, in Triton's interpreter (which cuts where a GPU rounds)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import fused_norm, quant
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.paged_attention import EPS, relative_error

FP8_ERROR = 0.08  # cutting to three bits of mantissa; rounding halves it


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def poisoned(num_tokens: int, width: int, dtype: torch.dtype) -> quant.Activation:
    out = quant.allocate(num_tokens, width, dtype, "cpu")
    (out.data if out.scale is None else out.data.view(torch.uint8)).fill_(0x7F if out.scale is not None else torch.nan)
    if out.scale is not None:
        out.scale.fill_(torch.nan)
    return out


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [256, 384])
def test_sums_parts_and_norms(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    for num_parts in (0, 1, 4):
        x, weight, out = torch.randn(3, width) * 3, torch.rand(width), poisoned(3, width, dtype)
        pairs = torch.randn(3, max(num_parts, 1), width)
        expected = x + pairs.sum(1) if num_parts else x.clone()
        fused_norm.add_norm(x, pairs.transpose(0, 1) if num_parts else None, weight, EPS, out)
        assert relative_error(x, expected) < 1e-6
        limit = FP8_ERROR if out.scale is not None else 6e-3
        assert relative_error(quant.dequantise(out), normed(expected, weight)) < limit


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_a_norm_left_to_the_product(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    limit = FP8_ERROR if dtype != torch.bfloat16 else 6e-3
    weight, table = torch.rand(384), torch.randn(9, 384).bfloat16()
    token_ids = torch.tensor([7, 0, 8], dtype=torch.int32)
    for num_parts in (0, 4):
        x, out, squares = torch.randn(3, 384) * 3, poisoned(3, 384, dtype), torch.full((3, 3), torch.nan)
        x[0] *= 1e-6  # scales carry what the norm would have made of it
        pairs = torch.randn(num_parts, 3, 384) * x.abs().mean(-1)[None, :, None]
        expected = x + pairs.sum(0)
        fused_norm.add_norm(x, pairs if num_parts else None, weight, EPS, out, squares=squares)
        assert relative_error(x, expected) < 1e-6
        assert relative_error(squares.sum(0), expected.square().sum(-1)) < 1e-6
        inverse = (squares.sum(0) / 384 + EPS).rsqrt()
        assert relative_error(quant.dequantise(out) * inverse[:, None], normed(expected, weight)) < limit
    x, out = torch.full((3, 384), torch.nan), poisoned(3, 384, dtype)
    fused_norm.embed_norm(token_ids, table, x, weight, EPS, out, squares=squares)
    assert torch.equal(x, table[token_ids].float())
    assert relative_error(squares.T, x.view(3, 3, 128).square().sum(-1)) < 1e-6
    assert relative_error(quant.dequantise(out), x * weight) < limit
    with pytest.raises(ValueError, match=r"squares must be \[3, 3\], got \[3, 2\]"):
        fused_norm.add_norm(x, None, weight, EPS, out, squares=squares[:, :2])


@in_interpreter
def test_small_rows_count_the_epsilon() -> None:
    x, out = torch.full((1, 128), 1e-3), poisoned(1, 128, torch.bfloat16)
    fused_norm.add_norm(x, None, torch.ones(128), EPS, out)
    assert relative_error(out.data.float(), torch.full((1, 128), 0.5**0.5)) < 4e-3


@in_interpreter
def test_a_group_of_zeros_is_finite() -> None:
    x, out = torch.zeros(1, 256), poisoned(1, 256, torch.float8_e4m3fn)
    x[0, :128] = torch.randn(128)
    fused_norm.add_norm(x, None, torch.ones(256), EPS, out)
    found = quant.dequantise(out)
    assert not found[0, 128:].any()
    assert bool(found[0, :128].any())


@in_interpreter
def test_embedding_and_final_norm() -> None:
    torch.manual_seed(0)
    table, weight = torch.randn(20, 256).bfloat16(), torch.rand(256)
    token_ids = torch.tensor([7, 0, 19, 7], dtype=torch.int32)
    x, out = torch.full((4, 256), torch.nan), poisoned(4, 256, torch.bfloat16)
    fused_norm.embed_norm(token_ids, table, x, weight, EPS, out)
    assert torch.equal(x, table[token_ids].float())
    assert relative_error(out.data, normed(x, weight)) < 6e-3

    parts, before = torch.randn(2, 4, 256), x.clone()
    last = torch.full((2, 256), torch.nan, dtype=torch.bfloat16)
    fused_norm.final_norm(x, parts, torch.tensor([3, 1], dtype=torch.int32), weight, EPS, last)
    assert relative_error(last, normed(x + parts.sum(0), weight)[[3, 1]]) < 6e-3
    assert torch.equal(x, before)


@in_interpreter
def test_odd_widths_are_refused() -> None:
    for squares in (None, torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="multiple of 128"):
            fused_norm.add_norm(torch.zeros(1, 200), None, torch.ones(200), EPS, poisoned(1, 200, torch.bfloat16),
                                squares=squares)  # fmt: skip

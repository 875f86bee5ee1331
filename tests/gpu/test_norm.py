"""Norms and the step before attention on a GPU, against float64 and float32 references."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from saddle.kernels import fused_norm, qk_rope, quant
from saddle.kernels.paged_kv import BLOCK_SIZE, HEAD_DIM, UNSCALED, read_tokens
from tests.support.paged_attention import EPS, make_case, relative_error, split

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOKENS = [1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 128, 1000, 8192]
NAN_BYTE = 0x7F  # of e4m3
FP8_ERROR = 0.04  # rounding to three bits of mantissa is 2.6 % on normal numbers


def poisoned(num_tokens: int, width: int, dtype: torch.dtype) -> quant.Activation:
    out = quant.allocate(num_tokens, width, dtype, "cuda")
    if out.scale is None:
        out.data.fill_(float("nan"))
    else:
        out.data.view(torch.uint8).fill_(NAN_BYTE)
        out.scale.fill_(float("nan"))
    return out


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_add_norm(num_tokens: int) -> None:
    for width, num_parts, part_dtype in ((3072, 8, torch.float32), (3072, 8, torch.bfloat16), (256, 3, torch.float32)):
        pairs = torch.randn(num_tokens, num_parts, width, device="cuda").to(part_dtype)
        weight = torch.rand(width, device="cuda")
        start = torch.randn(num_tokens, width, device="cuda") * 3
        expected = start.double() + pairs.double().sum(1)
        for dtype, limit in ((torch.float8_e4m3fn, FP8_ERROR), (torch.bfloat16, 3e-3)):
            x, out = start.clone(), poisoned(num_tokens, width, dtype)
            fused_norm.add_norm(x, pairs.transpose(0, 1), weight, EPS, out)
            assert relative_error(x, expected) < 1e-6
            assert relative_error(quant.dequantise(out), normed(expected, weight)) < limit
            again, same = start.clone(), poisoned(num_tokens, width, dtype)
            fused_norm.add_norm(again, pairs.transpose(0, 1), weight, EPS, same)
            assert torch.equal(x, again)
            assert torch.equal(out.data.view(torch.uint8), same.data.view(torch.uint8))


def test_a_group_of_zeros_is_finite() -> None:
    x, out = torch.randn(2, 3072, device="cuda"), poisoned(2, 3072, torch.float8_e4m3fn)
    x[:, 128:256] = 0
    fused_norm.add_norm(x, None, torch.ones(3072, device="cuda"), EPS, out)
    found = quant.dequantise(out)
    assert not found[:, 128:256].any()
    assert bool(found[:, :128].any())


@pytest.mark.parametrize("num_tokens", [1, 33, 1000])
def test_embed_and_final_norm(num_tokens: int) -> None:
    table = torch.randn(500, 3072, device="cuda").bfloat16()
    token_ids = torch.randint(500, (num_tokens,), device="cuda", dtype=torch.int32)
    weight = torch.rand(3072, device="cuda")
    x = torch.full((num_tokens, 3072), float("nan"), device="cuda")
    out = poisoned(num_tokens, 3072, torch.float8_e4m3fn)
    fused_norm.embed_norm(token_ids, table, x, weight, EPS, out)
    assert torch.equal(x, table[token_ids].float())
    assert relative_error(quant.dequantise(out), normed(x, weight)) < FP8_ERROR

    parts = torch.randn(2, num_tokens, 3072, device="cuda")
    index = torch.randint(num_tokens, (5,), device="cuda", dtype=torch.int32)
    before, last = x.clone(), torch.full((5, 3072), float("nan"), device="cuda", dtype=torch.bfloat16)
    fused_norm.final_norm(x, parts, index, weight, EPS, last)
    assert torch.equal(x, before)
    assert relative_error(last, normed(x + parts.sum(0), weight)[index]) < 3e-3


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8_dynamic"])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 1000])
def test_qk_rope_write(num_tokens: int, kind: str) -> None:
    for heads, kv_heads in ((48, 8), (12, 2)):
        case = make_case([num_tokens + 37, 0], [num_tokens, 0], heads=heads, kv_heads=kv_heads, kind=kind,
                         device="cuda", seed=num_tokens)  # fmt: skip
        q, k, v = split(case)
        out = torch.full((case.num_tokens, heads * HEAD_DIM), float("nan"), device="cuda", dtype=torch.bfloat16)
        before = case.kv.data.view(torch.uint8).clone()
        qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions, case.slots,
                              case.kv, out)  # fmt: skip
        assert relative_error(out[:num_tokens] / qk_rope.QUERY_SCALE, q[:num_tokens].flatten(1)) < 3e-3
        assert bool(out[num_tokens:].isnan().all())
        found_k, found_v = read_tokens(case.kv, case.slots[:num_tokens])
        limit = 3e-3 if case.kv.scale_kind == UNSCALED else FP8_ERROR
        assert relative_error(found_k, k[:num_tokens]) < limit
        assert relative_error(found_v, v[:num_tokens]) < limit
        after = case.kv.data.view(torch.uint8).clone()
        blocks, offsets = case.slots[:num_tokens] // BLOCK_SIZE, case.slots[:num_tokens] % BLOCK_SIZE
        for memory in (before, after):
            memory[blocks, :, :, offsets] = 0
        assert torch.equal(before, after), "something else was written"


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8_dynamic"])
@pytest.mark.parametrize("num_tokens", [1, 64, 1000])
def test_kv_write(num_tokens: int, kind: str) -> None:
    """Behind turned queries: the same keys and values as with them, and 1 / rms."""
    for heads, kv_heads in ((48, 8), (12, 2)):
        cases = [make_case([num_tokens + 37, 0], [num_tokens, 0], heads=heads, kv_heads=kv_heads, kind=kind,
                           device="cuda", seed=num_tokens) for _ in range(2)]  # fmt: skip
        case, other = cases
        q = torch.empty(case.num_tokens, heads * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions, case.slots,
                              case.kv, q)  # fmt: skip
        raw = torch.unflatten(other.qkv[:, : heads * HEAD_DIM].float(), -1, (heads, HEAD_DIM))
        squares = raw.square().sum(-1)
        factors = torch.full((case.num_tokens,), float("nan"), device="cuda")
        other.qkv[:, : heads * HEAD_DIM] = float("nan")
        qk_rope.kv_write(other.qkv, squares, other.k_norm, EPS, other.cos, other.sin, other.positions, other.slots,
                         other.kv, factors)  # fmt: skip
        # Sums over a token's heads are in another order: a number in thousands is rounded to the other side.
        limit = 1e-4 if kind == "bf16" else 1e-2
        for one, same in zip(*(read_tokens(kv, case.slots[:num_tokens]) for kv in (case.kv, other.kv)), strict=True):
            assert relative_error(same, one) < limit
        wanted = (squares.double().sum(-1) / (heads * HEAD_DIM) + EPS).rsqrt() * qk_rope.QUERY_SCALE
        assert relative_error(factors[:num_tokens], wanted[:num_tokens]) < 1e-5

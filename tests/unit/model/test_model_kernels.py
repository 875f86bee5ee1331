"""Each kernel's torch code against the formula it stands for, written out plainly."""

from __future__ import annotations

import math

import pytest
import torch

from saddle.kernels import kv_cache, moe
from saddle.kernels.norm_rope import rms_norm, rms_norm_, rotary_table, rotate_, rotation
from saddle.model.formats import Fp8Block
from saddle.parallel.layout import Slice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 96).to(dtype) * 3, torch.rand(96).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), expected, rtol=tolerance, atol=1e-6)
    wider = torch.zeros(5, 200, dtype=dtype)
    wider[:, 50:146] = x
    rms_norm_(wider[:, 50:146], weight, 1e-6)
    torch.testing.assert_close(wider[:, 50:146].double(), expected, rtol=tolerance, atol=1e-6)
    assert not wider[:, :50].any()
    assert not wider[:, 146:].any()


def test_eps_counts_for_small_rows() -> None:
    x = torch.full((1, 64), 1e-3)
    torch.testing.assert_close(rms_norm(x, torch.ones(64), 1e-6), torch.full((1, 64), math.sqrt(0.5)))


def test_rotary() -> None:
    positions, rotary_dim, theta = torch.tensor([0, 1, 77, 100_000]), 8, 5e6
    x = torch.randn(4, 3, 16)
    expected = x.clone()
    for t, position in enumerate(positions.tolist()):
        for i in range(rotary_dim // 2):
            angle = torch.tensor(position, dtype=torch.float32) * theta ** (-2 * i / rotary_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            a, b = x[t, :, i], x[t, :, i + rotary_dim // 2]
            expected[t, :, i] = a * cos - b * sin
            expected[t, :, i + rotary_dim // 2] = b * cos + a * sin
    cos_table, sin_table = rotary_table(rotary_dim, theta, 100_001, torch.float32, torch.device("cpu"))
    rotate_(x, *rotation(cos_table[positions], sin_table[positions]))
    # At position 100,000 a float32 angle is off by up to 4e-3 from its exact value, here as in the reference.
    torch.testing.assert_close(x[:3], expected[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x[3], expected[3], rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_paged_memory(kv_heads: int) -> None:
    num_blocks, block_size, dim = 6, 4, 8
    kv = torch.zeros(num_blocks, 2, kv_heads, block_size, dim)
    slots = torch.tensor([13, 2, 23, 0])
    new = torch.randn(4, 2 * kv_heads, dim)
    kv_cache.write(kv, kv_cache.slot_rows(slots, kv_heads, block_size), new)
    expected = torch.zeros_like(kv)
    for token, slot in enumerate(slots.tolist()):
        for head in range(kv_heads):
            expected[slot // block_size, 0, head, slot % block_size] = new[token, head]
            expected[slot // block_size, 1, head, slot % block_size] = new[token, kv_heads + head]
    assert torch.equal(kv, expected)

    kv = torch.randn_like(kv)
    tables = torch.tensor([[5, 0], [3, 3], [1, 4]])
    chunks = kv_cache.block_chunks(tables, kv_heads).contiguous()
    keys, values = kv_cache.gather(kv, chunks, torch.empty(2000))
    assert keys.shape == (3, kv_heads, 2 * block_size, dim)
    for row, blocks in enumerate(tables.tolist()):
        assert torch.equal(keys[row], torch.cat([kv[block, 0] for block in blocks], dim=1))
        assert torch.equal(values[row], torch.cat([kv[block, 1] for block in blocks], dim=1))


def experts_one_by_one(
    h: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(h.shape, dtype=torch.float64)
    half = w13.shape[2] // 2
    for t in range(h.shape[0]):
        for expert, weight in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            both = h[t].double() @ w13[expert].double()
            out[t] += weight * (torch.nn.functional.silu(both[:half]) * both[half:]) @ w2[expert].double()
    return out


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (32, 8), (256, 8)])
def test_experts(num_experts: int, top_k: int, num_tokens: int) -> None:
    h, w13 = torch.randn(num_tokens, 24), torch.randn(num_experts, 24, 32) * 0.2
    w2 = torch.randn(num_experts, 16, 24) * 0.2
    chosen = torch.rand(num_tokens, num_experts).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k)
    expected = experts_one_by_one(h, chosen, weights, w13, w2)
    for way in (moe.experts, moe._copied_experts, moe._by_expert):
        torch.testing.assert_close(way(h, chosen, weights, w13, w2).double(), expected, rtol=1e-4, atol=1e-5)


def test_route_selects_by_bias_and_weighs_without() -> None:
    h, gate = torch.randn(50, 24), torch.randn(24, 16)
    bias = torch.randn(16)
    chosen, weights = moe.route(h, gate, bias, 4)
    scores = torch.sigmoid(h @ gate)
    expected = (scores + bias).topk(4).indices
    assert torch.equal(chosen.sort().values, expected.sort().values)
    assert not torch.equal(chosen.sort().values, scores.topk(4).indices.sort().values)
    plain = scores.gather(1, chosen)
    torch.testing.assert_close(weights, plain / plain.sum(-1, keepdim=True))


@pytest.mark.parametrize(("rows", "columns", "granularity"), [
    (Slice(0, 256), Slice(0, 384), (128, 128)),
    (Slice(128, 256), Slice(192, 384), (128, 64)),
    (Slice(96, 192), Slice(128, 256), (32, 128)),
])  # fmt: skip
def test_fp8_slices_carry_their_scales(rows: Slice, columns: Slice, granularity: tuple[int, int]) -> None:
    stored = {"": torch.randn(256, 384).to(torch.float8_e4m3fn), "_scale_inv": torch.rand(2, 3)}
    index = torch.arange(256)[:, None] // 128, torch.arange(384)[None, :] // 128
    whole = stored[""].float() * stored["_scale_inv"][index]
    read: list[str] = []

    def get(suffix: str, *parts: Slice) -> torch.Tensor:
        some_rows, some_columns = parts
        read.append(suffix)
        return stored[suffix][some_rows.start : some_rows.stop, some_columns.start : some_columns.stop]

    found = Fp8Block().read(get, rows, columns)
    assert found.granularity == granularity
    assert found.weight.dtype == torch.float8_e4m3fn
    assert found.scale.shape == (rows.size // granularity[0], columns.size // granularity[1])
    assert torch.equal(found.dequantise(), whole[rows.start : rows.stop, columns.start : columns.stop])
    assert sorted(read) == ["", "_scale_inv"]

"""QK-norm, rotary embedding and the write into paged memory, in Triton's interpreter (which cuts, not rounds)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import qk_rope
from saddle.kernels.paged_kv import HEAD_DIM, KVLayer, read_tokens, swizzle, write_tokens
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.paged_attention import EPS, make_case, relative_error, split


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize(("kind", "limit"), [("fp16", 1e-3), ("fp8", 0.1), ("fp8_dynamic", 0.08)])
def test_norm_rotation_and_write(kind: str, limit: float) -> None:
    case = make_case([70, 0, 3], [5, 0, 3], heads=6, kv_heads=2, kind=kind)
    q, k, v = split(case)
    out = torch.full((case.num_tokens, 6 * HEAD_DIM), torch.nan, dtype=torch.float16)
    before = case.kv.data.view(torch.uint8).clone()
    qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions, case.slots,
                          case.kv, out)  # fmt: skip
    real = case.positions >= 0
    assert relative_error(out[real] / qk_rope.QUERY_SCALE, q[real].flatten(1)) < 1e-3
    assert bool(out[~real].isnan().all())
    found_k, found_v = read_tokens(case.kv, case.slots[real])
    assert relative_error(found_k, k[real]) < limit
    assert relative_error(found_v, v[real]) < limit
    after = case.kv.data.view(torch.uint8).clone()
    for memory in (before, after):
        memory[case.slots[real] // 64, :, :, case.slots[real] % 64] = 0
    assert torch.equal(before, after), "something else was written"


@in_interpreter
@pytest.mark.parametrize("kind", ["fp16", "fp8", "fp8_dynamic"])
def test_keys_and_values_behind_turned_queries(kind: str) -> None:
    cases = [make_case([70, 0, 3], [5, 0, 3], heads=6, kv_heads=2, kind=kind) for _ in range(2)]
    case, other = cases
    q = torch.full((case.num_tokens, 6 * HEAD_DIM), torch.nan, dtype=torch.float16)
    qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions, case.slots,
                          case.kv, q)  # fmt: skip
    squares = torch.unflatten(other.qkv[:, : 6 * HEAD_DIM].float(), -1, (6, HEAD_DIM)).square().sum(-1)
    other.qkv[:, : 6 * HEAD_DIM] = torch.nan  # not read
    factors = torch.full((case.num_tokens,), torch.nan)
    qk_rope.kv_write(other.qkv, squares, other.k_norm, EPS, other.cos, other.sin, other.positions, other.slots,
                     other.kv, factors)  # fmt: skip
    assert torch.equal(case.kv.data.view(torch.uint8), other.kv.data.view(torch.uint8))
    real = case.positions >= 0
    wanted = (squares.sum(-1) / (6 * HEAD_DIM) + EPS).rsqrt() * qk_rope.QUERY_SCALE
    assert relative_error(factors[real], wanted[real]) < 1e-5
    with pytest.raises(ValueError, match="7 heads"):
        qk_rope.kv_write(other.qkv, torch.zeros(8, 7), other.k_norm, EPS, other.cos, other.sin, other.positions,
                         other.slots, other.kv, factors)  # fmt: skip


@in_interpreter
def test_tokens_without_a_slot_leave_memory_alone() -> None:
    case = make_case([4], [4], heads=2, kv_heads=1, kind="fp16")
    before = case.kv.data.view(torch.uint8).clone()
    out = torch.full((4, 2 * HEAD_DIM), torch.nan, dtype=torch.float16)
    qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions,
                          torch.full_like(case.slots, -1), case.kv, out)  # fmt: skip
    assert torch.equal(case.kv.data.view(torch.uint8), before)
    assert not out.isnan().any()


@outside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_reading_is_the_inverse_of_writing(dtype: torch.dtype) -> None:
    kv = KVLayer(torch.zeros(3, 2, 2, 64, HEAD_DIM).to(dtype))
    slots = torch.tensor([0, 77, 64, 191])
    keys, values = (torch.randn(4, 2, HEAD_DIM).to(dtype) for _ in range(2))
    write_tokens(kv, slots, keys, values)
    found_k, found_v = read_tokens(kv, slots)
    assert torch.equal(found_k, keys.float())
    assert torch.equal(found_v, values.float())


@outside
@pytest.mark.parametrize("chunks", [16, 8])
def test_chunks_of_eight_tokens_lie_in_eight_places(chunks: int) -> None:
    places = swizzle(torch.arange(64), chunks)
    length = HEAD_DIM // chunks
    assert torch.equal(places.sort(-1).values, torch.arange(HEAD_DIM).expand(64, -1))
    for first in range(0, 64, 8):
        for chunk in range(chunks):
            mine = places[first : first + 8, chunk * length] // length
            assert sorted((mine % 8).tolist()) == list(range(8))
    runs = places.view(64, chunks, length)
    assert torch.equal(runs - runs[..., :1], torch.arange(length).expand_as(runs))


@outside
def test_memory_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="64, 128"):
        KVLayer(torch.zeros(3, 2, 2, 16, HEAD_DIM))
    with pytest.raises(ValueError, match="FP8"):
        KVLayer(torch.zeros(3, 2, 2, 64, HEAD_DIM), torch.zeros(3, 2, 2, 64))

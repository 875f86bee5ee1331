"""Split decode attention against float32, in Triton's interpreter (which cuts where a GPU rounds)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import paged_decode, qk_rope, quant
from saddle.kernels.paged_kv import HEAD_DIM, read_tokens
from saddle.kernels.target import Target, of_arch
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.paged_attention import EPS, Case, make_case, reference, relative_error, split

CPU = torch.device("cpu")
LIMITS = {"fp16": 5e-3, "fp8": 0.15, "fp8_dynamic": 0.08}


def chip(num_sms: int) -> Target:
    return dataclasses.replace(of_arch("sm_90"), num_sms=num_sms)


def work_for(case: Case, num_sms: int = 4) -> paged_decode.DecodeWork:
    work = paged_decode.DecodeWork.allocate(len(case.lens) + 1, case.kv_heads, chip(num_sms), CPU)
    for scratch in (work.partial, work.stats):
        scratch.fill_(torch.nan)
    return work


def run(case: Case, work: paged_decode.DecodeWork, fused: bool, dtype: torch.dtype) -> quant.Activation:
    rows = len(case.lens)
    out = quant.allocate(rows, case.heads * HEAD_DIM, dtype, CPU)
    (out.data if out.scale is None else out.scale).fill_(torch.nan)
    paged_decode.plan_decode(case.context_lens, work, rows)
    common = (case.kv, case.block_tables, case.row_ids, case.context_lens, work, rows, out)
    if fused:
        paged_decode.decode_fused(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, *common)
    else:
        q = torch.full((rows, case.heads * HEAD_DIM), torch.nan, dtype=torch.float16)
        qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions, case.slots,
                              case.kv, q)  # fmt: skip
        paged_decode.decode(q, *common)
    return out


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["fp16", "fp8", "fp8_dynamic"])
def test_attention_of_unequal_rows(kind: str, fused: bool) -> None:
    case = make_case([400, 0, 65, 64, 1], heads=6, kv_heads=1, kind=kind, seed=3)
    expected, work = reference(case), work_for(case)
    _, k, v = split(case)
    found = run(case, work, fused, torch.bfloat16).data
    real = case.positions >= 0
    assert relative_error(found[real], expected[real]) < LIMITS[kind]
    assert bool(found[~real].isnan().all())
    assert work.items[:, 0].tolist().count(0) > 1, "the long row was not split"
    assert not work.counters.any()
    kept_k, kept_v = read_tokens(case.kv, case.slots[real])
    assert relative_error(kept_k, k[real]) < LIMITS[kind]
    assert relative_error(kept_v, v[real]) < LIMITS[kind]


@in_interpreter
def test_quantised_output() -> None:
    case = make_case([130, 3], heads=6, kv_heads=2, kind="fp16")
    expected = reference(case)
    found = run(case, work_for(case), True, torch.float8_e4m3fn)
    assert found.scale is not None
    assert relative_error(quant.dequantise(found), expected) < 0.08


@in_interpreter
@pytest.mark.parametrize(("lens", "num_sms"), [
    ([2048], 132), ([2048] * 8, 132), ([131072, 5, 0, 700], 132), ([0, 0], 132), ([64 * 3, 64 * 3 + 1, 1], 4),
    ([17 * row for row in range(64)], 20), ([2048] * 128, 132), ([204800], 132),
], ids=str)  # fmt: skip
def test_items_cover_every_block_once(lens: list[int], num_sms: int) -> None:
    work = paged_decode.DecodeWork.allocate(len(lens) + 2, 8, chip(num_sms), CPU)
    paged_decode.plan_decode(torch.tensor([*lens, 999, 999], dtype=torch.int32), work, len(lens))
    items = [item[:5] for item in work.items.tolist() if item[0] >= 0]
    wanted = [(row, block) for row, length in enumerate(lens) for block in range(-(-length // 64))]
    assert [(row, start + i) for row, start, count, _, _ in items for i in range(count)] == wanted
    for place, (row, _, count, first, siblings) in enumerate(items):
        assert count > 0
        assert {item[0] for item in items[first : first + siblings]} == {row}
        assert first <= place < first + siblings
    sizes = [count for _, _, count, _, _ in items]
    total = sum(sizes)
    # Items fill the chip where there is enough to do, and none is much longer than an equal share.
    assert max(sizes, default=0) <= max(paged_decode.MIN_BLOCKS, -(-total // max(1, work.target_items * 3 // 4)))
    assert len(items) <= work.max_items(len(lens))


@in_interpreter
@pytest.mark.parametrize(("num_rows", "blocks", "limit"), [(24, 32, 32), (8, 512, 128), (5, 2000, 334), (48, 32, 48)])
def test_cuts_leave_no_ragged_end(num_rows: int, blocks: int, limit: int) -> None:
    """Equal rows over a chip of 264 programs: rounds of programs times the longest item, in blocks. 24 rows of 32
    blocks cut in two would take two rounds of 16; 8 rows of 512 blocks cut by 125 would be 40 items for 33 places."""
    work = paged_decode.DecodeWork.allocate(num_rows, 8, chip(132), CPU)
    paged_decode.plan_decode(torch.full((num_rows,), 64 * blocks, dtype=torch.int32), work, num_rows)
    sizes = [item[2] for item in work.items.tolist() if item[0] >= 0]
    rounds = -(-len(sizes) * 8 // work.num_slots)
    assert rounds * max(sizes) <= limit


@in_interpreter
def test_planted_values_need_dynamic_scales() -> None:
    """Values above e4m3's 448 and rows near its smallest numbers: a static scale of 1 loses them."""
    for magnitude in (2000.0, 1e-3):
        lens = [66]
        expected = reference(make_case(lens, heads=2, kv_heads=1, kind="bf16", spread=magnitude))
        errors = {}
        for kind in ("fp8", "fp8_dynamic"):
            case = make_case(lens, heads=2, kv_heads=1, kind=kind, spread=magnitude, static=(1.0, 1.0))
            errors[kind] = relative_error(run(case, work_for(case), True, torch.bfloat16).data, expected)
        assert errors["fp8_dynamic"] < 0.1
        assert errors["fp8"] > 0.3


@outside
def test_bytes_are_known_before_allocation() -> None:
    work = paged_decode.DecodeWork.allocate(7, 2, chip(20), CPU)
    assert work.num_bytes == paged_decode.DecodeWork.bytes_for(7, 2, chip(20))


@outside
@pytest.mark.parametrize(("arch", "stages"), [("sm_80", 3), ("sm_89", 2), ("sm_90", 4), ("sm_120", 2), ("gfx942", 2)])
def test_two_programs_fit_a_multiprocessor(arch: str, stages: int) -> None:
    target = of_arch(arch)
    assert paged_decode.DecodeWork.allocate(1, 8, target, torch.device("meta")).num_stages == stages

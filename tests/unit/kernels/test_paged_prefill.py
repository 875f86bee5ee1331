"""Attention of prompts over paged memory against float32, in Triton's interpreter (which cuts where a GPU rounds)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import paged_prefill, qk_rope, quant
from saddle.kernels.paged_kv import HEAD_DIM
from saddle.kernels.target import of_arch
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.paged_attention import EPS, Case, make_case, reference, relative_error

LIMITS = {"fp16": 2e-3, "fp8": 0.15, "fp8_dynamic": 0.1}
WORK = paged_prefill.PrefillWork(torch.full((64, 32, HEAD_DIM), torch.nan), torch.full((64, 2, 32), torch.nan))
SMALL = paged_prefill.PrefillTiles(32, 64, 4, 2)


def run(
    case: Case, tiles: paged_prefill.PrefillTiles, first: int = 0, dtype: torch.dtype = torch.float16, splits: int = 1
) -> torch.Tensor:
    rows = len(case.lens) - first
    q = torch.full((case.num_tokens, case.heads * HEAD_DIM), torch.nan, dtype=torch.float16)
    qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions, case.slots,
                          case.kv, q)  # fmt: skip
    out = quant.allocate(case.num_tokens, case.heads * HEAD_DIM, dtype, "cpu")
    (out.data if out.scale is None else out.scale).fill_(torch.nan)
    num_tokens = case.num_tokens - int(case.query_starts[first])
    paged_prefill.launch(q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens, first,
                         rows, num_tokens, out, tiles, 0, WORK, splits)  # fmt: skip
    return quant.dequantise(out)


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize("kind", ["fp16", "fp8", "fp8_dynamic"])
def test_chunks_behind_contexts(kind: str) -> None:
    case = make_case([140, 13, 65], [11, 13, 1], heads=6, kv_heads=1, kind=kind)
    expected = reference(case)
    assert relative_error(run(case, SMALL), expected) < LIMITS[kind]


@in_interpreter
@pytest.mark.parametrize("tiles", [SMALL, paged_prefill.PrefillTiles(16, 128, 4, 2)], ids=str)
def test_only_the_asked_rows(tiles: paged_prefill.PrefillTiles) -> None:
    case = make_case([90, 200, 70], [2, 9, 4], heads=4, kv_heads=2, kind="fp16", seed=5)
    expected = reference(case)
    found = run(case, tiles, first=1)
    assert relative_error(found[2:], expected[2:]) < LIMITS["fp16"]
    assert bool(found[:2].isnan().all())


@in_interpreter
@pytest.mark.parametrize("splits", [2, 5])
def test_split_keys(splits: int) -> None:
    case = make_case([300, 13, 66], [7, 13, 5], heads=6, kv_heads=2, kind="fp16", seed=2)
    expected = reference(case)
    assert relative_error(run(case, SMALL, splits=splits), expected) < LIMITS["fp16"]
    assert relative_error(run(case, SMALL, splits=splits, dtype=torch.float8_e4m3fn), expected) < 0.08


@outside
def test_splits_are_chosen_where_tiles_do_not_fill_the_chip() -> None:
    work = paged_prefill.PrefillWork.allocate(of_arch("sm_90"), torch.device("meta"))
    assert work.num_slots == 264

    def chosen(num_tokens: int, context: int, slots: int = 264, keys: int = 64, room: int = len(work.partial)) -> int:
        costs = paged_prefill.TRITON_COSTS if keys == 64 else paged_prefill.WGMMA_COSTS
        programs = 8 * (num_tokens // 21 + 1)
        return paged_prefill.choose_splits(programs, context // keys, slots, room, costs)

    assert [chosen(new, context) for new, context in ((8192, 8192), (2048, 2048), (200, 200))] == [1, 1, 1]
    # 8 programs fill a chip of 264 with the most parts that there are; 80 take three, so that 240 run at once.
    assert [chosen(new, context) for new, context in ((1, 200000), (200, 65536), (200, 4096))] == [16, 3, 3]
    # The wgmma kernel, one block a multiprocessor: as measured best on an H100.
    assert [chosen(new, context, 132, 128) for new, context in ((8192, 8192), (8192, 65536), (2048, 2048))] == [1] * 3
    assert [chosen(new, context, 132, 128) for new, context in ((200, 32768), (64, 8192), (64, 65536))] == [3, 4, 4]
    # With room for all partial results there would be more parts than there is room for.
    sizes = (33, 200, 500, 700, 1000, 1500)
    assert [chosen(new, 100000, room=1 << 30) for new in sizes] == [16, 13, 4, 12, 2, 5]
    assert [chosen(new, 100000) for new in sizes] == [16, 3, 1, 1, 1, 1]


@outside
def test_splits_without_room_are_refused() -> None:
    case = make_case([200], [200], heads=2, kv_heads=1, kind="fp16")
    out = quant.allocate(200, 2 * HEAD_DIM, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="no room"):
        paged_prefill.launch(torch.zeros(200, 2 * HEAD_DIM), case.kv, case.block_tables, case.row_ids,
                             case.query_starts, case.context_lens, 0, 1, 200, out, SMALL, 0, WORK, 9)  # fmt: skip


@in_interpreter
def test_quantised_output() -> None:
    case = make_case([70], [6], heads=2, kv_heads=1, kind="fp16")
    expected = reference(case)
    assert relative_error(run(case, SMALL, dtype=torch.float8_e4m3fn), expected) < 0.08


@outside
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize("scale_kind", [0, 1, 2])
def test_tiles_fit_shared_memory(arch: str, scale_kind: int) -> None:
    target = of_arch(arch)
    tiles = paged_prefill.prefill_tiles(target, scale_kind)
    assert (tiles.rows + 2 * tiles.num_stages * tiles.keys) * HEAD_DIM * 2 <= target.shared_bytes
    assert tiles.keys % 64 == 0


@outside
def test_heads_that_do_not_divide_are_refused() -> None:
    case = make_case([3], [3], heads=2, kv_heads=1, kind="fp16")
    case.heads = 1
    out = quant.allocate(3, 3 * HEAD_DIM, torch.bfloat16, "cpu")
    two_heads = type(case.kv)(case.kv.data.expand(-1, -1, 2, -1, -1).contiguous())
    with pytest.raises(ValueError, match="3 heads over 2"):
        paged_prefill.launch(torch.zeros(3, 3 * HEAD_DIM), two_heads, case.block_tables, case.row_ids,
                             case.query_starts, case.context_lens, 0, 1, 3, out, SMALL, 0)  # fmt: skip

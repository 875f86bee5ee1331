"""Attention over paged memory on a GPU against float32: decode, prompts, both in one step, FP8 keys and values.

Memory behind a context, blocks of nobody and table entries behind a row's blocks hold NaN or point nowhere.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from saddle.kernels import paged_decode, paged_prefill, prompt_attention, qk_rope, quant
from saddle.kernels.target import detect
from tests.support.paged_attention import EPS, Case, make_case, reference, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# bf16 queries, keys, weights; FP8 keys and values have three bits of mantissa, which averages out over long contexts
# and not over short ones; e4m3 outputs add their own rounding.
LIMITS = {"bf16": 5e-3, "fp8": 5e-2, "fp8_dynamic": 5e-2}
FP8_OUT = 0.04
KINDS = ["bf16", "fp8", "fp8_dynamic"]
BATCHES = [
    [1], [63], [64], [65], [2048], [2047, 1], [1, 64, 65], [128, 0, 3000, 5, 0, 640, 63],
    [77 * (row % 13) + row for row in range(33)], [2048] * 64, [1 + 13 * row for row in range(128)], [30000],
    [9000, 12, 700],
]  # fmt: skip


def new_out(case: Case, a8: bool) -> quant.Activation:
    out = quant.allocate(case.num_tokens, case.heads * 128, torch.float8_e4m3fn if a8 else torch.bfloat16, "cuda")
    if out.scale is None:
        out.data.fill_(float("nan"))
    else:
        out.data.view(torch.uint8).fill_(0x7F)
        out.scale.fill_(float("nan"))
    return out


def queries(case: Case) -> torch.Tensor:
    q = torch.full((case.num_tokens, case.heads * 128), float("nan"), device="cuda", dtype=torch.bfloat16)
    qk_rope.qk_rope_write(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, case.positions, case.slots,
                          case.kv, q)  # fmt: skip
    return q


def decode(case: Case, work: paged_decode.DecodeWork, fused: bool, a8: bool) -> quant.Activation:
    out, rows = new_out(case, a8), len(case.lens)
    paged_decode.plan_decode(case.context_lens, work, rows)
    common = (case.kv, case.block_tables, case.row_ids, case.context_lens, work, rows, out)
    if fused:
        paged_decode.decode_fused(case.qkv, case.q_norm, case.k_norm, EPS, case.cos, case.sin, *common)
    else:
        paged_decode.decode(queries(case), *common)
    return out


def work_for(case: Case) -> paged_decode.DecodeWork:
    return paged_decode.DecodeWork.allocate(len(case.lens), case.kv_heads, detect(), torch.device("cuda"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lens", BATCHES, ids=lambda lens: f"{len(lens)}x{max(lens)}")
def test_decode(lens: list[int], kind: str) -> None:
    for fused, a8, heads, kv_heads in ((True, True, 48, 8), (False, False, 48, 8), (True, False, 12, 2)):
        case = make_case(lens, kind=kind, heads=heads, kv_heads=kv_heads, device="cuda", seed=len(lens))
        expected = reference(case)
        work = work_for(case)
        out = decode(case, work, fused, a8)
        real = torch.tensor([length > 0 for length in lens], device="cuda")
        found = quant.dequantise(out)
        assert relative_error(found[real], expected[real]) < LIMITS[kind] + (FP8_OUT if a8 else 0)
        assert bool(found[~real].isnan().all()), "a row that only pads was written"
        assert not work.counters.any()
        again = decode(case, work, fused, a8)
        assert torch.equal(out.data.view(torch.uint8), again.data.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lens", "new"), [
    ([1], [1]), ([21], [21]), ([22, 64], [22, 43]), ([2048], [2048]), ([5000], [33]), ([300, 128, 1000], [2, 128, 999]),
    ([8192], [8192]), ([40000], [500]), ([64] * 40, [64, 1, 2, 63] * 10),
], ids=str)  # fmt: skip
def test_prefill(lens: list[int], new: list[int], kind: str) -> None:
    target = detect()
    for a8, heads, kv_heads in ((True, 48, 8), (False, 12, 2)):
        case = make_case(lens, new, kind=kind, heads=heads, kv_heads=kv_heads, device="cuda", seed=len(lens))
        expected = reference(case)
        q = queries(case)
        outs = [new_out(case, a8) for _ in range(2)]
        for out in outs:
            paged_prefill.prefill(q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens,
                                  0, len(lens), case.num_tokens, out, target)  # fmt: skip
        found = quant.dequantise(outs[0])
        assert relative_error(found, expected) < LIMITS[kind] + (FP8_OUT if a8 else 0)
        assert torch.equal(outs[0].data.view(torch.uint8), outs[1].data.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lens", "new"), [([30000], [200]), ([9000, 64, 2000], [1, 64, 333])], ids=str)
def test_split_prefill(lens: list[int], new: list[int], kind: str) -> None:
    target = detect()
    work = paged_prefill.PrefillWork.allocate(target, torch.device("cuda"))
    for a8, splits in ((True, None), (False, 3), (False, 2)):
        case = make_case(lens, new, kind=kind, device="cuda", seed=len(lens))
        expected = reference(case)
        q = queries(case)
        common = (q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens, 0, len(lens),
                  case.num_tokens)  # fmt: skip
        outs = [new_out(case, a8) for _ in range(2)]
        for out in outs:
            for scratch in (work.partial, work.stats):
                scratch.fill_(float("nan"))
            if splits is None:
                paged_prefill.prefill(*common, out, target, 0, work, max(lens))
            else:
                tiles = paged_prefill.prefill_tiles(target, case.kv.scale_kind)
                paged_prefill.launch(*common, out, tiles, 0, work, splits)
        assert bool(work.stats[:4].isfinite().any()), "nothing was split"
        assert relative_error(quant.dequantise(outs[0]), expected) < LIMITS[kind] + (FP8_OUT if a8 else 0)
        assert torch.equal(outs[0].data.view(torch.uint8), outs[1].data.view(torch.uint8))


WGMMA_KINDS = ["bf16", "fp8"]
PROMPTS = [
    ([1], [1]), ([21], [21]), ([22, 64], [22, 43]), ([127], [127]), ([128], [128]), ([129], [129]), ([2048], [2048]),
    ([5000], [33]), ([300, 128, 1000], [2, 128, 999]), ([8192], [8192]), ([40000], [500]),
    ([64] * 40, [64, 1, 2, 63] * 10), ([3 * row + 1 for row in range(100)], [row + 1 for row in range(100)]),
]  # fmt: skip


def wgmma_for(case: Case) -> prompt_attention.PromptAttention:
    target = detect()
    if target.capability != 90:
        pytest.skip(f"NOT TESTED: the wgmma kernel is for sm_90, this is {target.arch}")
    return prompt_attention.PromptAttention(case.kv, case.heads, target)


@pytest.mark.parametrize("kind", WGMMA_KINDS)
@pytest.mark.parametrize(("lens", "new"), PROMPTS, ids=lambda lens: f"{len(lens)}x{max(lens)}")
def test_wgmma_prefill(lens: list[int], new: list[int], kind: str) -> None:
    for a8, heads, kv_heads in ((True, 48, 8), (False, 12, 2), (False, 16, 2), (True, 3, 3)):
        case = make_case(lens, new, kind=kind, heads=heads, kv_heads=kv_heads, device="cuda", seed=len(lens))
        expected = reference(case)
        q, kernel = queries(case), wgmma_for(case)
        outs = [new_out(case, a8) for _ in range(2)]
        for out in outs:
            paged_prefill.prefill(q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens,
                                  0, len(lens), case.num_tokens, out, detect(), wgmma=kernel)  # fmt: skip
        assert relative_error(quant.dequantise(outs[0]), expected) < LIMITS[kind] + (FP8_OUT if a8 else 0)
        assert torch.equal(outs[0].data.view(torch.uint8), outs[1].data.view(torch.uint8))


@pytest.mark.parametrize("kind", WGMMA_KINDS)
@pytest.mark.parametrize(("lens", "new"), [
    ([129], [129]), ([2048], [2048]), ([300, 128, 1000], [2, 128, 999]),
], ids=str)  # fmt: skip
def test_wgmma_factors(lens: list[int], new: list[int], kind: str) -> None:
    """Queries of any size in wider rows, and what their scores are multiplied by: powers of two change no bit."""
    for a8, splits in ((True, 1), (False, 1), (False, 2 if max(lens) < 200 else 1)):
        case = make_case(lens, new, kind=kind, device="cuda", seed=len(lens))
        q, kernel = queries(case), wgmma_for(case)
        work = paged_prefill.PrefillWork.allocate(detect(), torch.device("cuda"))
        factors = 2.0 ** torch.randint(-6, 7, (len(q),), device="cuda")
        wide = torch.full((len(q), q.shape[1] + 2048), float("nan"), device="cuda", dtype=torch.bfloat16)
        wide[:, : q.shape[1]] = q / factors[:, None]
        outs = [new_out(case, a8) for _ in range(3)]
        for out, own, by in zip(outs, (q, wide[:, : q.shape[1]], q), (None, factors, factors), strict=True):
            paged_prefill.launch_wgmma(kernel, own, case.kv, case.block_tables, case.row_ids, case.query_starts,
                                       case.context_lens, 0, len(lens), case.num_tokens, out, 0, work, splits,
                                       by)  # fmt: skip
        plain, scaled, wrong = (out.data.view(torch.uint8) for out in outs)
        assert torch.equal(plain, scaled) and not torch.equal(plain, wrong)


@pytest.mark.parametrize("kind", WGMMA_KINDS)
@pytest.mark.parametrize("splits", [None, 2, 3, 7])
@pytest.mark.parametrize(("lens", "new"), [([30000], [60]), ([9000, 64, 2000], [1, 64, 33])], ids=str)
def test_wgmma_splits(lens: list[int], new: list[int], splits: int | None, kind: str) -> None:
    """Split keys, also parts without any key."""
    work = paged_prefill.PrefillWork.allocate(detect(), torch.device("cuda"))
    case = make_case(lens, new, kind=kind, device="cuda", seed=len(lens))
    expected = reference(case)
    q, out, kernel = queries(case), new_out(case, False), wgmma_for(case)
    for scratch in (work.partial, work.stats):
        scratch.fill_(float("nan"))
    common = (q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens, 0, len(lens),
              case.num_tokens, out)  # fmt: skip
    if splits is None:
        paged_prefill.prefill(*common, detect(), 0, work, max(lens), kernel)
    else:
        paged_prefill.launch_wgmma(kernel, *common, 0, work, splits)
    assert bool(work.stats[:4].isfinite().any()), "nothing was split"
    assert relative_error(out.data, expected) < LIMITS[kind]


def test_wgmma_beside_decoding_rows_in_a_graph() -> None:
    """The rows behind those that decode, replayed; what is not theirs stays unwritten."""
    case = make_case([700, 1, 0, 65, 900, 40], [1, 1, 0, 1, 300, 40], device="cuda")
    expected = reference(case)
    q, out, kernel = queries(case), new_out(case, False), wgmma_for(case)

    def attend() -> None:
        paged_prefill.prefill(q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens, 4, 2,
                              case.num_tokens - 4, out, detect(), wgmma=kernel)  # fmt: skip

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for _ in range(3):
        out.data.fill_(float("nan"))
        graph.replay()
        assert bool(out.data[:4].isnan().all())
        assert relative_error(out.data[4:], expected[4:]) < LIMITS["bf16"]


def test_mixed_step() -> None:
    """Decoding rows first, prompts behind them, both kernels into one output."""
    case = make_case([700, 1, 0, 65, 900, 40], [1, 1, 0, 1, 300, 40], device="cuda")
    expected = reference(case)
    q, out, work = queries(case), new_out(case, False), work_for(case)
    paged_decode.plan_decode(case.context_lens, work, 4)
    paged_decode.decode(q, case.kv, case.block_tables, case.row_ids, case.context_lens, work, 4, out)
    assert bool(out.data[4:].isnan().all())
    paged_prefill.prefill(q, case.kv, case.block_tables, case.row_ids, case.query_starts, case.context_lens, 4, 2,
                          case.num_tokens - 4, out, detect())  # fmt: skip
    real = case.positions >= 0
    assert relative_error(out.data[real], expected[real]) < LIMITS["bf16"]


@pytest.mark.parametrize("magnitude", [2000.0, 1e-3])
def test_planted_values(magnitude: float) -> None:
    """Values above e4m3's 448, and rows near its smallest numbers: a static scale of 1 loses them, dynamic ones not."""
    lens = [300, 65]
    expected = reference(make_case(lens, kind="bf16", device="cuda", spread=magnitude))
    errors = {}
    for kind in ("fp8", "fp8_dynamic"):
        case = make_case(lens, kind=kind, device="cuda", spread=magnitude, static=(1.0, 1.0))
        errors[kind] = relative_error(quant.dequantise(decode(case, work_for(case), True, False)), expected)
    assert errors["fp8_dynamic"] < 0.08
    assert errors["fp8"] > 0.2

"""Routing chooses, weighs, lists and quantises as the plain torch path does, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

from saddle.kernels import moe, quant, router, target
from saddle.kernels.norm_rope import rms_norm
from saddle.runner.random import MASK, mix
from tests.support import exact_interpreter
from tests.support.interpreted import IS_INTERPRETED, in_interpreter, outside, run_file

if IS_INTERPRETED:
    exact_interpreter.repair()
CHIP = target.of_arch("sm_90")
WIDTH, EXPERTS, TOP_K = 256, 12, 3  # neither a power of two


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize("size", [1, 5, 40, 65])
def test_route(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(size)
    monkeypatch.setattr(router, "most_few_tokens", lambda num_experts, top_k: 40)
    monkeypatch.setattr(router, "MAX_FUSED_TOKENS", 30)
    x, parts = torch.randn(size, WIDTH), torch.randn(2, size, WIDTH)
    weight, gate, bias = torch.rand(WIDTH) + 0.5, torch.randn(WIDTH, EXPERTS) * 0.1, torch.randn(EXPERTS) * 0.1
    positions = torch.arange(size, dtype=torch.int32)
    num_pads = 2 if size > 2 else 0
    positions[size - num_pads :] = -1
    work = router.RouterWork.allocate(300, WIDTH, EXPERTS, TOP_K, "cpu")
    work.lists.fill_(-7)
    wanted_x = x + parts.sum(0)
    h = quant.allocate(size, WIDTH, torch.float8_e4m3fn, "cpu")
    router.route(x, parts, weight, 1e-6, gate, bias, positions, positions, 0, False, work, h, CHIP)
    assert error(x, wanted_x) < 1e-6
    normed = rms_norm(wanted_x, weight, 1e-6)
    assert error(quant.dequantise(h), quant.dequantise(quant.quantise(normed))) < 3e-3  # few fall the other way
    wanted_ids, wanted_weights = moe.route(normed, gate, bias, TOP_K)
    ids, weights = (t[: size * TOP_K].view(size, TOP_K) for t in (work.ids, work.weights))
    real = size - num_pads
    assert (ids[real:] == -1).all()
    order, wanted_order = ids[:real].argsort(-1), wanted_ids[:real].argsort(-1)
    assert torch.equal(ids[:real].gather(1, order).long(), wanted_ids[:real].gather(1, wanted_order))
    assert error(weights[:real].gather(1, order), wanted_weights[:real].gather(1, wanted_order)) < 1e-5
    if size > 1:
        check_lists(work, ids, size)


def check_lists(work: router.RouterWork, ids: torch.Tensor, size: int) -> None:
    flat, units = ids.flatten().tolist(), []
    unit = router.unit_tokens(size, EXPERTS, TOP_K)
    for expert in range(EXPERTS):
        mine = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        assert work.counts[expert] == len(mine)
        assert sorted(work.lists[expert, : len(mine)].tolist()) == mine
        units += [expert | tile << 16 for tile in range(-(-len(mine) // unit))]
    found = work.units[: int(work.counts[EXPERTS])].tolist()
    assert (sorted(found) if work.takes_few(size) else found) == (sorted(units) if work.takes_few(size) else units)


@in_interpreter
@pytest.mark.parametrize("kind", ["usual", "massive", "wide", "tiny"])
def test_logits_of_few_tokens_are_float32(kind: str) -> None:
    """Products of float16 parts: no term's first 22 bits are lost, whatever stands beside it."""
    torch.manual_seed(8)
    x, gate, weight = torch.randn(5, WIDTH), torch.randn(WIDTH, EXPERTS) * 0.1, torch.rand(WIDTH) + 0.5
    if kind == "massive":
        x[:, 7] = 1e4
    elif kind == "wide":
        x *= torch.exp(4 * torch.randn_like(x))
    elif kind == "tiny":
        x *= 1e-12
    x[1] = 0
    work = router.RouterWork.allocate(5, WIDTH, EXPERTS, TOP_K, "cpu")
    tokens, h = torch.arange(5, dtype=torch.int32), quant.allocate(5, WIDTH, torch.float8_e4m3fn, "cpu")
    router.route(x.clone(), None, weight, 1e-6, gate, torch.zeros(EXPERTS), tokens, tokens, 0, False, work, h, CHIP)
    slices = router.slicing(5, WIDTH, EXPERTS).num
    found = work.logits[: slices * 5 * EXPERTS].view(slices, 5, EXPERTS).double().sum(0)
    gained = gate.double() * weight.double()[:, None]
    wanted, terms = x.double() @ gained, x.double().abs() @ gained.abs()
    assert not found[1].any()
    assert ((found - wanted).abs() <= 1e-6 * terms).all()  # with tf32 alone 2e-5 to 4e-4


@in_interpreter
def test_ties_go_to_the_lower_id_and_padded_experts_are_never_chosen() -> None:
    work = router.RouterWork.allocate(2, WIDTH, EXPERTS, TOP_K, "cpu")
    bias = torch.full((EXPERTS,), -3.0)
    bias[[5, 9]] = -2.5
    tokens = torch.arange(2, dtype=torch.int32)
    h = quant.allocate(2, WIDTH, torch.float8_e4m3fn, "cpu")
    router.route(torch.randn(2, WIDTH), None, torch.ones(WIDTH), 1e-6, torch.zeros(WIDTH, EXPERTS), bias, tokens,
                 tokens, 0, False, work, h, CHIP)  # fmt: skip
    assert work.ids[: 2 * TOP_K].tolist() == [5, 9, 0] * 2


@in_interpreter
def test_uniform_ids_are_the_hash() -> None:
    size, experts = 5, 16
    work = router.RouterWork.allocate(size, WIDTH, experts, TOP_K, "cpu")
    positions = torch.tensor([0, 1, 77, 4095, 200_000], dtype=torch.int32)
    token_ids = torch.tensor([3, 200_063, 0, 9, 1], dtype=torch.int32)
    h = quant.allocate(size, WIDTH, torch.float8_e4m3fn, "cpu")
    router.route(torch.randn(size, WIDTH), None, torch.ones(WIDTH), 1e-6, torch.randn(WIDTH, experts),
                 torch.zeros(experts), positions, token_ids, 61, True, work, h, CHIP)  # fmt: skip
    seed = torch.tensor(61 * 0x9E3779B1 & MASK)
    start = mix(seed ^ (positions.long() * 0x85EBCA6B & MASK) ^ (token_ids.long() * 0xC2B2AE35 & MASK))
    step = 2 * (mix(start.clone()) >> 1 & 127) + 1
    wanted = (start[:, None] + torch.arange(TOP_K) * step[:, None]) % experts
    assert torch.equal(work.ids[: size * TOP_K].view(size, TOP_K).long(), wanted)


@outside
def test_bytes_are_predicted() -> None:
    for size in (1, 7, 64, 300, 1024):
        work = router.RouterWork.allocate(size, WIDTH, EXPERTS, TOP_K, "cpu")
        assert work.num_bytes == router.RouterWork.bytes_for(size, WIDTH, EXPERTS, TOP_K)


@outside
def test_memory_holds_every_smaller_step() -> None:
    for size in (1, 63, 64, 100, 128, 500, 1024, 1500, 8192):
        work = router.RouterWork.shapes(size, 3072, 256, 8)
        for used in range(1, size + 1, 7):
            num = router.slicing(used, 3072, 256).num
            assert used * num * 256 <= work["logits"][0][0] and used * num <= work["squares"][0][0]
            assert router.max_units(used, 256, 8, router.unit_tokens(used, 256, 8)) <= work["units"][0][0]


@outside
def test_refuses_what_does_not_fit() -> None:
    work = router.RouterWork.allocate(2, WIDTH, EXPERTS, TOP_K, "cpu")
    x, tokens = torch.randn(3, WIDTH), torch.arange(3, dtype=torch.int32)
    h = quant.allocate(3, WIDTH, torch.float8_e4m3fn, "cpu")
    arguments = (torch.ones(WIDTH), 1e-6, torch.randn(WIDTH, EXPERTS), torch.zeros(EXPERTS))
    with pytest.raises(ValueError, match="for 2 tokens, got 3"):
        router.route(x, None, *arguments, tokens, tokens, 0, False, work, h, CHIP)
    with pytest.raises(ValueError, match="power of two of experts, got 12"):
        router.route(x[:2], None, *arguments, tokens[:2], tokens[:2], 0, True, work, h[:2], CHIP)

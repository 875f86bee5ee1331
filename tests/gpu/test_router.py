"""Routing on the GPU: residual, choice, weights, lists and quantised input against float64."""

from __future__ import annotations

import packed_support as support
import pytest
import torch

from saddle.kernels import quant, router

pytestmark = support.needs_gpu
EPS = 1e-6


class Case:
    """Random inputs of a step at M2's or the demo's width."""

    def __init__(self, size: int, width: int = 3072, num_experts: int = 256, top_k: int = 8, parts: int = 4) -> None:
        self.top_k, self.num_experts = top_k, num_experts
        self.x = torch.randn(size, width, device="cuda")
        self.parts = torch.randn(parts, size, width, device="cuda") if parts else None
        self.weight = torch.rand(width, device="cuda") + 0.5
        self.gate = torch.randn(width, num_experts, device="cuda") * width**-0.5
        self.bias = torch.randn(num_experts, device="cuda") * 0.05
        self.positions = torch.randint(0, 200_000, (size,), device="cuda", dtype=torch.int32)
        self.token_ids = torch.randint(0, 200_064, (size,), device="cuda", dtype=torch.int32)
        self.work = router.RouterWork.allocate(size, width, num_experts, top_k, "cuda")
        self.wanted_x = self.x.double() + (0 if self.parts is None else self.parts.double().sum(0))
        inverse = (self.wanted_x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        self.wanted_h = self.wanted_x * inverse * self.weight.double()
        self.scores = (self.wanted_h @ self.gate.double()).sigmoid()

    def run(self, chip: support.Target, uniform: bool = False, layer: int = 5) -> quant.Activation:
        h = quant.allocate(*self.x.shape, chip.fp8_dtype if chip.has_fp8_dot else torch.bfloat16, "cuda")
        for tensor in (self.work.ids, self.work.weights, self.work.lists, self.work.units):
            tensor.fill_(-(1 << 20))
        self.work.logits.fill_(float("nan"))
        router.route(self.x, self.parts, self.weight, EPS, self.gate, self.bias, self.positions, self.token_ids, layer,
                     uniform, self.work, h, chip)  # fmt: skip
        return h

    def chosen(self) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = len(self.x) * self.top_k
        return self.work.ids[:pairs].view(-1, self.top_k).long(), self.work.weights[:pairs].view(-1, self.top_k)


def check_lists(case: Case, ids: torch.Tensor) -> None:
    """Every pair of a real token is in its expert's list once, and the units cover the lists."""
    size = len(case.x)
    if size == 1:
        return
    unit = router.unit_tokens(size, case.num_experts, case.top_k)
    counts = case.work.counts[: case.num_experts].tolist()
    flat = ids.flatten().tolist()
    wanted = {expert: sorted(pair for pair, e in enumerate(flat) if e == expert) for expert in range(case.num_experts)}
    assert counts == [len(wanted[expert]) for expert in range(case.num_experts)]
    for expert, count in enumerate(counts):
        assert sorted(case.work.lists[expert, :count].tolist()) == wanted[expert]
    num_units = int(case.work.counts[case.num_experts])
    units = case.work.units[:num_units].tolist()
    assert sorted((code & 0xFFFF, code >> 16) for code in units) == [
        (expert, tile) for expert, count in enumerate(counts) for tile in range(-(-count // unit))
    ]
    assert num_units <= router.max_units(size, case.num_experts, case.top_k, unit)


@pytest.mark.parametrize("chip", support.targets(), ids=lambda chip: chip.arch)
@pytest.mark.parametrize("size", support.SIZES)
def test_route(size: int, chip: support.Target) -> None:
    torch.manual_seed(size)
    case = Case(size, parts=4 if size <= 128 else 1)
    if size > 2:
        case.positions[-2:] = -1
    h = case.run(chip)
    assert support.error(case.x, case.wanted_x) < 1e-6
    ids, weights = case.chosen()
    real = case.positions >= 0
    assert (ids[~real] == -1).all()
    keys = case.scores + case.bias.double()
    got = keys.gather(1, ids.clamp(min=0)).sort(-1, descending=True).values
    best = keys.topk(case.top_k).values
    # Where two experts' keys agree to float32 either is right: compare the keys, not the ids.
    assert (got - best)[real].abs().max() < 2e-6
    assert (ids[real].sort(-1).values.diff(dim=-1) > 0).all()
    shares = case.scores.gather(1, ids.clamp(min=0))
    assert support.error(weights[real], (shares / shares.sum(-1, keepdim=True))[real]) < 1e-5
    check_lists(case, ids)
    if chip.has_fp8_dot:
        wanted = quant.quantise(case.wanted_h.float())
        assert support.error(h.scale, wanted.scale) < 1e-5
        differ = (h.data.float() != wanted.data.float()).float().mean()
        assert differ < 1e-3  # a rounding of float32 may fall on the other side
    else:
        assert support.error(h.data, case.wanted_h) < 3e-3
    first = [tensor.clone() for tensor in (case.work.ids, case.work.weights)]
    case.x.copy_(case.wanted_x)
    case.parts = None
    case.run(chip)
    assert support.error(case.x, case.wanted_x) < 1e-6
    assert (case.work.ids == first[0]).float().mean() > 0.99


def test_ties_go_to_the_lower_id() -> None:
    case = Case(4, 256, 16, 4, 0)
    case.gate.zero_()
    case.bias.zero_()
    case.bias[[3, 7]] = 0.25
    case.run(support.targets()[0])
    assert case.chosen()[0].tolist() == [[3, 7, 0, 1]] * 4
    assert torch.equal(case.chosen()[1], torch.full((4, 4), 0.25, device="cuda"))


def test_bias_only_selects() -> None:
    case = Case(32)
    case.bias.mul_(20)
    case.run(support.targets()[0])
    ids, weights = case.chosen()
    shares = case.scores.gather(1, ids)
    assert support.error(weights, shares / shares.sum(-1, keepdim=True)) < 1e-5
    biased = shares + case.bias.double()[ids]
    assert support.error(weights, biased / biased.sum(-1, keepdim=True)) > 1e-2


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_uniform_routing(size: int) -> None:
    case = Case(size)
    case.run(support.targets()[0], uniform=True)
    ids = case.chosen()[0]
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    if size == 1000:
        counts = ids.flatten().bincount(minlength=256).double()
        assert (counts.mean() - counts).pow(2).sum() / counts.mean() < 350  # chi-square of 255 degrees, p < 1e-4
    check_lists(case, ids)
    first = ids.clone()
    case.run(support.targets()[0], uniform=True, layer=6)
    assert (case.chosen()[0] != first).any()
    case.run(support.targets()[0], uniform=True)
    assert torch.equal(case.chosen()[0], first)

"""Routing on the GPU: residual, choice, weights, lists and quantised input against float64."""

from __future__ import annotations

import packed_support as support
import pytest
import torch

from saddle.kernels import gate, quant, router
from saddle.kernels.target import Target

pytestmark = support.needs_gpu
EPS = 1e-6
PRODUCTS: dict[tuple[int, int, int], gate.GateProduct] = {}


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
        self.look()

    def look(self) -> None:
        """What is wanted of these inputs."""
        self.wanted_x = self.x.double() + (0 if self.parts is None else self.parts.double().sum(0))
        inverse = (self.wanted_x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        self.wanted_h = self.wanted_x * inverse * self.weight.double()
        self.scores = (self.wanted_h @ self.gate.double()).sigmoid()

    def run(
        self, chip: Target, uniform: bool = False, layer: int = 5, layer_gate: gate.LayerGate | None = None
    ) -> quant.Activation:
        h = quant.allocate(len(self.x), self.x.shape[1], chip.fp8_dtype if chip.has_fp8_dot else torch.bfloat16, "cuda")
        for tensor in (self.work.ids, self.work.weights, self.work.lists, self.work.units, self.work.counts):
            tensor.fill_(-(1 << 20))
        for tensor in (self.work.logits, self.work.squares):
            tensor.fill_(float("nan"))
        if h.scale is not None:
            h.scale.fill_(float("nan"))
        router.route(self.x, self.parts, self.weight, EPS, self.gate, self.bias, self.positions, self.token_ids, layer,
                     uniform, self.work, h, chip, layer_gate=layer_gate)  # fmt: skip
        return h

    def layer_gate(self) -> gate.LayerGate:
        """For the wgmma kernel."""
        width, num_experts = self.gate.shape
        key = width, num_experts, self.top_k
        if key not in PRODUCTS:
            PRODUCTS[key] = gate.GateProduct(*key, support.targets()[0], self.x.device)
        return gate.LayerGate(gate.image(self.gate, self.weight), PRODUCTS[key])

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
    flat = ids.flatten()
    for expert, count in enumerate(counts):
        wanted = (flat == expert).nonzero().flatten()
        assert count == len(wanted) and torch.equal(case.work.lists[expert, :count].long().sort().values, wanted)
    num_units = int(case.work.counts[case.num_experts])
    units = case.work.units[:num_units].tolist()
    assert sorted((code & 0xFFFF, code >> 16) for code in units) == [
        (expert, tile) for expert, count in enumerate(counts) for tile in range(-(-count // unit))
    ]
    assert num_units <= router.max_units(size, case.num_experts, case.top_k, unit)


def check_choice(case: Case, h: quant.Activation, bound: float = 2e-6) -> None:
    """Experts, weights, lists and the experts' input of a step; bound: of the keys of experts that are chosen."""
    ids, weights = case.chosen()
    real = case.positions >= 0
    assert (ids[~real] == -1).all()
    keys = case.scores + case.bias.double()
    got = keys.gather(1, ids.clamp(min=0)).sort(-1, descending=True).values
    best = keys.topk(case.top_k).values
    # Where two experts' keys agree to float32 either is right: compare the keys, not the ids.
    assert (got - best)[real].abs().max() < bound
    assert (ids[real].sort(-1).values.diff(dim=-1) > 0).all()
    shares = case.scores.gather(1, ids.clamp(min=0))
    assert support.error(weights[real], (shares / shares.sum(-1, keepdim=True))[real]) < 5 * bound
    check_lists(case, ids)
    if h.scale is not None:
        wanted = quant.quantise(case.wanted_h.float())
        assert wanted.scale is not None
        used = wanted.scale > 1e-12  # that of a group of zeros is tiny, and no matter
        assert support.error(h.scale * used, wanted.scale * used) < 1e-5 and h.scale.isfinite().all()
        differ = (h.data.float() != wanted.data.float()).float().mean()
        assert differ < 1e-3  # a rounding of float32 may fall on the other side
    else:
        assert support.error(h.data, case.wanted_h) < 3e-3


@pytest.mark.parametrize("chip", support.targets(), ids=lambda chip: chip.arch)
@pytest.mark.parametrize("size", support.SIZES)
def test_route(size: int, chip: Target) -> None:
    torch.manual_seed(size)
    case = Case(size, parts=4 if size <= 128 else 1)
    if size > 2:
        case.positions[-2:] = -1
    h = case.run(chip)
    assert support.error(case.x, case.wanted_x) < 1e-6
    check_choice(case, h)
    first = [tensor.clone() for tensor in (case.work.ids, case.work.weights)]
    case.x.copy_(case.wanted_x)
    case.parts = None
    case.run(chip)
    assert support.error(case.x, case.wanted_x) < 1e-6
    assert (case.work.ids == first[0]).float().mean() > 0.99


def inputs(kind: str, size: int) -> torch.Tensor:
    """Residuals [size, 3072]: as usual, with columns that outweigh all others, of every magnitude, or tiny."""
    x = torch.randn(size, 3072, device="cuda")
    if kind == "massive":
        x[:, 7], x[:, 2000] = 1e4, -8e3
    elif kind == "wide":
        x *= torch.exp(4 * torch.randn_like(x))
    elif kind == "tiny":
        x *= 1e-12
    return x


@pytest.mark.parametrize("size", [1, 16, 32, 64, 128])
def test_few_logits_are_float32(size: int) -> None:
    """Sums of products of float16 parts are as near to the truth as float32 sums are."""
    torch.manual_seed(size)
    for kind in ("usual", "massive", "wide", "tiny"):
        case = Case(size, parts=0)
        case.x.copy_(inputs(kind, size))
        case.x[0, 128:256] = 0
        gained = case.gate * case.weight[:, None]
        wanted = case.x.double() @ gained.double()
        weight = case.x.double().abs() @ gained.double().abs()  # what an error is measured against
        case.run(support.targets()[0])
        slices = router.slicing(size, 3072, 256).num
        found = case.work.logits[: slices * size * 256].view(slices, size, 256).double().sum(0)
        error = ((found - wanted).abs() / weight).max()
        single = (((case.x.cpu() @ gained.cpu()).double().cuda() - wanted).abs() / weight).max()
        print(f"{kind}, {size} tokens: {error:.2e} of the terms' sum, float32 on a CPU {single:.2e}")
        assert error < (3e-7 if kind == "usual" else 2e-6), kind  # tf32 alone: 3e-5, 4e-4


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


def adversarial(case: Case, kind: str) -> None:
    """Columns far larger and smaller than others, tokens of all sizes, experts' gates of all sizes, zeros."""
    if kind == "massive":
        case.x[:, [7, case.x.shape[1] // 2]] *= 1e4
    elif kind == "growing":
        case.x *= torch.linspace(-12, 12, case.x.shape[1], device="cuda").exp2()
    elif kind == "sizes":
        case.x *= 10.0 ** torch.randint(-3, 5, (len(case.x), 1), device="cuda")
        case.gate *= 10.0 ** torch.randint(-9, 1, (1, case.num_experts), device="cuda")
    elif kind == "zeros":
        case.x[:, 128:256] = 0
        case.x[1] = 0
    case.look()


@pytest.mark.skipif(not support.is_hopper(), reason="NO GPU OF sm_90: the wgmma kernel is not tested")
@pytest.mark.parametrize("kind", ["plain", "massive", "growing", "sizes", "zeros"])
@pytest.mark.parametrize(("size", "width", "num_experts", "top_k"), [
    (129, 3072, 256, 8), (200, 3072, 256, 8), (257, 3072, 256, 8), (1000, 3072, 256, 8), (2048, 3072, 256, 8),
    (8192, 3072, 256, 8), (20_000, 3072, 256, 8), (129, 256, 16, 4), (1000, 256, 16, 4), (300, 384, 24, 6),
])  # fmt: skip
def test_wgmma(size: int, width: int, num_experts: int, top_k: int, kind: str) -> None:
    torch.manual_seed(size)
    case = Case(size, width, num_experts, top_k, 0)
    adversarial(case, kind)
    case.positions[-2:] = -1
    chip, before = support.targets()[0], case.x.clone()
    for _ in range(2):  # a launch leaves what the next one needs
        h = case.run(chip, layer_gate=case.layer_gate())
        # The matrix units cut where they add, up to 576 times: an error of 1e-5 in a logit, as the Triton kernel's.
        check_choice(case, h, 1e-5)
        found = case.work.ids.clone(), case.work.weights.clone(), quant.dequantise(h)
    assert torch.equal(case.x, before)
    h = case.run(chip, layer_gate=case.layer_gate())
    again = case.work.ids, case.work.weights, quant.dequantise(h)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), "same bits"


@pytest.mark.skipif(not support.is_hopper(), reason="NO GPU OF sm_90: the wgmma kernel is not tested")
@pytest.mark.parametrize("size", [200, 1000])
def test_wgmma_chooses_as_triton_does(size: int) -> None:
    for uniform in (False, True):
        case = Case(size, parts=0)
        case.run(support.targets()[0], uniform)
        ids, weights = (tensor.clone() for tensor in case.chosen())
        case.run(support.targets()[0], uniform, layer_gate=case.layer_gate())
        assert (case.chosen()[0] == ids).float().mean() > 0.999 and (not uniform or torch.equal(case.chosen()[0], ids))
        assert support.error(case.chosen()[1], weights) < 1e-4
        check_lists(case, ids if uniform else case.chosen()[0])


@pytest.mark.skipif(not support.is_hopper(), reason="NO GPU OF sm_90: the wgmma kernel is not tested")
def test_wgmma_ties_go_to_the_lower_id() -> None:
    case = Case(130, 256, 16, 4, 0)
    case.gate.zero_()
    case.bias.zero_()
    case.bias[[3, 7]] = 0.25
    case.bias[[0, 1, 9]] = -0.1
    case.run(support.targets()[0], layer_gate=case.layer_gate())
    assert case.chosen()[0].tolist() == [[3, 7, 2, 4]] * 130
    assert torch.equal(case.chosen()[1], torch.full((130, 4), 0.25, device="cuda"))

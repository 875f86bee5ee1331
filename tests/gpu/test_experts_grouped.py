"""The wgmma kernels of the experts on a GPU of sm_90, against float32 products of the dequantised values."""

from __future__ import annotations

from dataclasses import dataclass

import packed_support as support
import pytest
import torch
from expert_support import ERROR, SHAPES, routed, wanted_rows

from saddle.kernels import experts, quant, router, tiles
from saddle.kernels.grouped import GroupedExperts
from saddle.kernels.quant import Activation
from saddle.kernels.tiles import PackedMatrix

pytestmark = pytest.mark.skipif(not support.is_hopper(), reason="NO GPU OF sm_90: the wgmma kernels are not tested")
SIZES = (257, 300, 511, 1000, 2048, 8192)


@dataclass(frozen=True)
class Model:
    """Weights of one shape, packed and as values, and its kernels."""

    shape: str
    top_k: int
    w13: PackedMatrix
    w2: PackedMatrix
    values: tuple[torch.Tensor, torch.Tensor]
    kernels: GroupedExperts

    def run(self, h: Activation, work: router.RouterWork) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of all pairs (NaN where none is written), wanted and found."""
        chip, pairs = support.targets()[0], len(h.data) * self.top_k
        act = quant.allocate(pairs, self.w2.num_cols, h.data.dtype, "cuda")
        act.data.view(torch.uint8).fill_(0x7F)
        assert act.scale is not None
        act.scale.fill_(float("nan"))
        out = support.poisoned(pairs, self.w2.num_rows, dtype=torch.bfloat16)
        experts.experts(h, self.w13, self.w2, work, act, out, chip, 0, self.kernels)
        return wanted_rows(quant.dequantise(h), work, *self.values, chip), out


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(5)
    num_experts, top_k, width, inner = SHAPES[request.param]
    w13 = support.fp8_weight(num_experts, 2 * inner, width, interleaved=True)
    w2 = support.fp8_weight(num_experts, width, inner)
    kernels = GroupedExperts(w13, w2, top_k, support.targets()[0])
    return Model(request.param, top_k, w13, w2, (tiles.dequantise(w13), tiles.dequantise(w2)), kernels)


def input_of(model: Model, size: int) -> Activation:
    return support.activation(torch.randn(size, model.w13.num_cols, device="cuda") * 2, support.targets()[0])


@pytest.mark.parametrize("size", SIZES)
def test_grouped(model: Model, size: int) -> None:
    torch.manual_seed(size)
    num_pads = size % 7
    work = routed(size, model.w13.data.shape[0], model.top_k, model.w13.num_cols, num_pads)
    h = input_of(model, size)
    wanted, out = model.run(h, work)
    used = (size - num_pads) * model.top_k
    assert support.error(out[:used], wanted[:used]) < ERROR[model.shape]
    assert out[used:].isnan().all(), "rows that pad are not written"
    _, again = model.run(h, work)
    assert torch.equal(out[:used], again[:used]), "same bits"


COUNTS = [
    (0,), (1,), (63, 64, 65), (127, 128, 129), (191, 192, 193, 255, 256, 257), (319, 320, 385), (900, 2),
    (129, 136, 137, 144, 145), (258, 262, 272, 273, 288, 289), (385, 399, 432, 433), (15, 16, 17, 31, 32, 33),
]  # fmt: skip


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_uneven_lists(model: Model, counts: tuple[int, ...]) -> None:
    """Every number of pairs that an expert may have: experts take the counts in turn, starting with the last one."""
    torch.manual_seed(6)
    num_experts, top_k = model.w13.data.shape[0], model.top_k
    chosen = [expert for place, count in enumerate(counts) for expert in [num_experts - 1 - place] * count]
    size = max(257, len(chosen))
    work = router.RouterWork.allocate(size, model.w13.num_cols, num_experts, top_k, "cuda")
    work.ids.fill_(-1)
    work.weights.copy_(torch.rand(len(work.weights), device="cuda"))
    for place, count in enumerate(counts):
        first = sum(counts[:place])
        pairs = torch.arange(first, first + count, device="cuda", dtype=torch.int32) * top_k + place % top_k
        work.ids[pairs.long()] = num_experts - 1 - place
        work.counts[num_experts - 1 - place] = count
        work.lists[num_experts - 1 - place, :count] = pairs
    wanted, out = model.run(input_of(model, size), work)
    used = work.ids[: size * top_k] >= 0
    assert int(used.sum()) == sum(counts)
    assert out[~used].isnan().all(), "rows of no expert are not written"
    if len(chosen):
        assert support.error(out[used], wanted[used]) < 2 * ERROR[model.shape]


def test_graphs(model: Model) -> None:
    """A captured launch follows the lists that lie on the device when it is replayed."""
    torch.manual_seed(7)
    size, chip = 600, support.targets()[0]
    work = routed(size, model.w13.data.shape[0], model.top_k, model.w13.num_cols)
    other = routed(size, model.w13.data.shape[0], model.top_k, model.w13.num_cols, 100)
    h = input_of(model, size)
    act = quant.allocate(size * model.top_k, model.w2.num_cols, h.data.dtype, "cuda")
    out = support.poisoned(size * model.top_k, model.w2.num_rows, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts.experts(h, model.w13, model.w2, work, act, out, chip, 0, model.kernels)
    for name in ("ids", "weights", "counts", "lists"):
        getattr(work, name).copy_(getattr(other, name))
    graph.replay()
    wanted, eager = model.run(h, other)
    used = (size - 100) * model.top_k
    assert support.error(out[:used], wanted[:used]) < ERROR[model.shape]
    assert torch.equal(out[:used], eager[:used])


def test_what_is_wrong_is_seen(model: Model) -> None:
    """The bars above catch tokens' rows exchanged, and scales of the next block."""
    torch.manual_seed(8)
    work = routed(600, model.w13.data.shape[0], model.top_k, model.w13.num_cols)
    h = input_of(model, 600)
    wanted, out = model.run(h, work)
    assert support.error(out.roll(model.top_k, 0), wanted) > 20 * ERROR[model.shape]
    assert h.scale is not None
    _, shifted = model.run(Activation(h.data, h.scale.roll(1, -1).contiguous()), work)
    assert support.error(shifted, wanted) > 3 * ERROR[model.shape]

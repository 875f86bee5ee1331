"""Parallel layouts of M2's shape: every part is held, by as many ranks as it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from saddle.errors import StartupError
from saddle.parallel.layout import ParallelLayout, Slice, scale_granularity

HEADS, KV_HEADS, WIDTH, VOCAB, EXPERTS = 48, 8, 1536, 200064, 256
SIZES = [1, 2, 4, 8, 16]


def holders(total: int, ranks: int, part: Callable[[int], Slice]) -> list[int]:
    """How many ranks hold each index; every rank's slice is in range."""
    found = [0] * total
    for rank in range(ranks):
        mine = part(rank)
        assert 0 <= mine.start <= mine.stop <= total
        for index in range(mine.start, mine.stop):
            found[index] += 1
    return found


@pytest.mark.parametrize("tp", SIZES)
def test_tensor_parallel(tp: int) -> None:
    ranks = [ParallelLayout(tp=tp, rank=rank) for rank in range(tp)]
    assert set(holders(HEADS, tp, lambda r: ranks[r].query_heads(HEADS))) == {1}
    assert set(holders(KV_HEADS, tp, lambda r: ranks[r].kv_heads(KV_HEADS))) == {max(1, tp // KV_HEADS)}
    assert set(holders(WIDTH, tp, lambda r: ranks[r].expert_width(WIDTH))) == {1}
    assert set(holders(VOCAB, tp, lambda r: ranks[r].vocabulary(VOCAB))) == {1}
    assert {layout.experts(EXPERTS) for layout in ranks} == {Slice(0, EXPERTS)}
    for layout in ranks:
        queries, kv = layout.query_heads(HEADS), layout.kv_heads(KV_HEADS)
        # The KV head of each query head is on the same rank, and they line up.
        per_kv = queries.size // kv.size
        assert [kv.start + i // per_kv for i in range(queries.size)] == [
            head // (HEADS // KV_HEADS) for head in range(queries.start, queries.stop)]  # fmt: skip
        assert layout.vocabulary(VOCAB).start % 64 == 0


@pytest.mark.parametrize(("tp", "granularity"), [(1, 128), (2, 128), (4, 128), (8, 64), (16, 32)])
def test_scale_granularity_of_expert_widths(tp: int, granularity: int) -> None:
    parts = [ParallelLayout(tp=tp, rank=rank).expert_width(WIDTH) for rank in range(tp)]
    assert {scale_granularity(part, 128) for part in parts} == {granularity}


def test_granularity_below_16_is_refused() -> None:
    assert scale_granularity(Slice(16, 48), 128) == 16
    with pytest.raises(StartupError, match="pieces of 8"):
        scale_granularity(Slice(8, 48), 128)


@pytest.mark.parametrize(("tp", "dp"), [(1, 8), (8, 1), (2, 4)])
@pytest.mark.parametrize("experts", [EXPERTS, 154])
def test_expert_parallel(tp: int, dp: int, experts: int) -> None:
    world = tp * dp
    ranks = [ParallelLayout(tp=tp, dp=dp, ep=world, rank=rank) for rank in range(world)]
    assert set(holders(experts, world, lambda r: ranks[r].experts(experts))) == {1}
    sizes = [layout.experts(experts).size for layout in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert {layout.expert_width(WIDTH) for layout in ranks} == {Slice(0, WIDTH)}


def test_data_parallel_ranks() -> None:
    ranks = [ParallelLayout(tp=2, dp=3, rank=rank) for rank in range(6)]
    assert [(layout.dp_rank, layout.tp_rank) for layout in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert ranks[1].query_heads(HEADS) == ranks[3].query_heads(HEADS) == Slice(24, 48)


def test_a_vocabulary_that_does_not_divide() -> None:
    parts = [ParallelLayout(tp=4, rank=rank).vocabulary(320) for rank in range(4)]
    assert parts == [Slice(0, 128), Slice(128, 256), Slice(256, 320), Slice(320, 320)]


@pytest.mark.parametrize(("build", "message"), [
    (lambda: ParallelLayout(tp=0), "at least 1"),
    (lambda: ParallelLayout(tp=2, rank=2), "Rank 2 does not exist"),
    (lambda: ParallelLayout(tp=4, ep=2), "1 or to all 4 ranks"),
    (lambda: ParallelLayout(tp=5).query_heads(HEADS), "does not divide 48 query heads; 1, 2, 3, 4, 6"),
    (lambda: ParallelLayout(tp=12).kv_heads(KV_HEADS), "no multiple of 8 KV heads"),
    (lambda: ParallelLayout(tp=4, ep=4).experts(3), "at most 3"),
])  # fmt: skip
def test_layouts_that_cannot_be(build: Callable[[], object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        build()

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Decode attention: one new token a row over its whole paged context, split so that few long rows fill the chip too.

A step first makes a list of items on the device (`plan_decode`, one launch a step): each row's blocks are cut into as
many items as its length deserves, so that all items together make about two programs a multiprocessor, whatever the
lengths. Among a few such cuts the list takes the one whose last round of programs leaves the least of the chip idle.
The grid is a bound that only depends on the number of rows: a captured graph serves any context.

A program then takes one item and one KV head, whose query heads are the rows of one tile (6 of 16: the tensor cores
need 16, and memory is what limits). Items of one row leave partial results behind; the one that ends last adds them
up, always in the order of the items, so that a step's bits do not depend on timing.

`decode_fused` also does the work of `qk_rope`: every program normalises and rotates its own query heads, the one with
the row's last blocks also the new key and value, which it stores and counts from registers. `decode` is for steps
where `qk_rope` ran before. Softmax is computed with exp2; queries carry the factor (`qk_rope.QUERY_SCALE`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from saddle.kernels.decode_loop import attend, attend_fp8
from saddle.kernels.launching import enqueue
from saddle.kernels.paged_kv import CHUNK_BYTES, HEAD_DIM, KVLayer
from saddle.kernels.qk_rope import QUERY_SCALE
from saddle.kernels.tile_dot import begin, launch_options, release
from saddle.kernels.whole import next_power_of_2

if TYPE_CHECKING:
    from saddle.kernels.quant import Activation
    from saddle.kernels.target import Target

# Programs a multiprocessor holds at once: with 32 KB of K and V a stage, two keep enough bytes in flight.
PROGRAMS_PER_SM = 2
# Blocks below which an item is not cut further: its fixed cost is that of reading about two blocks.
MIN_BLOCKS = 2
# What an item costs beside reading its blocks, in blocks.
ITEM_COST = 2
# Items may be up to this many times those that fill the chip, where more than FEW_ROWS rows would leave a ragged end.
# Fewer rows are cut finely anyway, and their grid stays small.
MAX_CUT, FEW_ROWS = 4, 8
ITEM_FIELDS = 8  # of an item: row (-1: none), first block, number of blocks, first item of the row, items of the row
HEADS_UP = 16  # query heads of a KV head, rounded up to the tensor cores' rows
PARTIAL_HEADS = 8  # of those, stored in partial results
# Keys and values of a turn: of one block in bf16, of two in FP8. Bytes of a program's shared memory beside them.
TILE_BYTES, OTHER_BYTES = 32 * 1024, 10 * 1024
# Three tiles in flight and one in use saturate an H100 with two programs a multiprocessor.
MAX_STAGES = 4
FP8_TILE = 128
NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Memory that decode attention needs, allocated once.

    items      [max_items, 8] int32
    partial    [max_items, kv_heads, 8, 128] float32, unnormalised outputs
    stats      [2, max_items, kv_heads, 16] float32, largest scores and sums of weights
    counters   [max_rows * kv_heads] int32, zero between launches
    target_items   items that fill the chip
    num_slots      programs that the chip holds at once
    num_stages     of a program's pipeline over its tiles
    has_converter  NVIDIA's instruction that makes two float16 of two FP8 numbers (sm_89 and later)
    """

    items: torch.Tensor
    partial: torch.Tensor
    stats: torch.Tensor
    counters: torch.Tensor
    target_items: int
    num_slots: int
    num_stages: int
    has_converter: bool

    def max_items(self, num_rows: int) -> int:
        """Bound on the items of a step: cutting all blocks evenly leaves at most one short piece a row."""
        return self.target_items * _cut(num_rows) + num_rows

    @classmethod
    def allocate(cls, max_rows: int, num_kv_heads: int, target: Target, device: torch.device) -> DecodeWork:
        slots = target.num_sms * PROGRAMS_PER_SM
        items = max(1, slots // num_kv_heads)
        count = items * _cut(max_rows) + max_rows
        # Stages that leave room for all programs of a multiprocessor, and for no more: items are not cut for more.
        tiles = (target.shared_bytes // PROGRAMS_PER_SM - OTHER_BYTES) // TILE_BYTES
        return cls(
            torch.full((count, ITEM_FIELDS), -1, dtype=torch.int32, device=device),
            torch.zeros(count, num_kv_heads, PARTIAL_HEADS, HEAD_DIM, device=device),
            torch.zeros(2, count, num_kv_heads, HEADS_UP, device=device),
            torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device),
            items, slots, min(max(2, tiles + 1), MAX_STAGES),
            target.capability >= 89 and device.type != "cpu",  # the interpreter knows no machine code
        )  # fmt: skip

    @classmethod
    def bytes_for(cls, max_rows: int, num_kv_heads: int, target: Target) -> int:
        return cls.allocate(max_rows, num_kv_heads, target, torch.device("meta")).num_bytes

    @property
    def num_bytes(self) -> int:
        return 4 * sum(tensor.numel() for tensor in (self.items, self.partial, self.stats, self.counters))


def _cut(num_rows: int) -> int:
    return 1 if num_rows <= FEW_ROWS else MAX_CUT


@triton.jit(do_not_specialize=["num_rows", "cuts"])
def _plan_kernel(
    context_lens, items, num_rows, cuts,
    TARGET: tl.constexpr, SLOTS: tl.constexpr, KV_HEADS: tl.constexpr, MIN: tl.constexpr, COST: tl.constexpr,
    ROWS_UP: tl.constexpr, NUM_ITEMS: tl.constexpr, ITEMS_UP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the items of all rows; one program. `cuts`: how many numbers of items to weigh: TARGET, a little less in
    seven steps (so that few equal rows divide evenly), then TARGET * 3/2, 4/2, ..."""
    begin(PDL)
    row = tl.arange(0, ROWS_UP)
    blocks = (tl.load(context_lens + row, mask=row < num_rows, other=0) + 63) // 64
    total = tl.sum(blocks, 0)
    count = blocks
    least = total * 0 + 0x7FFFFFFF
    for cut in tl.range(0, cuts):
        wanted = tl.where(cut < 8, TARGET - cut * TARGET // 32, TARGET * (cut - 5) // 2)
        piece = tl.maximum(tl.cdiv(total, tl.maximum(wanted, 1)), MIN)
        found = tl.cdiv(blocks, piece)
        longest = tl.max(tl.cdiv(blocks, tl.maximum(found, 1)), 0)
        cost = tl.cdiv(tl.sum(found, 0) * KV_HEADS, SLOTS) * (longest + COST)
        count = tl.where(cost < least, found, count)
        least = tl.minimum(cost, least)
    end = tl.cumsum(count, 0)
    first = end - count
    for index in tl.range(0, tl.max(count, 0)):
        place = items + (first + index) * 8
        mask = index < count
        start = blocks * index // tl.maximum(count, 1)
        stop = blocks * (index + 1) // tl.maximum(count, 1)
        tl.store(place, row, mask=mask)
        tl.store(place + 1, start, mask=mask)
        tl.store(place + 2, stop - start, mask=mask)
        tl.store(place + 3, first, mask=mask)
        tl.store(place + 4, count, mask=mask)
    item = tl.arange(0, ITEMS_UP)
    unused = (item >= tl.sum(count, 0)) & (item < NUM_ITEMS)
    tl.store(items + item * 8, tl.full([ITEMS_UP], -1, tl.int32), mask=unused)
    release(PDL)


@triton.jit
def _mean_square(base, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """Mean of the squares of WIDTH adjacent numbers."""
    column = tl.arange(0, PIECE)
    total = tl.zeros([PIECE], tl.float32)
    for start in tl.static_range(0, WIDTH, PIECE):
        value = tl.load(base + start + column).to(tl.float32)
        total += value * value
    return tl.sum(total, 0) / WIDTH


@triton.jit
def _write_out(out, out_scales, token, head, group, values, GROUP: tl.constexpr, HEADS: tl.constexpr,
               A8: tl.constexpr):  # fmt: skip
    """One token's output of one KV head's query heads: values [16, 128], of which GROUP rows count."""
    mask = (group < GROUP)[:, None]
    place = out + (token * HEADS + head * GROUP + group)[:, None] * 128 + tl.arange(0, 128)[None, :]
    if A8:
        LARGEST: tl.constexpr = 240.0 if out.dtype.element_ty == tl.float8e4b8 else 448.0
        scale = tl.maximum(tl.max(tl.abs(values), 1), 1e-10) / LARGEST
        tl.store(place, (values / scale[:, None]).to(out.dtype.element_ty), mask=mask)
        tl.store(out_scales + token * HEADS + head * GROUP + group, scale, mask=group < GROUP)
    else:
        tl.store(place, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotary(cos_table, sin_table, position, column):
    """cos and signed sin [128] of a position, and each column's partner: new = old * cos + partner * sin."""
    turns = column < 64
    place = position.to(tl.int64) * 32 + (column & 31)
    cos = tl.load(cos_table + place, mask=turns, other=1.0)
    sin = tl.load(sin_table + place, mask=turns, other=0.0) * tl.where(column < 32, -1.0, 1.0)
    return cos, sin, tl.where(turns, column ^ 32, column)


@triton.jit
def _normed_queries(base, q_norm, eps, query_scale, cos, sin, partner, first_head, group, column, GROUP: tl.constexpr,
                    WIDTH: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """Query heads of one KV head of one token, normalised, rotated and scaled: float32 [16, 128]."""
    counts = (group < GROUP)[:, None]
    mine = (first_head + group)[:, None] * 128 + column[None, :]
    other = (first_head + group)[:, None] * 128 + partner[None, :]
    inverse = tl.rsqrt(_mean_square(base, WIDTH, PIECE) + eps) * query_scale
    straight = tl.load(base + mine, mask=counts, other=0.0).to(tl.float32)
    crossed = tl.load(base + other, mask=counts, other=0.0).to(tl.float32)
    straight *= tl.load(q_norm + mine, mask=counts, other=0.0)
    crossed *= tl.load(q_norm + other, mask=counts, other=0.0)
    return (straight * cos[None, :] + crossed * sin[None, :]) * inverse


@triton.jit
def _keep(number, kv, place, scales, scale_place, static, SCALES: tl.constexpr):
    """Store a key or value [128] in the cache; returns float32 what it reads back as."""
    if SCALES == 0:
        kept = number.to(kv.dtype.element_ty)
        tl.store(kv + place, kept)
        back = kept.to(tl.float32)
    else:
        LARGEST: tl.constexpr = 240.0 if kv.dtype.element_ty == tl.float8e4b8 else 448.0
        if SCALES == 2:
            scale = tl.maximum(tl.max(tl.abs(number), 0), 1e-10) / LARGEST
            tl.store(scales + scale_place, scale)
        else:
            scale = static
        kept = tl.minimum(tl.maximum(number / scale, -LARGEST), LARGEST).to(kv.dtype.element_ty)
        tl.store(kv + place, kept)
        back = kept.to(tl.float32) * scale
    return back


@triton.jit
def _new_token(base, k_norm, eps, cos, sin, partner, kv, kv_scales, k_scale, v_scale, table, position, head, column,
               KV_HEADS: tl.constexpr, PIECE: tl.constexpr, CHUNK: tl.constexpr,
               SCALES: tl.constexpr):  # fmt: skip
    """Normalise and rotate one head's new key, store it and its value; returns both as the cache holds them."""
    inverse = tl.rsqrt(_mean_square(base, KV_HEADS * 128, PIECE) + eps)
    mine = head * 128 + column
    other = head * 128 + partner
    key = tl.load(base + mine).to(tl.float32) * tl.load(k_norm + mine) * cos
    key += tl.load(base + other).to(tl.float32) * tl.load(k_norm + other) * sin
    value = tl.load(base + KV_HEADS * 128 + mine).to(tl.float32)
    offset = position % 64
    plane = (tl.load(table + position // 64).to(tl.int64) * (2 * KV_HEADS) + head) * 64 + offset
    place = plane * 128 + ((column // CHUNK) ^ (offset % 8)) * CHUNK + column % CHUNK
    key = _keep(key * inverse, kv, place, kv_scales, plane, k_scale, SCALES)
    value = _keep(value, kv, place + KV_HEADS * 64 * 128, kv_scales, plane + KV_HEADS * 64, v_scale, SCALES)
    return key, value


@triton.jit
def _combined(partial, stats, stats_stride, first_item, num_items, head, group, column, GROUP: tl.constexpr,
              KV_HEADS: tl.constexpr):  # fmt: skip
    """Output [16, 128] of all items of a row. Other programs wrote them: read past this multiprocessor's cache."""
    best = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    result = tl.zeros([16, 128], tl.float32)
    for index in tl.range(first_item, first_item + num_items, loop_unroll_factor=4):
        where = (index * KV_HEADS + head) * 16 + group
        score = tl.load(stats + where, cache_modifier=".cg")
        mass = tl.load(stats + stats_stride + where, cache_modifier=".cg")
        place = ((index * KV_HEADS + head) * 8 + group)[:, None] * 128 + column[None, :]
        values = tl.load(partial + place, mask=(group < GROUP)[:, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(best, score)
        shrink = tl.exp2(best - higher)
        grow = tl.exp2(score - higher)
        total = total * shrink + mass * grow
        result = result * shrink[:, None] + values * grow[:, None]
        best = higher
    return result / total[:, None]


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    source, q_norm, k_norm, eps, cos_table, sin_table, query_scale, kv, kv_scales, k_scale, v_scale, block_tables,
    table_stride, row_ids, context_lens, items, partial, stats, stats_stride, counters, out, out_scales,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q_PIECE: tl.constexpr, K_PIECE: tl.constexpr, STAGES: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, SCALES: tl.constexpr, ASM: tl.constexpr, FUSED: tl.constexpr,
    A8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One item and one KV head. `source`: q [T, heads, 128], or qkv [T, heads + 2 kv_heads, 128] where FUSED."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head = tl.program_id(0)
    item = tl.program_id(1)
    # Items, contexts and tables were written at least two launches before, so that is done when this one may start.
    row = tl.load(items + item * 8)
    start = tl.load(items + item * 8 + 1)
    num_blocks = tl.load(items + item * 8 + 2)
    first_item = tl.load(items + item * 8 + 3)
    num_items = tl.load(items + item * 8 + 4)
    context = tl.load(context_lens + tl.maximum(row, 0))
    table = block_tables + tl.load(row_ids + tl.maximum(row, 0)).to(tl.int64) * table_stride
    begin(PDL)
    if row >= 0:
        token = row.to(tl.int64)
        group = tl.arange(0, 16)
        column = tl.arange(0, 128)
        WIDE: tl.constexpr = kv.dtype.element_ty if SCALES == 0 else tl.float16  # holds e4m3 numbers exactly
        if FUSED:
            base = source + token * ((HEADS + 2 * KV_HEADS) * 128)
            cos, sin, partner = _rotary(cos_table, sin_table, context - 1, column)
            queries = _normed_queries(base, q_norm, eps, query_scale, cos, sin, partner, head * GROUP, group, column,
                                      GROUP, HEADS * 128, Q_PIECE).to(WIDE)  # fmt: skip
        else:
            mine = (token * HEADS + head * GROUP + group)[:, None] * 128 + column[None, :]
            queries = tl.load(source + mine, mask=(group < GROUP)[:, None], other=0.0).to(WIDE)
        limit = context - FUSED  # fused, the new token is counted from registers
        if SCALES == 0:
            best, total, result = attend(queries, kv, table, start, num_blocks, limit, head, column, KV_HEADS,
                                          STAGES, CHUNK)  # fmt: skip
        else:
            best, total, result = attend_fp8(queries, kv, kv_scales, k_scale, v_scale, table, start, num_blocks,
                                              limit, head, KV_HEADS, STAGES, TILE, CHUNK, SCALES, ASM)  # fmt: skip
        release(PDL)
        if FUSED:  # noqa: SIM102
            if (start + num_blocks) * 64 >= context:
                key, value = _new_token(
                    base + HEADS * 128, k_norm, eps, cos, sin, partner, kv, kv_scales, k_scale, v_scale, table,
                    context - 1, head, column, KV_HEADS, K_PIECE, CHUNK, SCALES)  # fmt: skip
                score = tl.sum(queries.to(tl.float32) * key[None, :], 1)
                higher = tl.maximum(best, score)
                shrink = tl.exp2(best - higher)
                weight = tl.exp2(score - higher)
                total = total * shrink + weight
                result = result * shrink[:, None] + weight[:, None] * value[None, :]
                best = higher
        if num_items == 1:
            _write_out(out, out_scales, token, head, group, result / total[:, None], GROUP, HEADS, A8)
        else:
            place = ((item * KV_HEADS + head) * 8 + group)[:, None] * 128 + column[None, :]
            tl.store(partial + place, result, mask=(group < GROUP)[:, None])
            where = (item * KV_HEADS + head) * 16 + group
            tl.store(stats + where, best)
            tl.store(stats + stats_stride + where, total)
            tl.debug_barrier()  # all stores of the program before its arrival is counted
            arrived = tl.atomic_add(counters + row * KV_HEADS + head, 1, sem="acq_rel")
            if arrived == num_items - 1:
                found = _combined(partial, stats, stats_stride, first_item, num_items, head, group, column, GROUP,
                                  KV_HEADS)  # fmt: skip
                _write_out(out, out_scales, token, head, group, found, GROUP, HEADS, A8)
                tl.store(counters + row * KV_HEADS + head, 0)


def plan_decode(context_lens: torch.Tensor, work: DecodeWork, num_rows: int, pdl: int = 0) -> None:
    """Make the items of a step; before the first layer.

    Args:
        context_lens: [>= num_rows] int32, the new token included; 0: a row that only pads.
        num_rows: rows with one new token, the first of the step.
    """
    num_items, kv_heads = work.stats.shape[1:3]
    enqueue(
        _plan_kernel, (1, 1, 1),
        context_lens, work.items, num_rows, 6 + 2 * _cut(num_rows), work.target_items, work.num_slots, kv_heads,
        MIN_BLOCKS, ITEM_COST, next_power_of_2(len(work.counters) // kv_heads), num_items,
        next_power_of_2(num_items), pdl, **launch_options(4, pdl),
    )  # fmt: skip


def decode_fused(
    qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    kv: KVLayer, block_tables: torch.Tensor, row_ids: torch.Tensor, context_lens: torch.Tensor, work: DecodeWork,
    num_rows: int, out: Activation, pdl: int = 0,
) -> None:  # fmt: skip
    """Normalise, rotate, store and attend: row r of the step has one new token, which is token r.

    Args:
        qkv: [T, q + 2 kv] bfloat16 or float32, contiguous.
        q_norm: [q] float32; k_norm: [kv] float32; cos, sin: [positions, 32] float32.
        block_tables: [num_rows of the engine, max_blocks] int32; row_ids: [R] int32, which of them.
        context_lens: [R] int32 as given to `plan_decode`; the new token's position is one less.
        work: planned for these rows.
        out: [T, q], see `Activation`; not written for rows that only pad.
    """
    _launch(qkv, q_norm, k_norm, eps, cos, sin, kv, block_tables, row_ids, context_lens, work, num_rows, out, pdl)


def decode(
    q: torch.Tensor, kv: KVLayer, block_tables: torch.Tensor, row_ids: torch.Tensor, context_lens: torch.Tensor,
    work: DecodeWork, num_rows: int, out: Activation, pdl: int = 0,
) -> None:  # fmt: skip
    """Attend for q [T, heads * 128] of `qk_rope.qk_rope_write`, which stored the keys and values too."""
    _launch(q, None, None, 0.0, None, None, kv, block_tables, row_ids, context_lens, work, num_rows, out, pdl)


def _launch(
    source: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
    cos: torch.Tensor | None, sin: torch.Tensor | None, kv: KVLayer, block_tables: torch.Tensor, row_ids: torch.Tensor,
    context_lens: torch.Tensor, work: DecodeWork, num_rows: int, out: Activation, pdl: int,
) -> None:  # fmt: skip
    fused, kv_heads = q_norm is not None, kv.num_kv_heads
    num_heads = source.shape[1] // HEAD_DIM - (2 * kv_heads if fused else 0)
    group = num_heads // kv_heads
    if num_heads != group * kv_heads or not 0 < group <= PARTIAL_HEADS:
        raise ValueError(f"{num_heads} query heads over {kv_heads} KV heads: at most {PARTIAL_HEADS} each")
    if num_rows == 0:
        return
    enqueue(
        _decode_kernel, (kv_heads, work.max_items(num_rows), 1),
        source, q_norm, k_norm, eps, cos, sin, QUERY_SCALE, kv.data, kv.scales, kv.k_scale, kv.v_scale, block_tables,
        block_tables.stride(0), row_ids, context_lens, work.items, work.partial, work.stats, work.stats.stride(0),
        work.counters, out.data, out.scale, kv_heads, group, _piece_of(num_heads), _piece_of(kv_heads),
        work.num_stages, FP8_TILE, CHUNK_BYTES // kv.data.element_size(), kv.scale_kind, work.has_converter, fused,
        out.scale is not None, pdl, **launch_options(NUM_WARPS, pdl),
    )  # fmt: skip


def _piece_of(num_heads: int) -> int:
    """Largest power of two that divides the heads' numbers, up to what 128 threads load at once."""
    width = num_heads * HEAD_DIM
    return min(width & -width, 1024)

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Causal attention of prompts over paged memory: any number of new tokens a row, behind any context.

The new tokens of all prompt rows are cut into tiles of BM / G consecutive tokens of one row times the G query heads
of a KV head (G = 6: 21 tokens, 126 of 128 tile rows): a tile's heads share every key and value it loads, and few new
tokens still fill a tile. Programs find their tile from `query_starts` on the device; the grid is a bound that the
number of tokens and rows gives, so nothing waits for the host. The last tiles of a row, which see the longest
context, start first.

Few new tokens behind a long context (a prefix that was cached) do not fill the chip: their tiles' keys are split too,
partial results go to memory and a second launch adds them up, in order.

The loop over keys is the usual online softmax (FlashAttention 2) with exp2. Keys that every token of the tile sees
are computed without a mask; the few that only some see come last, with one. `qk_rope` ran before: keys and values of
this step are in memory, and queries carry the softmax's factor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saddle.kernels.launching import enqueue
from saddle.kernels.paged_kv import BLOCK_SIZE, CHUNK_BYTES, HEAD_DIM, STATIC, UNSCALED, KVLayer, swizzled

if TYPE_CHECKING:
    from saddle.kernels.prompt_attention import PromptAttention
    from saddle.kernels.quant import Activation
    from saddle.kernels.target import Target


# Tiles that a multiprocessor holds at once, for which the splits are chosen.
PROGRAMS_PER_SM = 2
MAX_SPLITS = 16
MIN_SPLIT_TURNS = 16  # below, a split gains less than it costs, however few tiles there are
COMBINED_ROWS = 16  # of a tile, by one program
# Prompt rows of a step: a bound, so that one compiled kernel serves every step.
MAX_ROWS = 1024


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """rows   of a tile (tokens x query heads of a KV head)
    keys   a turn of the loop, a multiple of 64 (the block)
    max_registers   of a thread, so that two programs fit a multiprocessor; None: as many as it takes (NVIDIA only)
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    masked_stages: int = 1


@dataclass(frozen=True, slots=True)
class SplitCosts:
    """What a part costs beside its keys, and what writing and adding up a chip full of partial results costs, in turns
    of the loop."""

    part: float
    combine: float


# A turn is 64 keys of 128 rows, two programs a multiprocessor: about 2 microseconds on an H100 that is full.
TRITON_COSTS = SplitCosts(3, 8)
# A turn is 128 keys of 128 rows, one block a multiprocessor: about 1.5 microseconds.
WGMMA_COSTS = SplitCosts(3, 10)


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Memory for partial results, allocated once.

    partial   [count, rows of a tile, 128] float32, unnormalised outputs
    stats     [count, 2, rows of a tile] float32, largest scores and sums of weights
    """

    partial: torch.Tensor
    stats: torch.Tensor

    @classmethod
    def allocate(cls, target: Target, device: torch.device) -> PrefillWork:
        """A chip full of programs, and as many again: what lies between is worth a split."""
        count, rows = 2 * PROGRAMS_PER_SM * target.num_sms, max(prefill_tiles(target, kind).rows for kind in range(3))
        return cls(torch.zeros(count, rows, HEAD_DIM, device=device), torch.zeros(count, 2, rows, device=device))

    @property
    def num_bytes(self) -> int:
        return 4 * (self.partial.numel() + self.stats.numel())

    @property
    def num_slots(self) -> int:
        """Programs that the chip holds at once."""
        return len(self.partial) // 2


@functools.lru_cache(1024)  # the same for all layers of a step
def choose_splits(num_programs: int, num_turns: int, num_slots: int, num_parts: int, costs: SplitCosts) -> int:
    """Into how many parts to cut the keys of every tile: rounds of programs times the turns of each, and the costs.

    Args:
        num_slots: programs that the chip holds at once.
        num_parts: for which there is memory.
    """

    def cost(splits: int) -> float:
        programs = num_programs * splits
        combine = 0.0 if splits == 1 else costs.combine * max(1.0, programs / num_slots)
        return -(-programs // num_slots) * (num_turns / splits + costs.part) + combine

    if num_turns < MIN_SPLIT_TURNS:
        return 1
    most = max(1, min(MAX_SPLITS, num_parts // num_programs))
    return min(range(1, most + 1), key=cost)


def prefill_tiles(target: Target, scale_kind: int) -> PrefillTiles:
    """Tiles that fit the GPU's shared memory: queries (rows x 256 bytes) and per stage keys and values (keys x 512).

    Measured on an H100, one prompt of 8,192: with 128 registers two programs share a multiprocessor, and one's matrix
    products hide the other's softmax (494 TFLOP/s instead of 437). FP8 memory needs more registers for its conversion.
    """
    if target.capability == 90:
        if scale_kind == UNSCALED:
            return PrefillTiles(128, 64, 8, 2, 128)
        return PrefillTiles(128, 64, 4, 3) if scale_kind == STATIC else PrefillTiles(128, 64, 8, 3)
    if target.is_cuda and target.shared_bytes >= 160 * 1024:
        return PrefillTiles(128, 64, 8, 2)
    if target.is_cuda:
        return PrefillTiles(64, 64, 4, 2)
    return PrefillTiles(64, 64, 4, 1)


@triton.jit
def _blocks(table, key, end, KEYS: tl.constexpr):
    """Blocks of the keys from `key` on, or the last ones before `end`: one number, or [KEYS] of several blocks."""
    last = (end - 1) // 64
    if KEYS == 64:
        blocks = tl.load(table + tl.minimum(key // 64, last))
    else:
        blocks = tl.load(table + tl.minimum(key // 64 + tl.arange(0, KEYS) // 64, last))
    return blocks


@triton.jit
def _turn(queries, kv, kv_scales, k_scale, blocks, position, key, end, head, best, total, result, offsets,
          KV_HEADS: tl.constexpr, KEYS: tl.constexpr, SCALES: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """Keys `key` to `key` + KEYS of the row; KEYS is a multiple of the block of 64."""
    WIDE: tl.constexpr = queries.dtype
    within = tl.arange(0, KEYS)
    plane = (blocks.to(tl.int64) * (2 * KV_HEADS) + head) * 64
    scale_place = plane + within % 64
    if KEYS == 64:
        place = plane * 128 + offsets
    else:
        place = (plane * 128)[:, None] + offsets
    if MASKED:
        known = key + within < end  # behind it memory may hold anything, NaN too
        keys = tl.load(kv + place, mask=known[:, None], other=0.0)
        values = tl.load(kv + KV_HEADS * 64 * 128 + place, mask=known[:, None], other=0.0)
    else:
        keys = tl.load(kv + place)
        values = tl.load(kv + KV_HEADS * 64 * 128 + place)
    scores = tl.dot(queries, tl.trans(keys.to(WIDE)))
    if SCALES == 1:
        scores *= k_scale
    if SCALES == 2:
        if MASKED:
            scores *= tl.load(kv_scales + scale_place, mask=known, other=0.0)[None, :]
        else:
            scores *= tl.load(kv_scales + scale_place)[None, :]
    if MASKED:
        scores = tl.where((key + within)[None, :] <= position[:, None], scores, -1e30)
    higher = tl.maximum(best, tl.max(scores, 1))
    shrink = tl.exp2(best - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    result *= shrink[:, None]
    if SCALES == 2:
        # Weights times scales would leave float16's range: only their ratio to the largest goes in.
        if MASKED:
            scale = tl.load(kv_scales + KV_HEADS * 64 + scale_place, mask=known, other=0.0)
        else:
            scale = tl.load(kv_scales + KV_HEADS * 64 + scale_place)
        largest = tl.maximum(tl.max(scale, 0), 1e-30)
        weights *= (scale / largest)[None, :]
        result += tl.dot(weights.to(WIDE), values.to(WIDE)) * largest
    else:
        result = tl.dot(weights.to(WIDE), values.to(WIDE), result)
    return higher, total, result


@triton.jit
def _find_tile(place, query_starts, first_row, num_rows, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Row and first token (within the row's new ones) of the tile at a place of the grid; row -1: none."""
    index = tl.arange(0, ROWS)
    inside = index < num_rows
    begin = tl.load(query_starts + first_row + index, mask=inside, other=0)
    stop = tl.load(query_starts + first_row + index + 1, mask=inside, other=0)
    tiles = tl.cdiv(stop - begin, TOKENS)
    end = tl.cumsum(tiles, 0)
    tile = tl.sum(tiles, 0) - 1 - place
    row = tl.sum((end <= tile).to(tl.int32), 0)
    start = tl.sum(tl.where(index == row, end - tiles, 0), 0)
    return tl.where(tile < 0, -1, row), (tile - start) * TOKENS


@triton.jit
def _lines(line, first, begin, length, head, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Lines of a tile: their token within the row's new ones, their (token, query head) in [T, heads], which exist."""
    step = first + line // GROUP
    mine = (line < TOKENS * GROUP) & (step < length)
    token = (begin + tl.minimum(step, length - 1)).to(tl.int64)
    return step, token * HEADS + head * GROUP + line % GROUP, mine


@triton.jit
def _write_out(out, out_scales, place, mine, result, A8: tl.constexpr):
    """Store outputs [N, 128] of the (token, query head) pairs `place` [N]."""
    numbers = place[:, None] * 128 + tl.arange(0, 128)[None, :]
    if A8:
        LARGEST: tl.constexpr = 240.0 if out.dtype.element_ty == tl.float8e4b8 else 448.0
        scale = tl.maximum(tl.max(tl.abs(result), 1), 1e-10) / LARGEST
        tl.store(out + numbers, (result / scale[:, None]).to(out.dtype.element_ty), mask=mine[:, None])
        tl.store(out_scales + place, scale, mask=mine)
    else:
        tl.store(out + numbers, result.to(out.dtype.element_ty), mask=mine[:, None])


@triton.jit(do_not_specialize=["table_stride", "first_row", "num_rows", "num_splits"])
def _prefill_kernel(
    q, kv, kv_scales, k_scale, v_scale, block_tables, table_stride, row_ids, query_starts, context_lens, first_row,
    num_rows, num_splits, partial, stats, out, out_scales,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, SCALES: tl.constexpr, SPLIT: tl.constexpr,
    A8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of tokens, one KV head, one part of the keys."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    TOKENS: tl.constexpr = BM // GROUP
    WIDE: tl.constexpr = kv.dtype.element_ty if SCALES == 0 else tl.float16  # holds e4m3 numbers exactly
    if PDL > 0:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
    head = tl.program_id(0)
    found, first = _find_tile(tl.program_id(1), query_starts, first_row, num_rows, TOKENS, ROWS)
    if found >= 0:
        row = first_row + found
        begin = tl.load(query_starts + row)
        length = tl.load(query_starts + row + 1) - begin
        context = tl.load(context_lens + row)
        table = block_tables + tl.load(row_ids + row).to(tl.int64) * table_stride
        line = tl.arange(0, BM)
        column = tl.arange(0, 128)
        step, place, mine = _lines(line, first, begin, length, head, GROUP, HEADS, TOKENS)
        queries = tl.load(q + place[:, None] * 128 + column[None, :], mask=mine[:, None], other=0.0).to(WIDE)
        before = context - length
        position = before + step
        seen = (before + first + 1) // KEYS * KEYS  # keys that the tile's first token sees, in whole turns
        end = before + tl.minimum(first + TOKENS, length)
        low = 0
        high = end
        if SPLIT:
            turns = tl.cdiv(end, KEYS)
            low = turns * tl.program_id(2) // num_splits * KEYS
            high = tl.minimum(turns * (tl.program_id(2) + 1) // num_splits * KEYS, end)
        offsets = swizzled(tl.arange(0, KEYS) % 64, column, CHUNK, 128)
        best = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        result = tl.zeros([BM, 128], tl.float32)
        # Block ids are fetched one turn ahead: as a load inside the same turn they would take half of the stages.
        blocks = _blocks(table, low, end, KEYS)
        for key in tl.range(low, tl.minimum(seen, high), KEYS, num_stages=STAGES):
            mine_now = blocks
            blocks = _blocks(table, key + KEYS, end, KEYS)
            best, total, result = _turn(queries, kv, kv_scales, k_scale, mine_now, position, key, end, head, best,
                                        total, result, offsets, KV_HEADS, KEYS, SCALES, False)  # fmt: skip
        for key in tl.range(tl.maximum(seen, low), high, KEYS, num_stages=MASKED_STAGES):
            blocks = _blocks(table, key, end, KEYS)
            best, total, result = _turn(queries, kv, kv_scales, k_scale, blocks, position, key, end, head, best,
                                        total, result, offsets, KV_HEADS, KEYS, SCALES, True)  # fmt: skip
        if PDL == 2:
            gdc_launch_dependents()
        if SCALES == 1:
            result *= v_scale
        if SPLIT:
            part = ((tl.program_id(1) * KV_HEADS + head) * num_splits + tl.program_id(2)).to(tl.int64) * BM
            tl.store(partial + (part + line)[:, None] * 128 + column[None, :], result)
            tl.store(stats + part * 2 + line, best)
            tl.store(stats + part * 2 + BM + line, total)
        else:
            _write_out(out, out_scales, place, mine, result / total[:, None], A8)


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_splits"])
def _combine_kernel(
    query_starts, first_row, num_rows, num_splits, partial, stats, out, out_scales,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr,
    A8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the parts of LINES lines of a tile of one KV head."""
    TOKENS: tl.constexpr = BM // GROUP
    if PDL > 0:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
    head = tl.program_id(0)
    found, first = _find_tile(tl.program_id(1), query_starts, first_row, num_rows, TOKENS, ROWS)
    if found >= 0:
        begin = tl.load(query_starts + first_row + found)
        length = tl.load(query_starts + first_row + found + 1) - begin
        line = tl.program_id(2) * LINES + tl.arange(0, LINES)
        column = tl.arange(0, 128)
        best = tl.full([LINES], -1e30, tl.float32)
        total = tl.zeros([LINES], tl.float32)
        result = tl.zeros([LINES, 128], tl.float32)
        part = ((tl.program_id(1) * KV_HEADS + head) * num_splits).to(tl.int64) * BM
        for _ in tl.range(0, num_splits):
            score = tl.load(stats + part * 2 + line)
            mass = tl.load(stats + part * 2 + BM + line)
            values = tl.load(partial + (part + line)[:, None] * 128 + column[None, :])
            higher = tl.maximum(best, score)
            shrink = tl.exp2(best - higher)
            grow = tl.exp2(score - higher)
            total = total * shrink + mass * grow
            result = result * shrink[:, None] + values * grow[:, None]
            best = higher
            part += BM
        _, place, mine = _lines(line, first, begin, length, head, GROUP, KV_HEADS * GROUP, TOKENS)
        _write_out(out, out_scales, place, mine, result / total[:, None], A8)
    if PDL == 2:
        gdc_launch_dependents()


def prefill(
    q: torch.Tensor, kv: KVLayer, block_tables: torch.Tensor, row_ids: torch.Tensor, query_starts: torch.Tensor,
    context_lens: torch.Tensor, first_row: int, num_rows: int, num_tokens: int, out: Activation, target: Target,
    pdl: int = 0, work: PrefillWork | None = None, max_context: int = 0, wgmma: PromptAttention | None = None,
    factors: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Attend for the new tokens of the rows first_row to first_row + num_rows of a step.

    Args:
        q: [T, heads * 128] bfloat16 of `qk_rope.qk_rope_write`, which stored the keys and values too.
        block_tables: [rows of the engine, max_blocks] int32; row_ids: [R] int32, which of them.
        query_starts: [R + 1] int32, first token of each row; context_lens: [R] int32, new tokens included.
        num_tokens: at least the number of new tokens of these rows.
        out: [T, heads * 128], see `Activation`; written for these rows' tokens.
        work, max_context: memory for splits and a bound on the rows' contexts; without them nothing is split.
        wgmma: the kernel that takes the place of Triton's, where there is one.
        factors: [T] float32, by which a token's scores are multiplied, for wgmma alone; None: q has them. q may then
            be part of wider rows.
    """
    if not _anything(num_rows, num_tokens):
        return
    group = q.shape[1] // HEAD_DIM // kv.num_kv_heads
    if wgmma is not None:
        splits = 1
        if work is not None:
            num_programs = _max_tiles(group, num_tokens, num_rows, wgmma.LINES) * kv.num_kv_heads
            turns = -(-max_context // wgmma.KEYS)
            splits = choose_splits(num_programs, turns, wgmma.num_blocks, len(work.partial), WGMMA_COSTS)
        launch_wgmma(wgmma, q, kv, block_tables, row_ids, query_starts, context_lens, first_row, num_rows, num_tokens,
                     out, pdl, work, splits, factors)  # fmt: skip
        return
    if factors is not None:
        raise ValueError("Factors of scores are for the wgmma kernel alone.")
    tiles = prefill_tiles(target, kv.scale_kind)
    splits = 1
    if work is not None:
        num_programs = _max_tiles(group, num_tokens, num_rows, tiles.rows) * kv.num_kv_heads
        turns = -(-max_context // tiles.keys)
        splits = choose_splits(num_programs, turns, work.num_slots, len(work.partial), TRITON_COSTS)
    launch(q, kv, block_tables, row_ids, query_starts, context_lens, first_row, num_rows, num_tokens, out, tiles, pdl,
           work, splits)  # fmt: skip


def _max_tiles(group: int, num_tokens: int, num_rows: int, lines: int) -> int:
    """Each row ends in at most one tile that is not full."""
    return num_tokens // (lines // group) + num_rows


def launch(
    q: torch.Tensor, kv: KVLayer, block_tables: torch.Tensor, row_ids: torch.Tensor, query_starts: torch.Tensor,
    context_lens: torch.Tensor, first_row: int, num_rows: int, num_tokens: int, out: Activation, tiles: PrefillTiles,
    pdl: int, work: PrefillWork | None = None, splits: int = 1,
) -> None:  # fmt: skip
    """`prefill` by Triton's kernel, with tiles and splits of the caller's choice."""
    num_heads, kv_heads = q.shape[1] // HEAD_DIM, kv.num_kv_heads
    group = num_heads // kv_heads
    if num_heads != group * kv_heads or group > tiles.rows or tiles.keys % BLOCK_SIZE:
        raise ValueError(f"tiles of {tiles.rows} x {tiles.keys} do not take {num_heads} heads over {kv_heads}")
    if not _anything(num_rows, num_tokens):
        return
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    registers = {} if tiles.max_registers is None else {"maxnreg": tiles.max_registers}
    num_tiles = _max_tiles(group, num_tokens, num_rows, tiles.rows)
    partial, stats = _room(num_tiles * kv_heads, tiles.rows, splits, work)
    enqueue(
        _prefill_kernel, (kv_heads, num_tiles, splits),
        q, kv.data, kv.scales, kv.k_scale, kv.v_scale, block_tables, block_tables.stride(0), row_ids, query_starts,
        context_lens, first_row, num_rows, splits, partial, stats, out.data, out.scale, kv_heads, group, tiles.rows,
        tiles.keys, tiles.num_stages, tiles.masked_stages, MAX_ROWS, CHUNK_BYTES // kv.data.element_size(),
        kv.scale_kind, splits > 1, out.scale is not None, pdl, num_warps=tiles.num_warps, **registers, **options,
    )  # fmt: skip
    if splits > 1:
        _combine(query_starts, first_row, num_rows, splits, partial, stats, out, kv_heads, group, tiles.rows,
                 num_tiles, pdl)  # fmt: skip


def launch_wgmma(
    wgmma: PromptAttention, q: torch.Tensor, kv: KVLayer, block_tables: torch.Tensor, row_ids: torch.Tensor,
    query_starts: torch.Tensor, context_lens: torch.Tensor, first_row: int, num_rows: int, num_tokens: int,
    out: Activation, pdl: int, work: PrefillWork | None = None, splits: int = 1, factors: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """`prefill` by the wgmma kernel, with splits of the caller's choice."""
    if not _anything(num_rows, num_tokens):
        return
    kv_heads = kv.num_kv_heads
    group = q.shape[1] // HEAD_DIM // kv_heads
    num_tiles = _max_tiles(group, num_tokens, num_rows, wgmma.LINES)
    if num_tiles > wgmma.MAX_TILES:
        raise ValueError(f"a step takes at most {wgmma.MAX_TILES} tiles of prompts, not {num_tiles}")
    partial, stats = _room(num_tiles * kv_heads, wgmma.LINES, splits, work)
    wgmma.attend(q, kv, block_tables, row_ids, query_starts, context_lens, first_row, num_rows, out, partial, stats,
                 splits, factors)  # fmt: skip
    if splits > 1:
        _combine(query_starts, first_row, num_rows, splits, partial, stats, out, kv_heads, group, wgmma.LINES,
                 num_tiles, pdl)  # fmt: skip


def _anything(num_rows: int, num_tokens: int) -> bool:
    if num_rows > MAX_ROWS:
        raise ValueError(f"a step takes at most {MAX_ROWS} prompts, not {num_rows}")
    return num_rows > 0 and num_tokens > 0


def _room(
    num_programs: int, lines: int, splits: int, work: PrefillWork | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Memory for the parts' results, if there are parts."""
    if splits == 1:
        return None, None
    if work is None or num_programs * splits * lines > work.partial.shape[0] * work.partial.shape[1]:
        raise ValueError(f"{splits} parts of {num_programs} tiles have no room for their results")
    return work.partial, work.stats


def _combine(
    query_starts: torch.Tensor, first_row: int, num_rows: int, splits: int, partial: torch.Tensor | None,
    stats: torch.Tensor | None, out: Activation, kv_heads: int, group: int, lines: int, num_tiles: int, pdl: int,
) -> None:  # fmt: skip
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    enqueue(
        _combine_kernel, (kv_heads, num_tiles, lines // COMBINED_ROWS),
        query_starts, first_row, num_rows, splits, partial, stats, out.data, out.scale, kv_heads, group, lines,
        COMBINED_ROWS, MAX_ROWS, out.scale is not None, pdl, num_warps=4, **options,
    )  # fmt: skip

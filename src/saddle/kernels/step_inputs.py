# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A step's inputs made on the device from the persistent rows: ids, positions, slots and lengths never visit the host.

    decode_inputs   one token for each row, one launch; padded slots have row -1
    row_inputs      any number of tokens: brings the rows up to date and says where each starts
    token_inputs    then writes the tokens

All three advance `num_computed`, so the next step can be enqueued behind this one at once. The reference is
`runner.batch.build`, which does the same in torch on a CPU. Numbers that change from step to step are not specialised
on: nothing compiles after the first step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from saddle.kernels.launching import enqueue
from saddle.kernels.row_state import NUM_COMPUTED, ROW_WIDTH
from saddle.kernels.whole import cdiv, next_power_of_2

TOKEN_BLOCK = 1024  # tokens a program of `token_inputs` writes
COPY_BLOCK = 256  # block ids that `row_inputs` copies at a time
WORK_WIDTH = 8  # numbers of a row's work, see `launch_rows`
MAX_LANES = 1024  # rows that `decode_inputs` takes in its one program


@triton.jit(do_not_specialize=["num_rows", "token_stride", "table_stride"])
def decode_inputs(
    row_ids, new_blocks, state, row_tokens, token_stride, block_tables, table_stride, token_ids, positions, slots,
    context_lens, num_rows, BLOCK_SIZE: tl.constexpr, STATE_WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """See `launch_decode`; one program."""
    lane = tl.arange(0, LANES)
    inside = lane < num_rows
    row = tl.load(row_ids + lane, mask=inside, other=-1).to(tl.int64)
    live = row >= 0
    computed = tl.load(state + row * STATE_WIDTH + NUM_COMPUTED, mask=live, other=0)
    token = tl.load(row_tokens + row * token_stride + computed, mask=live, other=0)
    fresh = tl.load(new_blocks + lane, mask=live, other=-1)
    place = block_tables + row * table_stride + computed // BLOCK_SIZE
    block = tl.load(place, mask=live & (fresh < 0), other=0)
    block = tl.where(fresh >= 0, fresh, block)
    slot = block.to(tl.int64) * BLOCK_SIZE + computed % BLOCK_SIZE
    tl.store(place, fresh, mask=live & (fresh >= 0))
    tl.store(token_ids + lane, token, mask=inside)
    tl.store(positions + lane, tl.where(live, computed, -1), mask=inside)
    tl.store(slots + lane, tl.where(live, slot, -1), mask=inside)
    tl.store(context_lens + lane, tl.where(live, computed + 1, 0), mask=inside)
    tl.store(state + row * STATE_WIDTH + NUM_COMPUTED, computed + 1, mask=live)


def launch_decode(
    row_ids: torch.Tensor, new_blocks: torch.Tensor, state: torch.Tensor, row_tokens: torch.Tensor,
    block_tables: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
    context_lens: torch.Tensor, block_size: int,
) -> None:  # fmt: skip
    """The next token of each row.

    Args:
        row_ids: [R] int32, all different; -1 pads.
        new_blocks: [R] int32, the block that the token begins; -1 where it begins none.
        state, row_tokens, block_tables: of `DeviceRows`; read and advanced.
        token_ids, positions, context_lens: [R] int32, written: id 0, position -1 and length 0 where padded.
        slots: [R] int64, written; -1 where padded.

    Raises:
        ValueError: more than 1,024 rows.
    """
    num_rows = len(row_ids)
    if num_rows > MAX_LANES:
        raise ValueError(f"a decode step has at most {MAX_LANES} rows, got {num_rows}")
    enqueue(
        decode_inputs, (1, 1, 1),
        row_ids, new_blocks, state, row_tokens, row_tokens.stride(0), block_tables, block_tables.stride(0), token_ids,
        positions, slots, context_lens, num_rows, BLOCK_SIZE=block_size, STATE_WIDTH=ROW_WIDTH,
        LANES=next_power_of_2(num_rows), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def row_inputs(
    work, block_ids, state, block_tables, table_stride, row_ids, query_starts, context_lens, sample_rows,
    sample_positions, num_rows, STATE_WIDTH: tl.constexpr, WORK_WIDTH: tl.constexpr, COPY_BLOCK: tl.constexpr,
):  # fmt: skip
    """See `launch_rows`; program (row of the step)."""
    index = tl.program_id(0)
    mine = work + index * WORK_WIDTH
    row, num_tokens, num_cached = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    table_start, first_block, num_blocks = tl.load(mine + 3), tl.load(mine + 4), tl.load(mine + 5)
    sample_slot, query_start = tl.load(mine + 6), tl.load(mine + 7)
    table = block_tables + row.to(tl.int64) * table_stride + table_start
    for start in range(0, num_blocks, COPY_BLOCK):
        lane = start + tl.arange(0, COPY_BLOCK)
        block = tl.load(block_ids + first_block + lane, mask=lane < num_blocks, other=0)
        tl.store(table + lane, block, mask=lane < num_blocks)
    computed = state + row.to(tl.int64) * STATE_WIDTH + NUM_COMPUTED
    context = tl.load(computed) + num_cached + num_tokens
    tl.store(computed, context)
    tl.store(row_ids + index, row)
    tl.store(query_starts + index, query_start)
    tl.store(context_lens + index, context)
    if index == num_rows - 1:
        tl.store(query_starts + num_rows, query_start + num_tokens)
    if sample_slot >= 0:
        tl.store(sample_rows + sample_slot, row)
        tl.store(sample_positions + sample_slot, context)


@triton.jit(do_not_specialize=["token_stride", "table_stride", "num_rows", "size"])
def token_inputs(
    row_ids, query_starts, context_lens, row_tokens, token_stride, block_tables, table_stride, token_ids, positions,
    slots, num_rows, size, BLOCK_SIZE: tl.constexpr, TOKEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """See `launch_rows`; program (row of the step, block of its tokens), and behind the rows what pads."""
    index = tl.program_id(0)
    start = tl.load(query_starts + index)
    offset = tl.program_id(1) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    if index < num_rows:
        row = tl.load(row_ids + index).to(tl.int64)
        num_tokens = tl.load(query_starts + index + 1) - start
        inside = offset < num_tokens
        position = tl.load(context_lens + index) - num_tokens + offset
        token = tl.load(row_tokens + row * token_stride + position, mask=inside, other=0)
        block = tl.load(block_tables + row * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    else:
        inside = start + offset < size
        token = tl.zeros([TOKEN_BLOCK], tl.int32)
        position = token - 1
        slot = position.to(tl.int64)
    tl.store(token_ids + start + offset, token, mask=inside)
    tl.store(positions + start + offset, position, mask=inside)
    tl.store(slots + start + offset, slot, mask=inside)


def launch_rows(
    work: torch.Tensor, block_ids: torch.Tensor, longest: int, state: torch.Tensor, row_tokens: torch.Tensor,
    block_tables: torch.Tensor, row_ids: torch.Tensor, query_starts: torch.Tensor, context_lens: torch.Tensor,
    sample_rows: torch.Tensor, sample_positions: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor,
    slots: torch.Tensor, block_size: int,
) -> None:  # fmt: skip
    """Any number of tokens for each row.

    Args:
        work: [R, 8] int32, of each row: its id, tokens to compute, tokens to skip first, where in its block table new
            blocks go, the first of them in `block_ids`, how many, its sampling slot (-1: it samples nothing), and
            where its tokens start among the step's.
        block_ids: [N] int32, new blocks of all rows.
        longest: most tokens of a row, and no less than what pads.
        state, row_tokens, block_tables: of `DeviceRows`; read and advanced.
        row_ids, context_lens: [R], query_starts: [R + 1], sample_rows, sample_positions: [S], token_ids, positions:
            [T], all int32, and slots: [T] int64; written. Where the rows have fewer tokens than T, the rest pads: id
            0, position and slot -1.
    """
    num_rows = len(work)
    enqueue(
        row_inputs, (num_rows, 1, 1),
        work, block_ids, state, block_tables, block_tables.stride(0), row_ids, query_starts, context_lens, sample_rows,
        sample_positions, num_rows, STATE_WIDTH=ROW_WIDTH, WORK_WIDTH=WORK_WIDTH, COPY_BLOCK=COPY_BLOCK, num_warps=1,
    )  # fmt: skip
    enqueue(
        token_inputs, (num_rows + 1, cdiv(longest, TOKEN_BLOCK), 1),
        row_ids, query_starts, context_lens, row_tokens, row_tokens.stride(0), block_tables, block_tables.stride(0),
        token_ids, positions, slots, num_rows, len(token_ids), BLOCK_SIZE=block_size, TOKEN_BLOCK=TOKEN_BLOCK,
        num_warps=4,
    )  # fmt: skip

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Edits of logits, in place, for the slots that ask; each is one launch for all of them.

    mask_rows      grammar masks: ids whose bit is 0 become -inf
    edit_rows      what a request lists: bias, bans, bans up to a length, bad words, permitted ids
    mark_tokens    at admission: which ids a row's prompt has, and how often its output has each
    penalise_rows  repetition, presence and frequency penalty
    count_tokens   after sampling: one more of the drawn id

A row's counts are [V] int32: bit 30 says that the id is in the prompt, the rest counts the output.
Reference: `runner.logits`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from saddle.kernels.launching import enqueue
from saddle.kernels.row_state import FREQUENCY, PRESENCE, REPETITION, ROW_WIDTH
from saddle.kernels.whole import cdiv

CHUNK = 4096
EDIT_WIDTH = tl.constexpr(6)  # numbers of a slot's edits, see `edit_rows`
ENTRY_WIDTH = tl.constexpr(5)  # numbers of one edit
ENTRIES = 128  # edits of a row that are looked at together
ALWAYS = (1 << 31) - 1  # an edit that ends at no position
IN_PROMPT = tl.constexpr(1 << 30)
MARK_BLOCK = 1024


@triton.jit
def _mask_rows(logits, stride, slots, bits, num_words, vocab_size, CHUNK: tl.constexpr):
    index = tl.program_id(0)
    slot = tl.load(slots + index).to(tl.int64)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab_size
    word = tl.load(bits + index.to(tl.int64) * num_words + ids // 32, mask=inside, other=-1)
    tl.store(logits + slot * stride + ids, -float("inf"), mask=inside & (((word >> (ids % 32)) & 1) == 0))


def mask_rows(logits: torch.Tensor, slots: torch.Tensor, bits: torch.Tensor) -> None:
    """Allow only the ids whose bit is set.

    Args:
        logits: [S, V] float32, changed in place; rows may be strided.
        slots: [N] int32, which rows of `logits`.
        bits: [N, ceil(V / 32)] int32, little-endian.
    """
    vocab_size = logits.shape[1]
    grid = len(slots), cdiv(vocab_size, CHUNK), 1
    enqueue(_mask_rows, grid, logits, logits.stride(0), slots, bits, bits.shape[1], vocab_size, CHUNK=CHUNK,
            num_warps=4)  # fmt: skip


@triton.jit
def _apply_entries(row_logits, entries, num_entries, heads, longest, row_tokens, position, ENTRIES: tl.constexpr):
    """Add to single ids whatever the row's list says of them."""
    for start in range(0, num_entries, ENTRIES):
        index = start + tl.arange(0, ENTRIES)
        inside = index < num_entries
        entry = entries + index * ENTRY_WIDTH
        token = tl.load(entry, mask=inside, other=0)
        value = tl.load(entry + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
        head = heads + tl.load(entry + 3, mask=inside, other=0)
        length = tl.load(entry + 4, mask=inside, other=0)
        applies = inside & (position < tl.load(entry + 2, mask=inside, other=0)) & (position >= length)
        for place in range(longest):
            is_head = applies & (place < length)
            wanted = tl.load(head + place, mask=is_head, other=0)
            written = tl.load(row_tokens + position - length + place, mask=is_head, other=0)
            applies = applies & ((place >= length) | (wanted == written))
        # Added, not set: several may name the same id.
        tl.atomic_add(row_logits + token, value, mask=applies)


@triton.jit(do_not_specialize=["token_stride"])
def _edit_rows(
    logits, stride, edits, positions, row_tokens, token_stride, vocab_size, CHUNK: tl.constexpr, ENTRIES: tl.constexpr
):
    """See `edit_rows`; program (edited slot, chunk)."""
    mine = edits + tl.program_id(0) * EDIT_WIDTH
    slot, row = tl.load(mine), tl.load(mine + 1)
    row_logits = logits + slot * stride
    permitted = tl.load(mine + 5)
    if permitted != 0:
        ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = ids < vocab_size
        word = tl.load(permitted.to(tl.pointer_type(tl.int32)) + ids // 32, mask=inside, other=-1)
        # Whether an id that is not permitted is also edited below, before or after, changes nothing: it stays -inf.
        tl.store(row_logits + ids, -float("inf"), mask=inside & (((word >> (ids % 32)) & 1) == 0))
    if tl.program_id(1) == 0:
        lists = tl.load(mine + 2).to(tl.pointer_type(tl.int32))
        counts = tl.load(mine + 3)
        num_entries, longest = (counts & 0xFFFFFFFF).to(tl.int32), (counts >> 32).to(tl.int32)
        heads = tl.load(mine + 4).to(tl.pointer_type(tl.int32))
        _apply_entries(row_logits, lists, num_entries, heads, longest, row_tokens + row * token_stride,
                       tl.load(positions + slot), ENTRIES)  # fmt: skip


def edit_rows(
    logits: torch.Tensor, edits: torch.Tensor, positions: torch.Tensor, row_tokens: torch.Tensor
) -> None:
    """Add to logits, or forbid ids, as the rows' lists say.

    Args:
        logits: [S, V] float32, changed in place; rows may be strided.
        edits: [N, 6] int64, of each slot that is edited: the slot, its row; the address of its list, [n, 5] int32 of
            id, what is added (float bits), the position from which on it is not, where the ids that must have come
            just before begin, and how many they are; n, and from bit 32 on the most such ids; the address of those
            ids, int32; the address of its permitted ids, one bit each in int32 words, or 0 where all are.
        positions: [S] int32, the position that the new token of each slot takes.
        row_tokens: [num_rows, max_len] int32, the ids of all rows.
    """
    vocab_size = logits.shape[1]
    grid = len(edits), cdiv(vocab_size, CHUNK), 1
    enqueue(_edit_rows, grid, logits, logits.stride(0), edits, positions, row_tokens, row_tokens.stride(0), vocab_size,
            CHUNK=CHUNK, ENTRIES=ENTRIES, num_warps=4)  # fmt: skip


@triton.jit(do_not_specialize=["num_prompt", "num_tokens"], do_not_specialize_on_alignment=["row_tokens", "counts"])
def _mark_tokens(row_tokens, counts, num_prompt, num_tokens, MARK_BLOCK: tl.constexpr):
    place = tl.program_id(0) * MARK_BLOCK + tl.arange(0, MARK_BLOCK)
    inside = place < num_tokens
    token = tl.load(row_tokens + place, mask=inside, other=0)
    tl.atomic_or(counts + token, IN_PROMPT, mask=inside & (place < num_prompt))
    tl.atomic_add(counts + token, 1, mask=inside & (place >= num_prompt))


def mark_tokens(row_tokens: torch.Tensor, counts: torch.Tensor, num_prompt: int) -> None:
    """Count the tokens of a row that was admitted.

    Args:
        row_tokens: [N] int32, prompt and output so far.
        counts: [V] int32, overwritten.
    """
    counts.zero_()
    grid = cdiv(len(row_tokens), MARK_BLOCK), 1, 1
    enqueue(_mark_tokens, grid, row_tokens, counts, num_prompt, len(row_tokens), MARK_BLOCK=MARK_BLOCK)


@triton.jit
def _penalise_rows(
    logits, stride, slots, rows, state, counts, vocab_size, STATE_WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    row = tl.load(rows + slot).to(tl.int64)
    row_state = state + row * STATE_WIDTH
    repetition = tl.load(row_state + REPETITION).to(tl.float32, bitcast=True)
    presence = tl.load(row_state + PRESENCE).to(tl.float32, bitcast=True)
    frequency = tl.load(row_state + FREQUENCY).to(tl.float32, bitcast=True)
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    count = tl.load(counts + row * vocab_size + ids, mask=ids < vocab_size, other=0)
    came = count != 0  # most did not: their logits are not even read
    place = logits + slot * stride + ids
    value = tl.load(place, mask=came, other=0.0)
    value = tl.where(value > 0, value / repetition, value * repetition)
    in_output = count & (IN_PROMPT - 1)
    value -= tl.where(in_output > 0, presence, 0.0) + frequency * in_output.to(tl.float32)
    tl.store(place, value, mask=came)


def penalise_rows(
    logits: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, state: torch.Tensor, counts: torch.Tensor
) -> None:
    """Apply the penalties of the rows.

    Args:
        logits: [S, V] float32, changed in place.
        slots: [N] int32, which rows of `logits`.
        rows: [S] int32, the device's row of each slot.
        state: [num_rows, ROW_WIDTH] int32, with the penalties.
        counts: [num_rows, V] int32.
    """
    vocab_size = logits.shape[1]
    grid = len(slots), cdiv(vocab_size, CHUNK), 1
    enqueue(_penalise_rows, grid, logits, logits.stride(0), slots, rows, state, counts, vocab_size,
            STATE_WIDTH=ROW_WIDTH, CHUNK=CHUNK, num_warps=4)  # fmt: skip


@triton.jit(do_not_specialize=["num_slots"])
def _count_tokens(slots, rows, drawn, counts, vocab_size, num_slots, LANES: tl.constexpr):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < num_slots
    slot = tl.load(slots + lane, mask=inside, other=0)
    row = tl.load(rows + slot, mask=inside, other=0).to(tl.int64)
    place = counts + row * vocab_size + tl.load(drawn + slot, mask=inside, other=0)
    tl.store(place, tl.load(place, mask=inside, other=0) + 1, mask=inside)


def count_tokens(slots: torch.Tensor, rows: torch.Tensor, drawn: torch.Tensor, counts: torch.Tensor) -> None:
    """One more of the id that each slot drew.

    Args:
        slots: [N] int32, all different; rows, drawn: [S] int32, by slot.
        counts: [num_rows, V] int32.
    """
    grid = cdiv(len(slots), 128), 1, 1
    enqueue(_count_tokens, grid, slots, rows, drawn, counts, counts.shape[1], len(slots), LANES=128, num_warps=4)

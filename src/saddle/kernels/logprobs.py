# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Log-probabilities of chosen ids and of the best ones, without writing anything as large as the vocabulary.

    scan     [positions x chunks]   reads the logits once. Of each chunk: largest logit, sum of exponentials (float64),
                                    how many logits the chosen one does not exceed; the largest of each group of 32.
    finish   [positions]            the normaliser from the chunks in float64; then the k best ids, exactly:

In the order (logit descending, id ascending) the k first ids lie in the k first groups of the order (largest logit
descending, group ascending): each group in front of one of theirs holds an id in front of it. So k groups are taken by
bisection over the bits of float32, and of their 32 k logits, all at once in registers, the k first likewise. What is
left is k numbers, whose places are counted by comparing each with each.

The rank is the one that vLLM reports: how many ids are at least as likely, the chosen one included.
Reference: `runner.sampler.score`; there torch decides which of equal logits come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saddle.kernels.launching import enqueue
from saddle.kernels.sampling import CHUNK, GROUP, WARPS, order_key
from saddle.kernels.whole import cdiv, next_power_of_2

MAX_TOP = 64  # their groups' logits, 2,048 numbers, are held at once


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def scan(
    logits, stride, rows, tokens, group_max, chunk_max, chunk_sum, chunk_count, num_valid, NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """See `launch`; program (entry, chunk)."""
    entry, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    row_logits = logits + row * stride
    own = tl.load(row_logits + tl.load(tokens + row))
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(row_logits + ids, mask=ids < num_valid, other=-float("inf"))
    largest = tl.max(value, axis=0)
    at = entry * NUM_CHUNKS + chunk
    tl.store(chunk_max + at, largest)
    # A chunk of which nothing may come has the sum 0, not exp(-inf + inf).
    base = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(chunk_sum + at, tl.sum(tl.exp(value - base).to(tl.float64), axis=0))
    tl.store(chunk_count + at, tl.sum(((value >= own) & (ids < num_valid)).to(tl.int32), axis=0))
    groups = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    best = tl.max(tl.reshape(value, [CHUNK // GROUP, GROUP]), axis=1)
    tl.store(group_max + entry * (NUM_CHUNKS * (CHUNK // GROUP)) + groups, best)


@triton.jit
def _first(keys, k):
    """Which `k` of `keys` are largest, of equal ones the first, and the place of each among those."""
    low, high = tl.min(keys, axis=0), tl.max(keys, axis=0)
    while low < high:  # the largest key that at least k reach
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        if tl.sum((keys >= middle).to(tl.int32), axis=0) >= k:
            low = middle
        else:
            high = middle - 1
    above, equal = keys > low, keys == low
    needed = k - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= needed))
    return chosen, tl.cumsum(chosen.to(tl.int32), axis=0) - 1


@triton.jit
def _store_best(
    row_logits, row_groups, groups_at, values_at, ids_at, out_values, out_ids, normaliser, num_valid, num_top,
    NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GROUP: tl.constexpr, MAX_TOP: tl.constexpr,
):  # fmt: skip
    """The `num_top` best ids and their log-probabilities, best first."""
    nothing = tl.full([], -2147483648, tl.int32)  # below the key of -inf
    groups = tl.arange(0, GROUPS_PADDED)
    inside = groups < NUM_GROUPS
    group_keys = tl.where(inside, order_key(tl.load(row_groups + groups, mask=inside, other=0.0)), nothing)
    chosen, place = _first(group_keys, num_top)
    tl.store(groups_at + place, groups, mask=chosen)
    tl.debug_barrier()  # other threads of this program read what was stored
    index = tl.arange(0, MAX_TOP * GROUP)
    is_taken = index // GROUP < num_top
    ids = tl.load(groups_at + index // GROUP, mask=is_taken, other=0) * GROUP + index % GROUP
    is_taken = is_taken & (ids < num_valid)
    value = tl.load(row_logits + ids, mask=is_taken, other=0.0)
    chosen, place = _first(tl.where(is_taken, order_key(value), nothing), num_top)
    tl.store(values_at + place, value, mask=chosen)
    tl.store(ids_at + place, ids, mask=chosen)
    tl.debug_barrier()
    # They lie in the order of their ids: in front of each are the larger ones, and equal ones in front.
    lane = tl.arange(0, MAX_TOP)
    inside = lane < num_top
    value = tl.load(values_at + lane, mask=inside, other=0.0)
    keys = tl.where(inside, order_key(value), nothing)
    is_before = (keys[None, :] > keys[:, None]) | ((keys[None, :] == keys[:, None]) & (lane[None, :] < lane[:, None]))
    place = tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(out_values + place, value.to(tl.float64) - normaliser, mask=inside)
    tl.store(out_ids + place, tl.load(ids_at + lane, mask=inside, other=0).to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=["tokens", "out"])
def finish(
    logits, stride, rows, tokens, group_max, chunk_max, chunk_sum, chunk_count, groups_at, values_at, ids_at, out,
    num_valid, num_top, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, MAX_TOP: tl.constexpr,
):  # fmt: skip
    """See `launch`; program (entry)."""
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry).to(tl.int64)
    row_logits = logits + row * stride
    token = tl.load(tokens + row)
    chunks = tl.arange(0, CHUNKS_PADDED)
    at, inside = entry * NUM_CHUNKS + chunks, chunks < NUM_CHUNKS
    highest = tl.load(chunk_max + at, mask=inside, other=-float("inf"))
    largest = tl.max(highest, axis=0)
    shares = tl.load(chunk_sum + at, mask=inside, other=0.0) * tl.exp((highest - largest).to(tl.float64))
    normaliser = largest.to(tl.float64) + tl.log(tl.sum(shares, axis=0))
    rank = tl.sum(tl.load(chunk_count + at, mask=inside, other=0), axis=0)
    mine = out + entry * (3 + 2 * num_top)
    tl.store(mine, token.to(tl.float64))
    tl.store(mine + 1, tl.load(row_logits + token).to(tl.float64) - normaliser)
    tl.store(mine + 2, rank.to(tl.float64))
    if num_top > 0:
        NUM_GROUPS: tl.constexpr = NUM_CHUNKS * (CHUNK // GROUP)
        _store_best(
            row_logits, group_max + entry * NUM_GROUPS, groups_at + entry * MAX_TOP, values_at + entry * MAX_TOP,
            ids_at + entry * MAX_TOP, mine + 3, mine + 3 + num_top, normaliser, num_valid, num_top, NUM_GROUPS,
            GROUPS_PADDED, GROUP, MAX_TOP,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LogprobWork:
    """Work space of `launch` for up to `max_entries` positions at once; made once.

    group_max [entries, groups], chunk_max [entries, chunks] float32; chunk_sum likewise float64, chunk_count int32;
    groups, ids [entries, MAX_TOP] int32, values likewise float32; every [entries] int32: 0, 1, 2, ...
    """

    group_max: torch.Tensor
    chunk_max: torch.Tensor
    chunk_sum: torch.Tensor
    chunk_count: torch.Tensor
    groups: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor
    every: torch.Tensor

    @staticmethod
    def allocate(max_entries: int, vocab_size: int, device: torch.device) -> LogprobWork:
        chunks = cdiv(vocab_size, CHUNK)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_entries, width, dtype=dtype, device=device)

        return LogprobWork(
            group_max=empty(chunks * (CHUNK // GROUP), torch.float32),
            chunk_max=empty(chunks, torch.float32),
            chunk_sum=empty(chunks, torch.float64),
            chunk_count=empty(chunks, torch.int32),
            groups=empty(MAX_TOP, torch.int32),
            values=empty(MAX_TOP, torch.float32),
            ids=empty(MAX_TOP, torch.int32),
            every=torch.arange(max_entries, dtype=torch.int32, device=device),
        )

    @staticmethod
    def num_bytes(max_entries: int, vocab_size: int) -> int:
        """Of `allocate`."""
        chunks = -(-vocab_size // CHUNK)
        return max_entries * (4 * chunks * (CHUNK // GROUP) + 16 * chunks + 12 * MAX_TOP + 4)


def launch(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, num_top: int, work: LogprobWork,
    out: torch.Tensor, num_valid: int,
) -> None:  # fmt: skip
    """Log-probabilities at N positions.

    Args:
        logits: [S, V] float32; its rows may be strided.
        rows: [N] int32, rows of `logits`; N is at most what `work` was made for.
        tokens: [S] int32, the chosen id of each row of `logits`, below `num_valid`.
        num_top: how many of the best ids, at most `MAX_TOP` and `num_valid`.
        out: [N, 3 + 2 num_top] float64, contiguous, written: id, its log-probability and rank, the best
            log-probabilities, their ids.
        num_valid: ids from here on are padding of the embedding, and have no share in probabilities.

    Raises:
        ValueError: more positions than the work space holds, or more of the best ids than are offered.
    """
    count = len(rows)
    if count > len(work.every):
        raise ValueError(f"{count} positions at once, the work space is for {len(work.every)}")
    if num_top > min(MAX_TOP, num_valid):
        raise ValueError(f"num_top must be at most {min(MAX_TOP, num_valid)}, got {num_top}")
    if count == 0:
        return
    num_chunks = cdiv(num_valid, CHUNK)
    scanned = (logits, logits.stride(0), rows, tokens, work.group_max, work.chunk_max, work.chunk_sum, work.chunk_count)
    enqueue(
        scan, (count, num_chunks, 1), *scanned, num_valid, NUM_CHUNKS=num_chunks, CHUNK=CHUNK, GROUP=GROUP,
        num_warps=WARPS,
    )  # fmt: skip
    enqueue(
        finish, (count, 1, 1), *scanned, work.groups, work.values, work.ids, out, num_valid, num_top,
        NUM_CHUNKS=num_chunks, CHUNKS_PADDED=next_power_of_2(num_chunks),
        GROUPS_PADDED=max(MAX_TOP, next_power_of_2(num_chunks * (CHUNK // GROUP))), CHUNK=CHUNK, GROUP=GROUP,
        MAX_TOP=MAX_TOP, num_warps=WARPS,
    )  # fmt: skip

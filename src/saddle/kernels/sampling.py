# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Drawing token ids from logits without sorting the vocabulary: two launches for any number of rows.

    scan     [rows x chunks]   reads the logits once. Of each chunk: largest logit, sum of exponentials, and the best
                               id (greedy rows), or the best id with noise (rows that cut nothing); the largest logit
                               of each group of 32.
    choose   [rows]            greedy and uncut rows: best of the chunks. Rows with top_k, top_p or min_p: see below.

Among independent Gumbel noise g, argmax(logits / T + g) draws from softmax(logits / T), and restricted to a set it
draws from the softmax of that set. So only the set is needed. In the order (logit descending, id ascending), top_k,
top_p and min_p each keep a prefix: top_k the ids with fewer than k others in front of them, top_p those with less than
top_p of the mass in front of them.

    short way   The k-th largest group maximum bounds the k-th largest logit from below (k ids in different groups are
                at least as large). So a threshold that 64 to 96 groups reach, found by bisection over the bits of
                float32, leaves about as many candidates, among them any top_k up to 64 and the nucleus of most
                distributions. Each is compared with each: that counts and weighs what is in front of it. Where that
                is not enough, the same again with 1,024 to 1,536 groups.
    long way    A flat nucleus, or a larger top_k: see `_choose_in_row`, which reads the row two or three times.

Reference: `runner.truncation` and `runner.random`. Ties at the edge go to the lower id (there: as a sort leaves them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saddle.kernels.gumbel import gumbel, mix32
from saddle.kernels.launching import enqueue
from saddle.kernels.row_state import KEY_FIRST, KEY_SECOND, MIN_P, ROW_WIDTH, TEMPERATURE, TOP_K, TOP_P
from saddle.kernels.whole import cdiv, next_power_of_2

CHUNK = 4096  # logits a program of `scan` reads, and that a search through a whole row holds at once
GROUP = 32  # 128 bytes: a candidate group is one full memory access; of a vocabulary in one chunk each id is a group
FEW_GROUPS, MANY_GROUPS = 64, 1024  # at least so many groups stay, at most half as many again
CANDIDATES = 2048  # more are not compared with each other: 4 million comparisons take some 100 us
ROUND, STRIP = 256, 32  # compared at once: a tile of 8,192 is 32 numbers a thread
WARPS = 8


@triton.jit
def order_key(value):
    """int32 in the order of the float32 `value`."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float_column(row_state, column):
    return tl.load(row_state + column).to(tl.float32, bitcast=True)


@triton.jit
def _noise_keys(row_state, position):
    first = tl.load(row_state + KEY_FIRST).to(tl.uint32, bitcast=True)
    second = tl.load(row_state + KEY_SECOND).to(tl.uint32, bitcast=True)
    at = position.to(tl.uint32, bitcast=True)
    return mix32(first ^ at), mix32(second ^ at)


@triton.jit
def _is_cut(top_k, top_p, min_p, num_valid):
    return ((top_k > 0) & (top_k < num_valid)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def scan(
    logits, logits_stride, sample_rows, sample_positions, state, group_max, chunk_max, chunk_sum, chunk_best, chunk_id,
    num_valid, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, STATE_WIDTH: tl.constexpr,
):  # fmt: skip
    """See `Sampling.launch`; program (slot, chunk)."""
    slot, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(sample_rows + slot)
    if row >= 0:
        row_state = state + row * STATE_WIDTH
        temperature = _float_column(row_state, TEMPERATURE)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        value = tl.load(logits + slot * logits_stride + ids, mask=ids < num_valid, other=-float("inf"))
        at = slot * NUM_CHUNKS + chunk
        largest = tl.max(value, axis=0)
        if temperature == 0.0:
            tl.store(chunk_best + at, largest)
            tl.store(chunk_id + at, chunk * CHUNK + tl.argmax(value, axis=0))
        else:
            top_k = tl.load(row_state + TOP_K)
            if _is_cut(top_k, _float_column(row_state, TOP_P), _float_column(row_state, MIN_P), num_valid):
                groups = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
                best = tl.max(tl.reshape(value, [CHUNK // GROUP, GROUP]), axis=1)
                tl.store(group_max + slot * (NUM_CHUNKS * (CHUNK // GROUP)) + groups, best)
                # A chunk of which nothing may come has the sum 0, not exp(-inf + inf).
                base = tl.where(largest == -float("inf"), 0.0, largest)
                tl.store(chunk_max + at, largest)
                tl.store(chunk_sum + at, tl.sum(tl.exp((value - base) / temperature), axis=0))
            else:
                first, second = _noise_keys(row_state, tl.load(sample_positions + slot))
                noisy = value / temperature + gumbel(first, second, ids)
                tl.store(chunk_best + at, tl.max(noisy, axis=0))
                tl.store(chunk_id + at, chunk * CHUNK + tl.argmax(noisy, axis=0))


@triton.jit
def _middle(low, high):
    """floor((low + high) / 2) of int32 without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _group_floor(keys, floor, ceiling, least, most):
    """A key that `least` to `most` of `keys` reach; `floor` if no more than `most` are at or above it.

    floor is below all finite keys, ceiling above all. Ties may leave more than `most`: the caller counts.
    """
    low, high, found = floor, ceiling, floor
    if tl.sum((keys >= floor).to(tl.int32), axis=0) > most:
        while low + 1 < high:
            middle = _middle(low, high)
            count = tl.sum((keys >= middle).to(tl.int32), axis=0)
            if count < least:
                high = middle
            else:
                low = middle
                if count <= most:
                    high = middle
        found = low
    return found


@triton.jit
def _collect(
    row_logits, row_groups, groups_at, values_at, ids_at, num_valid, floor, ceiling, least, most,
    NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    MOST_GROUPS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Store all logits from a threshold up, and their ids, in the order of the ids.

    Returns the threshold and the number of candidates; more than CANDIDATES: there are more than fit.
    """
    groups = tl.arange(0, GROUPS_PADDED)
    group_keys = order_key(tl.load(row_groups + groups, mask=groups < NUM_GROUPS, other=-float("inf")))
    threshold = _group_floor(group_keys, floor, ceiling, least, most)
    selected = group_keys >= threshold
    place = tl.cumsum(selected.to(tl.int32), axis=0) - 1
    num_groups = tl.sum(selected.to(tl.int32), axis=0)
    num_found = CANDIDATES + 1
    if num_groups <= MOST_GROUPS:
        tl.store(groups_at + place, groups, mask=selected)
        tl.debug_barrier()  # other threads of this program read what was stored
        num_found = 0
        for start in range(0, num_groups * GROUP, TILE):
            index = start + tl.arange(0, TILE)
            inside = index < num_groups * GROUP
            ids = tl.load(groups_at + index // GROUP, mask=inside, other=0) * GROUP + index % GROUP
            value = tl.load(row_logits + ids, mask=inside & (ids < num_valid), other=-float("inf"))
            is_found = order_key(value) >= threshold
            behind = num_found + tl.cumsum(is_found.to(tl.int32), axis=0) - 1
            fits = is_found & (behind < CANDIDATES)
            tl.store(values_at + behind, value, mask=fits)
            tl.store(ids_at + behind, ids, mask=fits)
            num_found += tl.sum(is_found.to(tl.int32), axis=0)
        tl.debug_barrier()
    return threshold, num_found


@triton.jit
def _before(values_at, ids_at, num_found, value, ids, largest, temperature, STRIP: tl.constexpr):
    """Number and mass of the candidates in front of each of some of them."""
    count = tl.zeros([value.shape[0]], tl.float32)
    mass = tl.zeros([value.shape[0]], tl.float32)
    for start in range(0, num_found, STRIP):
        index = start + tl.arange(0, STRIP)
        other = tl.load(values_at + index, mask=index < num_found, other=-float("inf"))
        other_ids = tl.load(ids_at + index, mask=index < num_found, other=0)
        weight = tl.exp((other - largest) / temperature)
        is_before = other[None, :] > value[:, None]
        is_before = is_before | ((other[None, :] == value[:, None]) & (other_ids[None, :] < ids[:, None]))
        count += tl.sum(is_before.to(tl.float32), axis=1)
        mass += tl.sum(tl.where(is_before, weight[None, :], 0.0), axis=1)
    return count, mass


@triton.jit
def _draw(value, ids, kept, temperature, first, second):
    """Best noisy score of the kept ids, and its id."""
    noisy = tl.where(kept, value / temperature + gumbel(first, second, ids), -float("inf"))
    best = tl.argmax(noisy, axis=0)
    return tl.max(noisy, axis=0), tl.sum(tl.where(tl.arange(0, ids.shape[0]) == best, ids, 0), axis=0)


@triton.jit
def _limits(top_k, top_p, base):
    """An id is kept if fewer than so many, and less than so much mass, are in front of it."""
    infinite = float("inf")
    return tl.where(top_k > 0, top_k.to(tl.float32), infinite), tl.where(top_p < 1.0, top_p * base, infinite)


@triton.jit
def _choose_candidate(
    values_at, ids_at, num_found, top_k, top_p, least, largest, total, temperature, first, second,
    STRIP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The short way: every candidate is compared with every other. top_k is 0 where it is off."""
    base = total
    if (top_k > 0) & (top_p < 1.0):
        base = 0.0
        for start in range(0, num_found, ROUND):
            index = start + tl.arange(0, ROUND)
            value = tl.load(values_at + index, mask=index < num_found, other=-float("inf"))
            ids = tl.load(ids_at + index, mask=index < num_found, other=0)
            count, _ = _before(values_at, ids_at, num_found, value, ids, largest, temperature, STRIP)
            base += tl.sum(tl.where(count < top_k, tl.exp((value - largest) / temperature), 0.0), axis=0)
    most, most_mass = _limits(top_k, top_p, base)
    best = -float("inf")
    best_id = 0
    for start in range(0, num_found, ROUND):
        index = start + tl.arange(0, ROUND)
        value = tl.load(values_at + index, mask=index < num_found, other=-float("inf"))
        ids = tl.load(ids_at + index, mask=index < num_found, other=0)
        count, mass = _before(values_at, ids_at, num_found, value, ids, largest, temperature, STRIP)
        kept = (index < num_found) & (value / temperature >= least) & (count < most) & (mass < most_mass)
        score, token_id = _draw(value, ids, kept, temperature, first, second)
        if score > best:
            best = score
            best_id = token_id
    return best_id


@triton.jit
def _row_pass(
    row_logits, num_valid, key, token_id, least, largest, temperature, first, second, floor, CHUNK: tl.constexpr
):
    """Of the whole row's ids in front of (key, token_id): number, mass, and the one that draws best."""
    count = tl.zeros([CHUNK], tl.float32)
    mass = tl.zeros([CHUNK], tl.float32)
    best = -float("inf")
    best_id = -1
    for start in range(0, num_valid, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        value = tl.load(row_logits + ids, mask=ids < num_valid, other=-float("inf"))
        keys = order_key(value)
        is_before = (keys >= floor) & ((keys > key) | ((keys == key) & (ids < token_id)))
        count += is_before.to(tl.float32)
        mass += tl.where(is_before, tl.exp((value - largest) / temperature), 0.0)
        kept = is_before & (value / temperature >= least)
        score, found = _draw(value, ids, kept, temperature, first, second)
        if score > best:
            best = score
            best_id = found
    return tl.sum(count, axis=0), tl.sum(mass, axis=0), best_id


@triton.jit
def _row_top_k_mass(row_logits, num_valid, top_k, largest, temperature, floor, ceiling, CHUNK: tl.constexpr):
    """Mass of the row's `top_k` largest logits, by bisection."""
    low, high = floor - 1, ceiling
    above, mass = 0.0, 0.0
    while low + 1 < high:
        middle = _middle(low, high)
        counts = tl.zeros([CHUNK], tl.float32)
        masses = tl.zeros([CHUNK], tl.float32)
        for start in range(0, num_valid, CHUNK):
            ids = start + tl.arange(0, CHUNK)
            value = tl.load(row_logits + ids, mask=ids < num_valid, other=-float("inf"))
            is_above = order_key(value) > middle
            counts += is_above.to(tl.float32)
            masses += tl.where(is_above, tl.exp((value - largest) / temperature), 0.0)
        count = tl.sum(counts, axis=0)
        if count < top_k:
            high = middle
            above = count
            mass = tl.sum(masses, axis=0)
        else:
            low = middle
    return mass + (top_k - above) * tl.exp((_value_of(high) - largest) / temperature)


@triton.jit
def _choose_in_row(
    row_logits, num_valid, top_k, top_p, least, largest, total, temperature, first, second, floor, ceiling,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The long way: whoever draws best, if it is in the set; else whoever draws best among those in front of it.

    The set is a prefix of the order, so what lies behind a refused id is refused too. The mass that is left is at
    least halved by a refusal on average; a nucleus of 0.95 is hit at once with that probability.
    """
    base = total
    if (top_k > 0) & (top_p < 1.0):
        base = _row_top_k_mass(row_logits, num_valid, top_k, largest, temperature, floor, ceiling, CHUNK)
    most, most_mass = _limits(top_k, top_p, base)
    _, _, token_id = _row_pass(
        row_logits, num_valid, floor - 1, 0, least, largest, temperature, first, second, floor, CHUNK
    )
    is_refused = token_id >= 0
    while is_refused:
        key = order_key(tl.load(row_logits + token_id))
        count, mass, better_id = _row_pass(
            row_logits, num_valid, key, token_id, least, largest, temperature, first, second, floor, CHUNK
        )
        is_refused = ((count >= most) | (mass >= most_mass)) & (better_id >= 0)
        if is_refused:
            token_id = better_id
    return token_id


@triton.jit
def _choose_cut(
    row_logits, row_groups, groups_at, values_at, ids_at, num_valid, top_k, top_p, min_p, largest, total, temperature,
    first, second, NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    FEW_GROUPS: tl.constexpr, MANY_GROUPS: tl.constexpr, CANDIDATES: tl.constexpr, ROUND: tl.constexpr,
    STRIP: tl.constexpr,
):  # fmt: skip
    """A row with top_k, top_p or min_p."""
    floor = order_key(tl.full([], -float("inf"), tl.float32)) + 1
    ceiling = order_key(largest) + 1
    least = largest / temperature + tl.log(min_p)  # log(0) = -inf keeps all
    top_k = tl.where(top_k < num_valid, top_k, 0)
    wanted = tl.where(top_k > FEW_GROUPS, MANY_GROUPS, FEW_GROUPS)
    holds = False
    num_found = 0
    while (not holds) & (wanted <= MANY_GROUPS):
        threshold, num_found = _collect(
            row_logits, row_groups, groups_at, values_at, ids_at, num_valid, floor, ceiling, wanted,
            wanted + wanted // 2, NUM_GROUPS, GROUPS_PADDED, CHUNK, GROUP, MANY_GROUPS + MANY_GROUPS // 2, CANDIDATES,
        )  # fmt: skip
        # Everything that may come must be among the candidates.
        holds = (threshold == floor) | ((top_k > 0) & (top_k <= wanted))
        holds = holds | ((top_k == 0) & (min_p > 0.0) & (_value_of(threshold) / temperature <= least))
        if (not holds) & (top_k == 0) & (num_found <= CANDIDATES):
            index = tl.arange(0, CANDIDATES)
            value = tl.load(values_at + index, mask=index < num_found, other=-float("inf"))
            holds = tl.sum(tl.exp((value - largest) / temperature), axis=0) >= top_p * total
        holds = holds & (num_found <= CANDIDATES)
        wanted = tl.where(wanted == FEW_GROUPS, MANY_GROUPS, MANY_GROUPS + 1)
    if holds:
        token_id = _choose_candidate(
            values_at, ids_at, num_found, top_k, top_p, least, largest, total, temperature, first, second, STRIP, ROUND
        )
    else:
        token_id = _choose_in_row(
            row_logits, num_valid, top_k, top_p, least, largest, total, temperature, first, second, floor, ceiling,
            CHUNK,
        )  # fmt: skip
    return token_id


@triton.jit
def _value_of(key):
    """The float32 whose `order_key` this is."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def choose(
    logits, logits_stride, sample_rows, sample_positions, state, group_max, chunk_max, chunk_sum, chunk_best, chunk_id,
    groups_at, values_at, ids_at, token_ids, token_stride, out, num_valid, NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr, GROUPS_PADDED: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    FEW_GROUPS: tl.constexpr, MANY_GROUPS: tl.constexpr, CANDIDATES: tl.constexpr, ROUND: tl.constexpr,
    STRIP: tl.constexpr, STATE_WIDTH: tl.constexpr,
):  # fmt: skip
    """See `launch`; program (slot)."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(sample_rows + slot)
    if row >= 0:
        position = tl.load(sample_positions + slot)
        row_state = state + row * STATE_WIDTH
        temperature = _float_column(row_state, TEMPERATURE)
        top_k = tl.load(row_state + TOP_K)
        top_p, min_p = _float_column(row_state, TOP_P), _float_column(row_state, MIN_P)
        chunks = tl.arange(0, CHUNKS_PADDED)
        at = slot * NUM_CHUNKS + chunks
        if (temperature > 0.0) & _is_cut(top_k, top_p, min_p, num_valid):
            highest = tl.load(chunk_max + at, mask=chunks < NUM_CHUNKS, other=-float("inf"))
            sums = tl.load(chunk_sum + at, mask=chunks < NUM_CHUNKS, other=0.0)
            largest = tl.max(highest, axis=0)
            total = tl.sum(sums * tl.exp((highest - largest) / temperature), axis=0)
            first, second = _noise_keys(row_state, position)
            NUM_GROUPS: tl.constexpr = NUM_CHUNKS * (CHUNK // GROUP)
            token_id = _choose_cut(
                logits + slot * logits_stride, group_max + slot * NUM_GROUPS,
                groups_at + slot * (MANY_GROUPS + MANY_GROUPS // 2), values_at + slot * CANDIDATES,
                ids_at + slot * CANDIDATES, num_valid, top_k, top_p, min_p, largest, total, temperature, first, second,
                NUM_GROUPS, GROUPS_PADDED, CHUNK, GROUP, FEW_GROUPS, MANY_GROUPS, CANDIDATES, ROUND, STRIP,
            )  # fmt: skip
        else:
            scores = tl.load(chunk_best + at, mask=chunks < NUM_CHUNKS, other=-float("inf"))
            best = tl.argmax(scores, axis=0)
            token_id = tl.load(chunk_id + slot * NUM_CHUNKS + best)
        # Logits that are not numbers must not make an id that indexes past the embedding.
        token_id = tl.minimum(tl.maximum(token_id, 0), num_valid - 1)
        tl.store(token_ids + row.to(tl.int64) * token_stride + position, token_id)
        tl.store(out + slot, token_id)


@dataclass(frozen=True, slots=True)
class SamplingWork:
    """Work space of `launch` for up to `max_rows` rows; made once.

    group_max [rows, groups], chunk_max, chunk_sum, chunk_best [rows, chunks] float32; chunk_id [rows, chunks] int32;
    groups [rows, 1.5 MANY_GROUPS] int32, values [rows, CANDIDATES] float32, ids likewise int32: of candidates.
    """

    group_max: torch.Tensor
    chunk_max: torch.Tensor
    chunk_sum: torch.Tensor
    chunk_best: torch.Tensor
    chunk_id: torch.Tensor
    groups: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor

    @staticmethod
    def allocate(max_rows: int, vocab_size: int, device: torch.device) -> SamplingWork:
        chunks = cdiv(vocab_size, CHUNK)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows, width, dtype=dtype, device=device)

        return SamplingWork(
            group_max=empty(max(CHUNK, chunks * (CHUNK // GROUP)), torch.float32),
            chunk_max=empty(chunks, torch.float32),
            chunk_sum=empty(chunks, torch.float32),
            chunk_best=empty(chunks, torch.float32),
            chunk_id=empty(chunks, torch.int32),
            groups=empty(MANY_GROUPS + MANY_GROUPS // 2, torch.int32),
            values=empty(CANDIDATES, torch.float32),
            ids=empty(CANDIDATES, torch.int32),
        )

    @staticmethod
    def num_bytes(max_rows: int, vocab_size: int) -> int:
        """Of `allocate`."""
        chunks = -(-vocab_size // CHUNK)
        candidates = MANY_GROUPS + MANY_GROUPS // 2 + 2 * CANDIDATES
        return max_rows * 4 * (max(CHUNK, chunks * (CHUNK // GROUP)) + 4 * chunks + candidates)


def launch(
    logits: torch.Tensor, sample_rows: torch.Tensor, sample_positions: torch.Tensor, state: torch.Tensor,
    work: SamplingWork, token_ids: torch.Tensor, out: torch.Tensor, num_valid: int,
) -> None:  # fmt: skip
    """Draw one id for each slot, write it to its row and to `out`.

    Args:
        logits: [S, V] float32, edited already; rows may be strided.
        sample_rows: [S] int32, the row of each slot; -1 for a slot that only pads: nothing is drawn for it.
        sample_positions: [S] int32, the position that the new token takes.
        state: [num_rows, ROW_WIDTH] int32, see `row_state`.
        token_ids: [num_rows, max_len + 1] int32, all ids of all rows; written at (row, position).
        out: [S] int32; slots that pad keep what they had.
        num_valid: ids from here on are padding of the embedding.
    """
    num_slots = len(sample_rows)
    if num_slots == 0:
        return
    num_chunks = cdiv(num_valid, CHUNK)
    # Fewer groups than are asked for would make all ids of a small vocabulary candidates: 0.4 ms of comparisons.
    group = GROUP if num_chunks > 1 else 1
    enqueue(
        scan, (num_slots, num_chunks, 1),
        logits, logits.stride(0), sample_rows, sample_positions, state, work.group_max, work.chunk_max, work.chunk_sum,
        work.chunk_best, work.chunk_id, num_valid, NUM_CHUNKS=num_chunks, CHUNK=CHUNK, GROUP=group,
        STATE_WIDTH=ROW_WIDTH, num_warps=WARPS,
    )  # fmt: skip
    enqueue(
        choose, (num_slots, 1, 1),
        logits, logits.stride(0), sample_rows, sample_positions, state, work.group_max, work.chunk_max, work.chunk_sum,
        work.chunk_best, work.chunk_id, work.groups, work.values, work.ids, token_ids, token_ids.stride(0), out,
        num_valid, NUM_CHUNKS=num_chunks, CHUNKS_PADDED=next_power_of_2(num_chunks),
        GROUPS_PADDED=next_power_of_2(num_chunks * (CHUNK // group)), CHUNK=CHUNK, GROUP=group,
        FEW_GROUPS=FEW_GROUPS, MANY_GROUPS=MANY_GROUPS, CANDIDATES=CANDIDATES, ROUND=ROUND, STRIP=STRIP,
        STATE_WIDTH=ROW_WIDTH, num_warps=WARPS,
    )  # fmt: skip

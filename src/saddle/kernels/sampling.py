# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Drawing token ids from logits without sorting the vocabulary: two launches for any number of rows.

    scan     [rows x chunks]   reads the logits once. Of each chunk: largest logit, sum of exponentials, and the best
                               id (greedy rows), or the best id with noise (rows that cut nothing); the largest logit
                               of each group of 32.
    choose   [rows]            greedy and uncut rows: best of the chunks. Rows with top_k, top_p or min_p: see below.

Among independent Gumbel noise g, argmax(logits / T + g) draws from softmax(logits / T), and restricted to a set it
draws from the softmax of that set. So only the set is needed. In the order (logit descending, id ascending), top_k,
top_p and min_p each keep a prefix: top_k the ids with fewer than k others before them, top_p those with less than
top_p of the mass before them. Both are "sum of weights before < target", and the last kept logit is found by
bisection over the bits of float32, whose order is that of integers.

Where is that done? The k-th largest group maximum bounds the k-th largest logit from below (k ids in different groups
are at least as large). A threshold under which 64 to 128 groups stay gives at most 4,096 candidates, which are
gathered and kept in registers; they hold any top_k up to 64, and the nucleus of any distribution that is not flat.
Otherwise the same search reads the whole row, 4,096 logits at a time.

Reference: `runner.truncation` and `runner.random`. Ties at the edge go to the lower id (there: as a sort leaves them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saddle.kernels.gumbel import gumbel, mix32
from saddle.kernels.row_state import KEY_FIRST, KEY_SECOND, MIN_P, ROW_WIDTH, TEMPERATURE, TOP_K, TOP_P

CHUNK = 4096  # logits a program of `scan` reads, and that a search through a whole row holds at once
GROUP = 32  # a sector of 128 bytes: a candidate group is one full memory access
MAX_GROUPS = 128  # gathered at most: 128 x 32 logits are 16 a thread
MIN_GROUPS = 64  # hence the largest top_k of the short way
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
def _group_floor(keys, floor, ceiling, MIN_GROUPS: tl.constexpr, MAX_GROUPS: tl.constexpr):
    """A key that MIN_GROUPS to MAX_GROUPS of `keys` reach; `floor` if that many are not above it.

    floor is below all finite keys, ceiling above all. Ties may leave more than MAX_GROUPS: the caller counts.
    """
    low, high, found = floor, ceiling, floor
    if tl.sum((keys >= floor).to(tl.int32), axis=0) > MAX_GROUPS:
        while low + 1 < high:
            middle = _middle(low, high)
            count = tl.sum((keys >= middle).to(tl.int32), axis=0)
            if count < MIN_GROUPS:
                high = middle
            else:
                low = middle
                if count <= MAX_GROUPS:
                    high = middle
        found = low
    return found


@triton.jit
def _last_key(keys, weights, target, floor, ceiling):
    """The smallest key t with (sum of weights of keys above t) < target, and that sum.

    floor: below it nothing counts. ceiling: at least the largest key.
    """
    low, high = floor - 1, ceiling
    while low + 1 < high:
        middle = _middle(low, high)
        above = tl.sum(tl.where(keys > middle, weights, 0.0), axis=0)
        if above < target:
            high = middle
        else:
            low = middle
    return high, tl.sum(tl.where(keys > high, weights, 0.0), axis=0)


@triton.jit
def _last_id(is_tie, ids, count, num_ids):
    """The smallest id up to which `count` of the tied ids lie; num_ids if there are no more than that."""
    low, high = -1, num_ids
    if tl.sum(is_tie.to(tl.int32), axis=0) > count:
        while low + 1 < high:
            middle = _middle(low, high)
            if tl.sum((is_tie & (ids <= middle)).to(tl.int32), axis=0) >= count:
                high = middle
            else:
                low = middle
    return high


@triton.jit
def _prefix(keys, ids, kept, weights, target, unit, floor, ceiling, num_ids):
    """Of `kept`, the ids with less than `target` of weight before them.

    unit: what one more id of the last key weighs, by the key: 0 gives 1 (counts), else a mass (see the caller).
    """
    mine = tl.where(kept, weights, 0.0)
    last, above = _last_key(keys, mine, target, floor, ceiling)
    is_tie = kept & (keys == last)
    each = tl.max(tl.where(is_tie, unit, 0.0), axis=0)
    room = tl.minimum(tl.ceil((target - above) / tl.maximum(each, 1e-30)), 1e9).to(tl.int32)
    bound = _last_id(is_tie, ids, tl.maximum(room, 1), num_ids)
    return kept & ((keys > last) | (is_tie & (ids <= bound)))


@triton.jit
def _draw(value, ids, kept, temperature, first, second):
    """Best noisy score of the kept ids, and its id."""
    noisy = tl.where(kept, value / temperature + gumbel(first, second, ids), -float("inf"))
    best = tl.argmax(noisy, axis=0)
    return tl.max(noisy, axis=0), tl.sum(tl.where(tl.arange(0, ids.shape[0]) == best, ids, 0), axis=0)


@triton.jit
def _row_above(row_logits, num_valid, key, last_key, last_id, largest, temperature, CHUNK: tl.constexpr):
    """Count and mass, over the whole row, of ids above `key` that (last_key, last_id) keeps."""
    count = tl.zeros([CHUNK], tl.float32)
    mass = tl.zeros([CHUNK], tl.float32)
    for start in range(0, num_valid, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        value = tl.load(row_logits + ids, mask=ids < num_valid, other=-float("inf"))
        keys = order_key(value)
        kept = (keys > key) & ((keys > last_key) | ((keys == last_key) & (ids <= last_id)))
        count += kept.to(tl.float32)
        mass += tl.where(kept, tl.exp((value - largest) / temperature), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _row_ties(row_logits, num_valid, key, up_to, CHUNK: tl.constexpr):
    """How many ids up to `up_to` have this key."""
    count = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_valid, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        keys = order_key(tl.load(row_logits + ids, mask=ids < num_valid, other=-float("inf")))
        count += ((keys == key) & (ids <= up_to)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _row_prefix(
    row_logits, num_valid, target, BY_MASS: tl.constexpr, last_key, last_id, largest, temperature, floor, ceiling,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """`_prefix` over the whole row; takes and returns the last kept (key, id)."""
    low, high = tl.maximum(floor, last_key) - 1, ceiling
    while low + 1 < high:
        middle = _middle(low, high)
        count, mass = _row_above(row_logits, num_valid, middle, last_key, last_id, largest, temperature, CHUNK)
        above = mass if BY_MASS else count
        if above < target:
            high = middle
        else:
            low = middle
    count, mass = _row_above(row_logits, num_valid, high, last_key, last_id, largest, temperature, CHUNK)
    above = mass if BY_MASS else count
    each = 1.0
    if BY_MASS:
        bits = tl.where(high < 0, high ^ 0x7FFFFFFF, high)
        each = tl.exp((bits.to(tl.float32, bitcast=True) - largest) / temperature)
    room = tl.maximum(tl.minimum(tl.ceil((target - above) / tl.maximum(each, 1e-30)), 1e9).to(tl.int32), 1)
    bound = num_valid
    if high == last_key:
        bound = last_id
    if _row_ties(row_logits, num_valid, high, bound, CHUNK) > room:
        below = -1
        while below + 1 < bound:
            middle = _middle(below, bound)
            if _row_ties(row_logits, num_valid, high, middle, CHUNK) >= room:
                bound = middle
            else:
                below = middle
    return high, bound


@triton.jit
def _choose_in_row(
    row_logits, num_valid, top_k, top_p, least, largest, total, temperature, first, second, floor, ceiling,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The long way: every search reads the whole row."""
    last_key = floor
    last_id = num_valid
    base = total
    if (top_k > 0) & (top_k < num_valid):
        last_key, last_id = _row_prefix(
            row_logits, num_valid, top_k.to(tl.float32), False, last_key, last_id, largest, temperature, floor, ceiling,
            CHUNK,
        )  # fmt: skip
        _, base = _row_above(row_logits, num_valid, floor - 1, last_key, last_id, largest, temperature, CHUNK)
    if top_p < 1.0:
        last_key, last_id = _row_prefix(
            row_logits, num_valid, top_p * base, True, last_key, last_id, largest, temperature, floor, ceiling, CHUNK
        )
    best = -float("inf")
    best_id = 0
    for start in range(0, num_valid, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        value = tl.load(row_logits + ids, mask=ids < num_valid, other=-float("inf"))
        keys = order_key(value)
        kept = (keys > last_key) | ((keys == last_key) & (ids <= last_id))
        score, token_id = _draw(value, ids, kept & (value / temperature >= least), temperature, first, second)
        if score > best:
            best = score
            best_id = token_id
    return best_id


@triton.jit
def _choose_cut(
    row_logits, row_groups, row_scratch, num_valid, top_k, top_p, min_p, largest, total, temperature, first, second,
    NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    MIN_GROUPS: tl.constexpr, MAX_GROUPS: tl.constexpr,
):  # fmt: skip
    """A row with top_k, top_p or min_p."""
    floor = order_key(tl.full([], -float("inf"), tl.float32)) + 1
    ceiling = order_key(largest) + 1
    least = largest / temperature + tl.log(min_p)  # log(0) = -inf keeps all
    groups = tl.arange(0, GROUPS_PADDED)
    best = tl.load(row_groups + groups, mask=groups < NUM_GROUPS, other=-float("inf"))
    group_keys = order_key(best)
    threshold = _group_floor(group_keys, floor, ceiling, MIN_GROUPS, MAX_GROUPS)
    selected = group_keys >= threshold
    place = tl.cumsum(selected.to(tl.int32), axis=0) - 1
    num_groups = tl.sum(selected.to(tl.int32), axis=0)
    tl.store(row_scratch + place, groups, mask=selected & (place < MAX_GROUPS))
    tl.debug_barrier()  # other threads of this program read what was stored
    index = tl.arange(0, MAX_GROUPS * GROUP)
    group = tl.load(row_scratch + index // GROUP, mask=index // GROUP < num_groups, other=0)
    ids = group * GROUP + index % GROUP
    value = tl.load(
        row_logits + ids, mask=(index // GROUP < num_groups) & (ids < num_valid), other=-float("inf")
    )
    keys = order_key(value)
    kept = keys >= threshold
    mass = tl.where(kept, tl.exp((value - largest) / temperature), 0.0)
    is_whole = threshold == floor  # nothing finite was left out
    has_top_k = (top_k > 0) & (top_k < num_valid)
    # Everything that may come must be among the candidates, or the whole row has to be searched.
    holds = is_whole | (has_top_k & (top_k <= MIN_GROUPS))
    holds = holds | ((not has_top_k) & (top_p < 1.0) & (tl.sum(mass, axis=0) >= top_p * total))
    holds = holds | ((not has_top_k) & (min_p > 0.0) & (_value_of(threshold) / temperature <= least))
    if holds & (num_groups <= MAX_GROUPS):
        base = total
        if has_top_k:
            ones = tl.full([MAX_GROUPS * GROUP], 1.0, tl.float32)
            kept = _prefix(keys, ids, kept, ones, top_k.to(tl.float32), ones, threshold, ceiling, num_valid)
            base = tl.sum(tl.where(kept, mass, 0.0), axis=0)
        if top_p < 1.0:
            kept = _prefix(keys, ids, kept, mass, top_p * base, mass, threshold, ceiling, num_valid)
        _, token_id = _draw(value, ids, kept & (value / temperature >= least), temperature, first, second)
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
    scratch, token_ids, token_stride, out, num_valid, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, MIN_GROUPS: tl.constexpr,
    MAX_GROUPS: tl.constexpr, STATE_WIDTH: tl.constexpr,
):  # fmt: skip
    """See `Sampling.launch`; program (slot)."""
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
                logits + slot * logits_stride, group_max + slot * NUM_GROUPS, scratch + slot * MAX_GROUPS, num_valid,
                top_k, top_p, min_p, largest, total, temperature, first, second, NUM_GROUPS, GROUPS_PADDED, CHUNK,
                GROUP, MIN_GROUPS, MAX_GROUPS,
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

    group_max [rows, groups], chunk_max, chunk_sum, chunk_best [rows, chunks] float32; chunk_id [rows, chunks],
    scratch [rows, MAX_GROUPS] int32.
    """

    group_max: torch.Tensor
    chunk_max: torch.Tensor
    chunk_sum: torch.Tensor
    chunk_best: torch.Tensor
    chunk_id: torch.Tensor
    scratch: torch.Tensor

    @staticmethod
    def allocate(max_rows: int, vocab_size: int, device: torch.device) -> SamplingWork:
        chunks = triton.cdiv(vocab_size, CHUNK)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows, width, dtype=dtype, device=device)

        return SamplingWork(
            group_max=empty(chunks * (CHUNK // GROUP), torch.float32),
            chunk_max=empty(chunks, torch.float32),
            chunk_sum=empty(chunks, torch.float32),
            chunk_best=empty(chunks, torch.float32),
            chunk_id=empty(chunks, torch.int32),
            scratch=empty(MAX_GROUPS, torch.int32),
        )

    @staticmethod
    def num_bytes(max_rows: int, vocab_size: int) -> int:
        """Of `allocate`."""
        chunks = -(-vocab_size // CHUNK)
        return max_rows * 4 * (chunks * (CHUNK // GROUP) + 4 * chunks + MAX_GROUPS)


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
    num_chunks = triton.cdiv(num_valid, CHUNK)
    scan[(num_slots, num_chunks)](
        logits, logits.stride(0), sample_rows, sample_positions, state, work.group_max, work.chunk_max, work.chunk_sum,
        work.chunk_best, work.chunk_id, num_valid, NUM_CHUNKS=num_chunks, CHUNK=CHUNK, GROUP=GROUP,
        STATE_WIDTH=ROW_WIDTH, num_warps=WARPS,
    )  # fmt: skip
    choose[(num_slots,)](
        logits, logits.stride(0), sample_rows, sample_positions, state, work.group_max, work.chunk_max, work.chunk_sum,
        work.chunk_best, work.chunk_id, work.scratch, token_ids, token_ids.stride(0), out, num_valid,
        NUM_CHUNKS=num_chunks, CHUNKS_PADDED=triton.next_power_of_2(num_chunks),
        GROUPS_PADDED=triton.next_power_of_2(num_chunks * (CHUNK // GROUP)), CHUNK=CHUNK, GROUP=GROUP,
        MIN_GROUPS=MIN_GROUPS, MAX_GROUPS=MAX_GROUPS, STATE_WIDTH=ROW_WIDTH, num_warps=WARPS,
    )  # fmt: skip

"""Which part of every tensor a rank holds: pure arithmetic, no devices.

TP shards heads, expert widths and the vocabulary; EP gives a rank whole experts; DP repeats the attention part. The
width of an expert is 1,536 in M2: at TP8 a rank holds 192 columns, one and a half of the checkpoint's 128-wide scale
blocks. So the granularity of the scales is a field: the largest power of two that divides the slice's ends, and the
checkpoint's scales are repeated to it. Nothing is padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from saddle.errors import StartupError

MIN_GRANULARITY = 16
VOCAB_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slice:
    """Half-open range of rows or columns."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Slice:
        """The same part, in units that are `factor` times finer (heads -> columns)."""
        return Slice(self.start * factor, self.stop * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """One rank's place among tp * dp ranks; ranks of a tensor-parallel group are neighbours.

    tp    ranks that share every layer
    dp    groups of them, each with its own requests
    ep    ranks that the experts are dealt to, whole: 1 (experts are cut by tp instead) or tp * dp
    rank  this rank, 0 to tp * dp - 1

    Raises:
        StartupError: on construction, if there is no such rank or ep is neither.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.tp < 1 or self.dp < 1:
            raise StartupError(f"Parallel sizes must be at least 1, got tp {self.tp}, dp {self.dp}.")
        if not 0 <= self.rank < self.world:
            raise StartupError(f"Rank {self.rank} does not exist: tp {self.tp} x dp {self.dp} = {self.world} ranks.")
        if self.ep not in (1, self.world):
            raise StartupError(f"Experts are dealt to 1 or to all {self.world} ranks, got ep {self.ep}.")

    @property
    def world(self) -> int:
        return self.tp * self.dp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    def _even(self, total: int, what: str) -> Slice:
        if total % self.tp:
            fits = ", ".join(str(n) for n in range(1, min(total, 64) + 1) if total % n == 0)
            raise StartupError(f"--tensor-parallel-size {self.tp} does not divide {total} {what}; {fits} would.")
        size = total // self.tp
        return Slice(self.tp_rank * size, (self.tp_rank + 1) * size)

    def query_heads(self, num_heads: int) -> Slice:
        return self._even(num_heads, "query heads")

    def kv_heads(self, num_kv_heads: int) -> Slice:
        """With more ranks than KV heads, neighbouring ranks hold the same head."""
        if self.tp <= num_kv_heads:
            return self._even(num_kv_heads, "KV heads")
        if self.tp % num_kv_heads:
            raise StartupError(f"--tensor-parallel-size {self.tp} is no multiple of {num_kv_heads} KV heads.")
        head = self.tp_rank // (self.tp // num_kv_heads)
        return Slice(head, head + 1)

    def experts(self, num_experts: int) -> Slice:
        """Experts whose weights this rank holds; with EP their numbers differ by one at most."""
        if self.ep > num_experts:
            raise StartupError(f"{self.ep} ranks cannot share {num_experts} experts; at most {num_experts} can.")
        rank = self.rank if self.ep > 1 else 0
        return Slice(num_experts * rank // self.ep, num_experts * (rank + 1) // self.ep)

    def expert_width(self, width: int) -> Slice:
        """Columns of w1 and w3, rows of w2, that this rank holds of each of its experts."""
        return Slice(0, width) if self.ep > 1 else self._even(width, "columns of an expert")

    def vocabulary(self, size: int) -> Slice:
        """Rows of embedding and head, dealt in multiples of 64: the last ranks may hold fewer."""
        if self.tp == 1:
            return Slice(0, size)
        per_rank = -(-size // (self.tp * VOCAB_ALIGNMENT)) * VOCAB_ALIGNMENT
        return Slice(min(self.tp_rank * per_rank, size), min((self.tp_rank + 1) * per_rank, size))


def scale_granularity(part: Slice, block: int) -> int:
    """Rows or columns that share a scale in a slice of a weight with one scale every `block`: 128, 64 at TP8, 32
    at TP16.

    Raises:
        StartupError: the slice begins or ends where not even 16 would fit.
    """
    found = math.gcd(block, part.start, part.stop)
    if found < min(block, MIN_GRANULARITY):
        raise StartupError(f"A slice from {part.start} to {part.stop} cuts scales of {block} into pieces of {found}; "
                           f"{MIN_GRANULARITY} is the least. Use fewer tensor-parallel ranks.")  # fmt: skip
    return found

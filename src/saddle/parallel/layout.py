"""Which part of every tensor a rank holds: pure arithmetic, no devices.

TP shards heads, expert widths and the vocabulary; EP gives a rank whole experts. The width of an expert is 1,536
in M2: at TP8 a rank holds 192 rows, one and a half of the checkpoint's 128-row scale blocks. So the granularity of
the scales is a field: the largest power of two up to 128 that divides the slice, and the checkpoint's scales are
repeated to it. Nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

from saddle.errors import StartupError

SCALE_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Slice:
    """Half-open range of rows or columns."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """One rank's place.

    tp      ranks that share every layer
    tp_rank this rank among them
    expert_parallel   experts are dealt whole to the tp ranks instead of being cut
    """

    tp: int = 1
    tp_rank: int = 0
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        if self.tp < 1 or not 0 <= self.tp_rank < self.tp:
            raise StartupError(f"Tensor-parallel rank {self.tp_rank} of {self.tp} does not exist.")

    def _even(self, total: int, what: str) -> Slice:
        if total % self.tp:
            fits = [n for n in (1, 2, 4, 8, 16) if total % n == 0]
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
        return self._even(num_experts, "experts") if self.expert_parallel else Slice(0, num_experts)

    def expert_width(self, width: int) -> Slice:
        return Slice(0, width) if self.expert_parallel else self._even(width, "columns of an expert")

    def vocabulary(self, size: int) -> Slice:
        """The last rank may hold less; rows are dealt in multiples of 64."""
        per_rank = -(-size // self.tp)
        per_rank = -(-per_rank // 64) * 64 if self.tp > 1 else size
        return Slice(min(self.tp_rank * per_rank, size), min((self.tp_rank + 1) * per_rank, size))


def scale_granularity(size: int, block: int = SCALE_BLOCK) -> int:
    """Rows or columns that share a scale in a slice of `size`: 128, 64 at TP8, 32 at TP16.

    Raises:
        StartupError: not even 16 divides the slice.
    """
    while size % block:
        block //= 2
        if block < 16:
            raise StartupError(f"A slice of {size} is not a multiple of 16, so its scales cannot be cut.")
    return block

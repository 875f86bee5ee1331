"""CUDA graphs of decode steps: one of the forward pass and one of plain sampling for each number of rows.

A graph replays launches with the addresses that they were captured with, so inputs, work space, KV memory and logits
are static. A step takes the smallest graph that holds its rows; the rest of it is padding, which touches nothing. All
graphs share one memory pool: they run one after the other.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch


class DecodeGraphs:
    """Graphs of two launches, by size.

    Args:
        sizes: rows, ascending; empty: no graphs.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self._forward: dict[int, torch.cuda.CUDAGraph] = {}
        self._sample: dict[int, torch.cuda.CUDAGraph] = {}

    def size_for(self, num_rows: int) -> int:
        """The smallest size that holds `num_rows`; 0 if there is none, or it is not captured yet."""
        index = bisect.bisect_left(self.sizes, num_rows)
        size = self.sizes[index] if index < len(self.sizes) else 0
        return size if size in self._sample else 0

    def capture(
        self, forward: Callable[[int], object], sample: Callable[[int], object], on_size: Callable[[int, int], None]
    ) -> None:
        """Capture all sizes, the largest first: smaller ones then fit into its memory.

        Args:
            forward, sample: enqueue the two launches of a size; called twice, the first time to compile.
            on_size: told how many sizes are done, and of how many.
        """
        pool = None
        for done, size in enumerate(reversed(self.sizes)):
            on_size(done, len(self.sizes))
            for launch, graphs in ((forward, self._forward), (sample, self._sample)):
                launch(size)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    launch(size)
                pool = graph.pool()
                graphs[size] = graph

    def forward(self, size: int) -> None:
        """Replay the forward pass of `size` rows."""
        self._forward[size].replay()

    def sample(self, size: int) -> None:
        """Replay the plain sampling of `size` rows."""
        self._sample[size].replay()

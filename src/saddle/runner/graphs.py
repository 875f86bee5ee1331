"""CUDA graphs of steps, captured at start: whole decode steps by rows, the pieces of steps with prompts by tokens.

A graph replays launches with the addresses that they were captured with, so inputs, work space, KV memory and logits
are static. A step takes the smallest graph that holds it; the rest of it is padding, which touches nothing. All
graphs share one memory pool: they run one after the other.

A decode step is two graphs, its forward pass and plain sampling. In a step with prompts the grids of attention depend
on the rows, and its launches stay launches; what lies between those of two layers depends on the number of tokens
alone, and is a graph.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

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
        self.pool: Any = None

    def size_for(self, num_rows: int) -> int:
        """The smallest size that holds `num_rows`; 0 if there is none, or it is not captured yet."""
        size = _next(self.sizes, num_rows)
        return size if size in self._sample else 0

    def capture(
        self, forward: Callable[[int], object], sample: Callable[[int], object], on_size: Callable[[int, int], None]
    ) -> None:
        """Capture all sizes, the largest first: smaller ones then fit into its memory.

        Args:
            forward, sample: enqueue the two launches of a size; called twice, the first time to compile.
            on_size: told how many sizes are done, and of how many.
        """
        for done, size in enumerate(reversed(self.sizes)):
            on_size(done, len(self.sizes))
            for launch, graphs in ((forward, self._forward), (sample, self._sample)):
                launch(size)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    launch(size)
                self.pool = graph.pool()
                graphs[size] = graph

    def forward(self, size: int) -> None:
        """Replay the forward pass of `size` rows."""
        self._forward[size].replay()

    def sample(self, size: int) -> None:
        """Replay the plain sampling of `size` rows."""
        self._sample[size].replay()


class PieceGraphs:
    """Graphs of a step's pieces, by size.

    Args:
        sizes: tokens, ascending; empty: no graphs.
        num_pieces: of a step.
    """

    def __init__(self, sizes: tuple[int, ...], num_pieces: int) -> None:
        self.sizes, self.num_pieces = sizes, num_pieces
        self._pieces: dict[int, list[torch.cuda.CUDAGraph]] = {}

    def size_for(self, num_tokens: int) -> int:
        """The smallest size that holds `num_tokens`; 0 if there is none, or it is not captured yet."""
        size = _next(self.sizes, num_tokens)
        return size if size in self._pieces else 0

    def capture(
        self, launch: Callable[[int, int], object], pool: Any, on_size: Callable[[int, int], None]
    ) -> None:
        """Capture all sizes.

        Args:
            launch: enqueues a piece of a size; a size's pieces are first called in order, to compile.
            pool: of other graphs; None: a new one.
            on_size: told how many sizes are done, and of how many.
        """
        for done, size in enumerate(reversed(self.sizes)):
            on_size(done, len(self.sizes))
            for number in range(self.num_pieces):
                launch(size, number)
            torch.cuda.synchronize()
            graphs = self._pieces[size] = []
            # `torch.cuda.graph` collects garbage before each capture, which takes longer than all of these together.
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                for number in range(self.num_pieces):
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=pool)
                    try:
                        launch(size, number)
                    finally:
                        graph.capture_end()
                    pool = graph.pool()
                    graphs.append(graph)

    def replay(self, size: int, number: int) -> None:
        """Replay a piece of a step of `size` tokens."""
        self._pieces[size][number].replay()


def _next(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest of ascending sizes that is at least `wanted`; 0: there is none."""
    index = bisect.bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else 0

"""What a GPU holds beside the tensors that are counted one by one, known before KV memory takes the rest.

Too little here and the last allocation of a start fails; too much is KV memory that nobody gets. Every number was
measured as the growth of the device's used memory (docs/LOG.md, "Memory of a start, step by step"); `Beside` is never
under what was measured, and at most 0.4 % of the card above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 1 << 20
# The CUDA context with the kernels that a start loads into it: 623 MiB on an H100 with CUDA 13.
CONTEXT_BYTES = 640 * MIB
# More than this outside of torch is another process's, not the context.
MOST_CONTEXT_BYTES = 1024 * MIB
# Kernels that are loaded after it was looked at, and what rounding adds to tensors that are still to be allocated.
MARGIN_BYTES = 48 * MIB
# The first graph makes the driver's memory for all of them; then each is its nodes, by layer: 0.4 MiB with 16 layers,
# 1.3 with 62, where a quarter of the sizes are one node. A piece of a layer is a graph too.
GRAPHS_BYTES, GRAPH_LAYER_BYTES, PIECE_BYTES = 72 * MIB, 32 << 10, 160 << 10
# Log-probabilities of a prompt: hidden states of all its tokens, and for more best ids than the kernels give 16
# positions at a time through torch: logits, their softmax, what is sorted and its ids.
SORTED_POSITIONS, SORTED_BYTES = 16, 36


@dataclass(frozen=True, slots=True)
class Beside:
    """Bytes beside weights, work space and KV memory."""

    context: int
    graphs: int
    temporaries: int

    @property
    def num_bytes(self) -> int:
        return self.context + self.graphs + self.temporaries + MARGIN_BYTES


def beside(
    *, outside_bytes: int | None, num_layers: int, hidden_size: int, vocab_size: int, max_tokens: int,
    num_graphs: int, num_piece_sizes: int,
) -> Beside:  # fmt: skip
    """What a start will take.

    Args:
        outside_bytes: used now and not torch's, by `outside_of_torch`; None where there is no GPU.
        max_tokens: of a step.
        num_graphs, num_piece_sizes: sizes of decode steps, and of steps with prompts, that are captured.
    """
    context = CONTEXT_BYTES
    if outside_bytes is not None and outside_bytes <= MOST_CONTEXT_BYTES:
        context = max(context, outside_bytes)
    pieces = PIECE_BYTES * (num_layers + 1) * num_piece_sizes
    graphs = (GRAPHS_BYTES + GRAPH_LAYER_BYTES * num_layers * num_graphs if num_graphs else 0) + pieces
    temporaries = 2 * max_tokens * hidden_size + SORTED_POSITIONS * SORTED_BYTES * vocab_size
    return Beside(context, graphs, temporaries)


def outside_of_torch(device: torch.device) -> int | None:
    """Bytes of the device that are used and not by torch's allocator, other processes' included; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def held_by_torch(device: torch.device) -> int:
    """Bytes that torch's allocator holds for live tensors: memory comes in pieces of 2 and of 20 MiB, and what is left
    of one counts. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved(device))

"""Reading memory and nothing else: the rate that decode kernels are measured against.

A step of few rows must read its weights once; how fast the card reads is measured in the same run, with a kernel that
does only that. A copy would not do: a stream of reads alone is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192  # int32 numbers a program reads at once: 32 KB
ROUNDS = 8  # blocks a program reads


@triton.jit
def _read_kernel(source, out, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[program] = exclusive or of ROUNDS * BLOCK numbers."""
    program = tl.program_id(0).to(tl.int64)
    place = source + program * BLOCK * ROUNDS + tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for index in tl.range(0, ROUNDS, num_stages=4):
        found ^= tl.load(place + index * BLOCK, eviction_policy="evict_first")
    tl.store(out + program, tl.xor_sum(found, 0))


def num_programs(source: torch.Tensor) -> int:
    """Programs that read `source`; a rest of less than 256 KB stays unread."""
    return source.numel() * source.element_size() // (4 * BLOCK * ROUNDS)


def read(source: torch.Tensor, out: torch.Tensor) -> int:
    """Read a contiguous tensor whole.

    Args:
        out: [>= num_programs(source)] int32, written, so that nothing is optimised away.

    Returns:
        Bytes read.
    """
    count = num_programs(source)
    _read_kernel[(count,)](source.view(-1).view(torch.int32), out, BLOCK, ROUNDS, num_warps=8)
    return count * BLOCK * ROUNDS * 4


def reference(source: torch.Tensor) -> torch.Tensor:
    """What `read` writes: [num_programs] int32."""
    parts = source.view(-1).view(torch.int32)[: num_programs(source) * BLOCK * ROUNDS].view(-1, BLOCK * ROUNDS)
    while parts.shape[1] > 1:
        parts = parts[:, ::2] ^ parts[:, 1::2]
    return parts[:, 0]

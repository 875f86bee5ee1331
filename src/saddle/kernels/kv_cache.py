"""Writing to and reading from paged KV memory.

One layer's memory is [num_blocks, 2 (k, v), kv_heads, block_size, D]. Seen as rows of D numbers, the key of head h at
slot s = block * block_size + offset is row ((block * 2 + 0) * kv_heads + h) * block_size + offset, its value
kv_heads * block_size rows later. Seen as chunks of block_size * D numbers, the keys of head h in a block are chunk
(block * 2 + 0) * kv_heads + h, its values kv_heads chunks later. Where a step writes and reads is the same in every
layer, so the indices are worked out once a step.
"""

from __future__ import annotations

import torch


def slot_rows(slots: torch.Tensor, kv_heads: int, block_size: int) -> torch.Tensor:
    """Rows where T tokens put their keys (all heads), then their values: [T * 2 * kv_heads] int64.

    Args:
        slots: [T] int64, all different.
    """
    blocks = torch.div(slots, block_size, rounding_mode="floor")
    heads = torch.arange(2 * kv_heads, device=slots.device)
    # (block * 2 * kv_heads + head) * block_size + (slot - block * block_size)
    first = slots + blocks * ((2 * kv_heads - 1) * block_size)
    return (first[:, None] + heads * block_size).flatten()


def write(kv: torch.Tensor, rows: torch.Tensor, keys_values: torch.Tensor) -> None:
    """Store keys and values of T tokens.

    Args:
        kv: one layer.
        rows: from `slot_rows`.
        keys_values: [T, 2 * kv_heads, D], the keys of all heads, then the values.
    """
    dim = kv.shape[-1]
    kv.view(-1, dim).index_copy_(0, rows, keys_values.reshape(-1, dim).to(kv.dtype))


def block_chunks(block_tables: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Chunks that hold the keys of R sequences, then those of their values: [2, R, kv_heads, num_blocks] int64.

    Args:
        block_tables: [R, num_blocks] int64.
    """
    heads = torch.arange(2 * kv_heads, device=block_tables.device).view(2, 1, kv_heads, 1)
    return block_tables[None, :, None, :] * (2 * kv_heads) + heads


def gather(kv: torch.Tensor, chunks: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [R, kv_heads, num_blocks * block_size, D], copied side by side.

    Args:
        kv: one layer.
        chunks: [2, R, kv_heads, num_blocks] from `block_chunks`, contiguous.
        out: 1-D scratch memory of the dtype of kv, large enough; the result lies in it.
    """
    block_size, dim = kv.shape[-2:]
    flat = out[: chunks.numel() * block_size * dim].view(-1, block_size * dim)
    torch.index_select(kv.view(-1, block_size * dim), 0, chunks.view(-1), out=flat)
    keys, values = flat.view(2, chunks.shape[1], chunks.shape[2], -1, dim).unbind(0)
    return keys, values

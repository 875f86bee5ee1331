"""Writing to and reading from paged KV memory.

One layer's memory is [num_blocks, 2 (k, v), kv_heads, block_size, D]. Seen as rows of D numbers, the key of head h at
slot s = block * block_size + offset is row ((block * 2 + 0) * kv_heads + h) * block_size + offset, its value
kv_heads * block_size rows later.
"""

from __future__ import annotations

import torch


def write(kv: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store keys and values of T tokens.

    Args:
        kv: [num_blocks, 2, kv_heads, block_size, D], one layer.
        slots: [T] int64, all different.
        k, v: [T, kv_heads, D].
    """
    block_size = kv.shape[3]
    blocks, offsets = slots // block_size, slots % block_size
    kv[blocks, 0, :, offsets] = k.to(kv.dtype)
    kv[blocks, 1, :, offsets] = v.to(kv.dtype)


def row_index(block_tables: torch.Tensor, num_positions: int, kv_heads: int, block_size: int) -> torch.Tensor:
    """Rows that hold the keys of R sequences, then those that hold their values: [2, R, kv_heads, num_positions].

    Args:
        block_tables: [R, num_blocks] int64; covers `num_positions` tokens.
    """
    positions = torch.arange(num_positions, device=block_tables.device)
    blocks = block_tables.index_select(1, positions // block_size)  # [R, S]
    heads = torch.arange(kv_heads, device=block_tables.device)
    keys = ((blocks * 2)[:, None, :] * kv_heads + heads[:, None]) * block_size + positions % block_size
    return torch.stack((keys, keys + kv_heads * block_size))


def gather(kv: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [R, kv_heads, S, D] of the rows that `row_index` gave."""
    found = kv.view(-1, kv.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, kv.shape[-1])
    return found[0], found[1]

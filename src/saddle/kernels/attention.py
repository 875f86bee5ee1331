"""Causal attention over paged KV, grouped by the shape of the work.

A step's rows are of two kinds. Rows with one new token (decoding) are padded to a common context and computed
together, the query heads of a KV head taking the place of query positions: one gather and one attention for all of
them. Rows with more tokens (a prompt) are computed one by one. What to gather is the same in every layer, so it is
worked out once a step (`AttentionPlan`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from saddle.kernels import kv_cache

# Decoding rows are padded together as long as the padding does not double the work.
MAX_PADDED_SHARE = 2.0


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that one attention call computes.

    tokens   [N] int64: the step's tokens of these rows; N is R for decoding rows
    rows     [2, R, kv_heads, S] from `kv_cache.row_index`
    mask     True where a query may look: [R, 1, 1, S] when decoding, [1, 1, N, S] in a prompt; None: all of it
    decodes  one token a row
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor | None
    decodes: bool


AttentionPlan = list[Group]


def plan(
    block_tables: torch.Tensor,
    query_starts: list[int],
    bounds: list[tuple[int, int]],
    kv_heads: int,
    block_size: int,
) -> AttentionPlan:
    """Group the rows of a step.

    Args:
        block_tables: [R, max_blocks] int64.
        query_starts: first token of each row.
        bounds: (query length, context length) of each row, exact.
    """
    device = block_tables.device
    groups: AttentionPlan = []
    decoding = sorted((row for row, (length, _) in enumerate(bounds) if length == 1), key=lambda row: bounds[row][1])
    for members in _split(decoding, [bounds[row][1] for row in decoding]):
        contexts = [bounds[row][1] for row in members]
        longest = contexts[-1]
        tables = block_tables if members == list(range(len(bounds))) else block_tables[members]
        tokens = torch.tensor([query_starts[row] for row in members], device=device)
        mask = None
        if contexts[0] != longest:
            ends = torch.tensor(contexts, device=device)
            mask = (torch.arange(longest, device=device) < ends[:, None])[:, None, None, :]
        groups.append(Group(tokens, kv_cache.row_index(tables, longest, kv_heads, block_size), mask, True))
    for row, (length, context) in enumerate(bounds):
        if length > 1:
            tokens = torch.arange(query_starts[row], query_starts[row] + length, device=device)
            last = torch.arange(context - length, context, device=device)
            mask = (torch.arange(context, device=device) <= last[:, None])[None, None]
            index = kv_cache.row_index(block_tables[row : row + 1], context, kv_heads, block_size)
            groups.append(Group(tokens, index, mask, False))
    return groups


def _split(rows: list[int], contexts: list[int]) -> list[list[int]]:
    """Cut rows sorted by context where padding to the longest one would waste too much."""
    groups: list[list[int]] = []
    total = 0
    for row, context in zip(rows, contexts, strict=True):
        size = len(groups[-1]) if groups else 0
        if size and (size + 1) * context <= MAX_PADDED_SHARE * (total + context):
            groups[-1].append(row)
            total += context
        else:
            groups.append([row])
            total = context
    return groups


def attend(q: torch.Tensor, kv: torch.Tensor, groups: AttentionPlan) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for every token of a step.

    Args:
        q: [T, heads, D], rotated.
        kv: [num_blocks, 2, kv_heads, block_size, D], one layer; this step's keys and values are in it.

    Returns:
        [T, heads * D].
    """
    num_tokens, heads, dim = q.shape
    kv_heads = kv.shape[2]
    out = torch.empty_like(q)
    for group in groups:
        keys, values = kv_cache.gather(kv, group.rows)
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        mine = q.index_select(0, group.tokens)
        if group.decodes:
            mine = mine.view(-1, kv_heads, heads // kv_heads, dim)
            found = F.scaled_dot_product_attention(mine, keys, values, attn_mask=group.mask)
            out[group.tokens] = found.reshape(-1, heads, dim)
        else:
            mine = mine.transpose(0, 1)[None]  # [1, heads, N, D]
            found = F.scaled_dot_product_attention(mine, keys, values, attn_mask=group.mask, enable_gqa=True)
            out[group.tokens] = found[0].transpose(0, 1)
    return out.view(num_tokens, heads * dim)

"""Causal attention over paged KV, grouped by the shape of the work.

A step's rows are of two kinds. Rows with one new token (decoding) are sorted by context and computed a few at a
time, padded to a common number of blocks, the query heads of a KV head taking the place of query positions. Rows
with more tokens (a prompt) are computed one by one, a bounded number of queries at a time. The plan is the same in
every layer, so it is worked out once a step.

Blocks are read whole: what lies behind a row's context is masked, and has to be finite (memory starts as zeros).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from saddle.kernels import kv_cache

# Numbers that decoding rows of one group may gather together. A CPU reads them again from its second-level cache:
# measured with 16 rows of 190 tokens, groups of 0.8 MB take 0.7 of the time of one group of 3 MB.
GROUP_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}
# Scores per head that a prompt's queries may have at once: bounds the mask, 64 MB.
MAX_SCORES = 1 << 24


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """R rows with one new token each, computed together.

    chunks   [2, R, kv_heads, num_blocks] from `kv_cache.block_chunks`
    mask     [R, 1, 1, S], added to the scores
    """

    chunks: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Tokens `start` to `stop` of the step, all of one row.

    chunks   [2, 1, kv_heads, num_blocks] from `kv_cache.block_chunks`; None: those of the group before
    mask     [1, 1, N, S], added to the scores; None: a whole prompt, masked by the usual triangle
    """

    start: int
    stop: int
    chunks: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The groups of a step.

    decode_tokens   [R] int64, tokens of the rows of all decode groups; None: all tokens of the step, in order
    num_gathered    numbers that the largest group gathers
    """

    decode_tokens: torch.Tensor | None
    decodes: list[DecodeGroup]
    prompts: list[PromptGroup]
    num_gathered: int


def plan(
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    positions: torch.Tensor,
    bounds: list[tuple[int, int]],
    kv: torch.Tensor,
    dtype: torch.dtype,
) -> AttentionPlan:
    """Group the rows of a step.

    Args:
        block_tables: [R, max_blocks] int64.
        context_lens: [R]; positions: [T].
        bounds: (query length, upper bound of the context length) of each row.
        kv: all layers or one, for its shape.
        dtype: of the masks.
    """
    kv_heads, block_size, dim = kv.shape[-3:]
    per_block = 2 * kv_heads * block_size * dim
    rows = sorted((row for row, (length, _) in enumerate(bounds) if length == 1), key=lambda row: bounds[row][1])
    tokens, decodes = None, []
    if rows:
        tables, lens = block_tables, context_lens
        if rows != list(range(len(bounds))):
            starts = list(accumulate((length for length, _ in bounds), initial=0))
            order, tokens = torch.tensor([rows, [starts[row] for row in rows]], device=positions.device).unbind(0)
            tables, lens = block_tables.index_select(0, order), context_lens.index_select(0, order)
        blocks = [-(-bounds[row][1] // block_size) for row in rows]
        budget = GROUP_NUMBERS["cpu" if positions.device.type == "cpu" else "cuda"] // per_block
        decodes = _decode_groups(tables, lens, blocks, budget, kv_heads, block_size, dtype)
    prompts, start, widest = [], 0, 0
    for row, (length, context) in enumerate(bounds):
        if length > 1:
            table = block_tables[row : row + 1, : -(-context // block_size)]
            chunks = kv_cache.block_chunks(table, kv_heads).contiguous()
            whole = length == context  # nothing was computed before, and the bound is exact
            prompts += _prompt_groups(chunks, positions, start, start + length, block_size, None if whole else dtype)
            widest = max(widest, chunks.numel())
        start += length
    widest = max([widest, *(group.chunks.numel() for group in decodes)])
    return AttentionPlan(tokens, decodes, prompts, widest * block_size * dim)


def _decode_groups(
    tables: torch.Tensor,
    lens: torch.Tensor,
    blocks: list[int],
    budget: int,
    kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
) -> list[DecodeGroup]:
    """Cut rows that are sorted by `blocks` where a group would gather more than `budget` blocks."""
    sizes: list[int] = []
    for count in blocks:
        if sizes and (sizes[-1] + 1) * count <= budget:
            sizes[-1] += 1
        else:
            sizes.append(1)
    chunks = kv_cache.block_chunks(tables[:, : blocks[-1]], kv_heads)
    behind = torch.arange(blocks[-1] * block_size, device=lens.device) >= lens[:, None]
    mask = torch.zeros(behind.shape, dtype=dtype, device=lens.device).masked_fill_(behind, -torch.inf)[:, None, None]
    groups, start = [], 0
    for size in sizes:
        stop = start + size
        mine = chunks[:, start:stop, :, : blocks[stop - 1]].contiguous()
        groups.append(DecodeGroup(mine, mask[start:stop, ..., : blocks[stop - 1] * block_size]))
        start = stop
    return groups


def _prompt_groups(
    chunks: torch.Tensor, positions: torch.Tensor, start: int, stop: int, block_size: int, dtype: torch.dtype | None
) -> list[PromptGroup]:
    """Cut the tokens of a prompt where their mask would be too large; dtype None: no mask."""
    if dtype is None:
        return [PromptGroup(start, stop, chunks, None)]
    num_keys = chunks.shape[-1] * block_size
    step = max(1, MAX_SCORES // num_keys)
    keys = torch.arange(num_keys, device=chunks.device)
    groups = []
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        ahead = keys > positions[begin:end, None]
        mask = torch.zeros(ahead.shape, dtype=dtype, device=chunks.device).masked_fill_(ahead, -torch.inf)
        groups.append(PromptGroup(begin, end, chunks if begin == start else None, mask[None, None]))
    return groups


def attend(q: torch.Tensor, kv: torch.Tensor, work: AttentionPlan) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for every token of a step.

    Args:
        q: [T, heads, D], rotated; may be a slice of heads.
        kv: [num_blocks, 2, kv_heads, block_size, D], one layer; this step's keys and values are in it.

    Returns:
        [T, heads * D], contiguous.
    """
    num_tokens, heads, dim = q.shape
    kv_heads = kv.shape[2]
    grouped = q.view(num_tokens, kv_heads, heads // kv_heads, dim)
    scratch = torch.empty(work.num_gathered, dtype=kv.dtype, device=kv.device)
    if work.decodes and work.decode_tokens is None:
        return _attend_decodes(grouped, kv, work.decodes, scratch).reshape(num_tokens, heads * dim)
    out = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    if work.decode_tokens is not None:
        mine = grouped.index_select(0, work.decode_tokens)
        out.index_copy_(0, work.decode_tokens, _attend_decodes(mine, kv, work.decodes, scratch))
    for group in work.prompts:
        if group.chunks is not None:
            keys, values = (found[0].to(q.dtype) for found in kv_cache.gather(kv, group.chunks, scratch))
        part = slice(group.start, group.stop)
        out[part] = _attend_prompt(grouped[part], keys, values, group.mask)
    return out.view(num_tokens, heads * dim)


def _attend_decodes(
    q: torch.Tensor, kv: torch.Tensor, groups: list[DecodeGroup], scratch: torch.Tensor
) -> torch.Tensor:
    """Attention of decoding rows: q [R, kv_heads, G, D] in the order of the groups -> like q."""
    found, start = [], 0
    for group in groups:
        stop = start + group.mask.shape[0]
        keys, values = (one.to(q.dtype) for one in kv_cache.gather(kv, group.chunks, scratch))
        found.append(F.scaled_dot_product_attention(q[start:stop], keys, values, attn_mask=group.mask))
        start = stop
    return found[0] if len(found) == 1 else torch.cat(found)


def _attend_prompt(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one prompt: q [N, kv_heads, G, D], keys and values [kv_heads, S, D] -> like q."""
    num_queries, _, per_head, _ = q.shape
    if mask is None:
        keys, values = keys[:, :num_queries], values[:, :num_queries]
    found = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        keys[:, None].expand(-1, per_head, -1, -1),
        values[:, None].expand(-1, per_head, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
    )
    return found.permute(2, 0, 1, 3)

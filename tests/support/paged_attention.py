"""A step over paged KV written out in float32, for the tests of the attention kernels on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saddle.kernels.norm_rope import rotary_table
from saddle.kernels.paged_kv import BLOCK_SIZE, HEAD_DIM, KVLayer, read_tokens, write_tokens

EPS = 1e-6


@dataclass
class Case:
    """Rows with `new` tokens each at the end of contexts of `lens` tokens (0: a row that only pads), in blocks drawn
    at random; what lies behind a context is NaN where the memory can hold it."""

    heads: int
    kv_heads: int
    lens: list[int]
    new: list[int]
    kv: KVLayer
    block_tables: torch.Tensor
    row_ids: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    qkv: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; NaN never compares as small."""
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm().clamp_min(1e-30))


def make_case(
    lens: list[int], new: list[int] | None = None, *, heads: int = 48, kv_heads: int = 8, kind: str = "bf16",
    device: str = "cpu", seed: int = 0, spread: float = 1.0, static: tuple[float, float] = (0.25, 1.25),
) -> Case:  # fmt: skip
    """Draw a step. kind: "bf16", "fp16", "fp8" (with the static scales of keys and values) or "fp8_dynamic".
    spread: of keys and values; queries shrink by as much, so that scores stay as they are.
    Triton's interpreter multiplies bfloat16 matrices wrongly: on a CPU the kernels are tested with fp16."""
    maker = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=maker, device=device)

    new = new or [1 if length else 0 for length in lens]
    padded = [max(count, 1) for count in new]
    blocks = [-(-length // BLOCK_SIZE) for length in lens]
    num_blocks = sum(blocks) + 1
    order = torch.randperm(num_blocks, generator=maker, device=device).tolist()
    data = torch.full((num_blocks, 2, kv_heads, BLOCK_SIZE, HEAD_DIM), float("nan"), device=device)
    data = data.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float8_e4m3fn))
    scales = None
    if kind == "fp8_dynamic":
        scales = torch.full((num_blocks, 2, kv_heads, BLOCK_SIZE), float("nan"), device=device)
    kv = KVLayer(data, scales, *(static if kind == "fp8" else (1.0, 1.0)))
    row_ids = torch.randperm(len(lens) + 3, generator=maker, device=device)[: len(lens)].int()
    tables = torch.full((len(lens) + 3, max(blocks) + 2), num_blocks + 10_000_000, dtype=torch.int32, device=device)
    positions, slots = [], []
    for row, (length, count, pad) in enumerate(zip(lens, new, padded, strict=True)):
        mine = torch.tensor([order.pop() for _ in range(blocks[row])], dtype=torch.int32, device=device)
        tables[int(row_ids[row]), : len(mine)] = mine
        every = torch.arange(length, device=device)
        row_slots = mine[every // BLOCK_SIZE].long() * BLOCK_SIZE + every % BLOCK_SIZE
        old = row_slots[: length - count]
        if len(old):
            shape = (len(old), kv_heads, HEAD_DIM)
            write_tokens(kv, old, normal(*shape) * spread, normal(*shape) * spread)
        positions += every[length - count :].tolist() or [-1] * pad
        slots += row_slots[length - count :].tolist() or [-1] * pad
    width = (heads + 2 * kv_heads) * HEAD_DIM
    qkv = normal(len(positions), width) * 3
    qkv[:, (heads + kv_heads) * HEAD_DIM :] *= spread / 3
    cos, sin = rotary_table(64, 5e6, max([*lens, 1]), torch.float32, torch.device(device))
    starts = torch.tensor([0, *padded], device=device).cumsum(0).int()
    return Case(
        heads, kv_heads, lens, new, kv, tables, row_ids, torch.tensor(lens, dtype=torch.int32, device=device), starts,
        torch.tensor(positions, dtype=torch.int32, device=device), torch.tensor(slots, device=device),
        qkv.bfloat16(), (0.5 + torch.rand(heads * HEAD_DIM, generator=maker, device=device)) / spread,
        (0.5 + torch.rand(kv_heads * HEAD_DIM, generator=maker, device=device)) * spread, cos, sin,
    )  # fmt: skip


def normed_rotated(case: Case, numbers: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """QK-norm over the whole width and rotary embedding: [T, width] -> [T, heads, 128] float32."""
    wide = numbers.float()
    wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    wide = wide.view(len(wide), -1, HEAD_DIM)
    places = case.positions.clamp_min(0).long()
    cos, sin = case.cos[places][:, None], case.sin[places][:, None]
    first, second = wide[..., :32], wide[..., 32:64]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned, wide[..., 64:]), -1)


def split(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [T, heads or kv_heads, 128] float32 of a step's new tokens, normalised and rotated."""
    q_width, kv_width = case.heads * HEAD_DIM, case.kv_heads * HEAD_DIM
    q = normed_rotated(case, case.qkv[:, :q_width], case.q_norm)
    k = normed_rotated(case, case.qkv[:, q_width : q_width + kv_width], case.k_norm)
    v = case.qkv[:, q_width + kv_width :].float().view(-1, case.kv_heads, HEAD_DIM)
    return q, k, v


def old_tokens(case: Case, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in memory before the step, [length - new, kv_heads, 128] float32."""
    every = torch.arange(case.lens[row] - case.new[row], device=case.qkv.device)
    blocks = case.block_tables[int(case.row_ids[row])][every // BLOCK_SIZE].long()
    return read_tokens(case.kv, blocks * BLOCK_SIZE + every % BLOCK_SIZE)


def reference(case: Case) -> torch.Tensor:
    """Attention output [T, heads * 128] float32 of the step; zeros for tokens that only pad. Call it before a kernel
    writes the new keys and values: those are used unrounded."""
    q, k, v = split(case)
    out = torch.zeros(case.num_tokens, case.heads, HEAD_DIM, device=q.device)
    group = case.heads // case.kv_heads
    for row, (length, count) in enumerate(zip(case.lens, case.new, strict=True)):
        if length == 0:
            continue
        start = int(case.query_starts[row])
        mine = slice(start, start + count)
        old_k, old_v = old_tokens(case, row)
        keys, values = torch.cat((old_k, k[mine])), torch.cat((old_v, v[mine]))
        ahead = torch.arange(length, device=q.device) > case.positions[mine, None]
        for head in range(case.kv_heads):
            heads = slice(head * group, (head + 1) * group)
            scores = torch.einsum("tgd,sd->gts", q[mine, heads], keys[:, head]) * HEAD_DIM**-0.5
            weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
            out[mine, heads] = torch.einsum("gts,sd->tgd", weights, values[:, head])
    return out.flatten(1)

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""How keys and values lie in a GPU's paged memory, for every kernel that reads or writes them.

One layer is [num_blocks, 2 (k, v), kv_heads, 64 tokens, 128]. A token's 128 numbers are cut into chunks of 16 bytes (8
bf16 or 16 FP8 numbers), and chunk c of the token at offset t of its block lies at place c ^ (t % 8): eight tokens'
equal chunks then fall into different banks of shared memory, so a kernel may copy a block as it is and read it with
ldmatrix or 16-byte loads. A warp still reads whole lines.

FP8 numbers are e4m3 (value = number * scale). Their scale is static, one for a layer's keys and one for its values,
or dynamic, one per token and head: largest magnitude / 448. Static scales clip what is larger than 448 * scale and
lose what is smaller than 2^-9 * scale; dynamic ones do neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK_SIZE = 64
HEAD_DIM = 128
CHUNK_BYTES = 16
# What kernels are told about scales.
UNSCALED, STATIC, DYNAMIC = 0, 1, 2
# Smaller magnitudes get this scale: 1 / scale stays finite in float32.
SMALLEST = 1e-10


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's paged memory.

    data     [num_blocks, 2, kv_heads, 64, 128] bfloat16 or float8 e4m3
    scales   [num_blocks, 2, kv_heads, 64] float32 of dynamic FP8, else None
    k_scale, v_scale   of static FP8
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self) -> None:
        shape = self.data.shape
        if len(shape) != 5 or shape[1] != 2 or shape[3:] != (BLOCK_SIZE, HEAD_DIM) or not self.data.is_contiguous():
            raise ValueError(f"KV memory must be contiguous [blocks, 2, heads, 64, 128], not {tuple(shape)}")
        if self.scales is not None and (self.scales.shape != shape[:4] or self.data.element_size() != 1):
            raise ValueError("dynamic scales belong to FP8 memory, one for each of its tokens and heads")

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[2]

    @property
    def scale_kind(self) -> int:
        if self.data.element_size() != 1:
            return UNSCALED
        return STATIC if self.scales is None else DYNAMIC


def swizzle(tokens: torch.Tensor, chunks: int) -> torch.Tensor:
    """Place of each logical number: [N, 128] int64 for tokens at the offsets [N] of their blocks."""
    index = torch.arange(HEAD_DIM, device=tokens.device)
    length = HEAD_DIM // chunks
    return ((index // length) ^ (tokens[:, None] % 8)) * length + index % length


def write_tokens(kv: KVLayer, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Torch reference of storing keys and values [N, kv_heads, 128] at slots [N] (block * 64 + offset)."""
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    places = swizzle(offsets, HEAD_DIM * kv.data.element_size() // CHUNK_BYTES)
    for which, numbers, static in ((0, keys, kv.k_scale), (1, values, kv.v_scale)):
        wide = numbers.float()
        if kv.scale_kind != UNSCALED:
            largest = torch.finfo(kv.data.dtype).max
            scale = torch.full(wide.shape[:2], static, device=wide.device)
            if kv.scales is not None:
                scale = wide.abs().amax(-1).clamp_min(SMALLEST) / largest
                kv.scales[blocks, which, :, offsets] = scale
            wide = (wide / scale[..., None]).clamp(-largest, largest)
        placed = torch.empty_like(wide).scatter_(-1, places[:, None].expand_as(wide), wide)
        kv.data[blocks, which, :, offsets] = placed.to(kv.data.dtype)


def read_tokens(kv: KVLayer, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch reference of reading: keys and values [N, kv_heads, 128] float32 at slots [N]."""
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    places = swizzle(offsets, HEAD_DIM * kv.data.element_size() // CHUNK_BYTES)
    found = []
    for which, static in ((0, kv.k_scale), (1, kv.v_scale)):
        stored = kv.data[blocks, which, :, offsets].float()
        wide = stored.gather(-1, places[:, None].expand_as(stored))
        if kv.scale_kind != UNSCALED:
            wide = wide * (static if kv.scales is None else kv.scales[blocks, which, :, offsets][..., None])
        found.append(wide)
    return found[0], found[1]


@triton.jit
def swizzled(tokens, columns, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets [N, M] of `columns` [M] of tokens at offsets [N] of one block; WIDTH columns a token, CHUNK in 16 bytes.

    `columns` must be runs of at least CHUNK adjacent numbers that start at multiples of CHUNK: the hints promise it,
    and make loads and stores 16 bytes wide.
    """
    places = ((columns // CHUNK)[None, :] ^ (tokens % 8)[:, None]) * CHUNK + (columns % CHUNK)[None, :]
    offsets = tokens[:, None] * WIDTH + places
    return tl.max_contiguous(tl.multiple_of(offsets, (1, CHUNK)), (1, CHUNK))

"""What the fused model writes between its kernels: allocated once, for the largest step, and counted for the planner.

    x              residual, the whole step
    h              normalised input of qkv, later that of w1 and w3
    attn           attention's output, input of the o projection
    qkv, q, .., o_parts | active    two groups in one memory: the experts begin when the first group is dead
    pairs          the experts' outputs, until the next layer's norm adds them
    hidden, logits rows that sample

Steps get views of exactly T rows. No kernel writes the padding rows of `attn` and `pairs`, but some read them: these
start as zeros and share memory with nothing, so that what earlier steps left there is finite in either dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from saddle.kernels import experts, linear, quant, tiles
from saddle.kernels.paged_decode import DecodeWork
from saddle.kernels.paged_prefill import PrefillWork
from saddle.kernels.quant import Activation
from saddle.kernels.router import RouterWork
from saddle.kernels.target import Target
from saddle.kernels.tiles import Fp8Tiles, TileFormat
from saddle.model.config import ModelConfig
from saddle.model.packed import Formats

ALIGNMENT = 256
MAX_VIEWS = 64  # steps whose views are kept: those of graphs and some others


@dataclass(frozen=True, slots=True)
class Buffers:
    """Views for a step of T tokens; H hidden, k experts a token, I expert width.

    x        [T, H] float32
    h, h2    [T, H], inputs of qkv and of w1 and w3
    qkv      [T, q + 2 kv] bfloat16
    q        [T, q] bfloat16
    attn     [T, q]
    squares, factors   [T, heads], [T] float32: of queries that the product of qkv has turned
    o_parts  [splits, T, H] float32; None for many tokens, whose product adds to x
    active   [T * k, I]
    pairs    [T * k, H] float32 or bfloat16, weighted outputs of a token's experts
    sums     `pairs` as [k, T, H], as the next norm adds them
    norms    [H / 128, T] float32, sums of squares of x, for the norm's factor that qkv takes over; None for many tokens
    """

    x: torch.Tensor
    h: Activation
    h2: Activation
    qkv: torch.Tensor
    q: torch.Tensor
    attn: Activation
    squares: torch.Tensor
    factors: torch.Tensor
    o_parts: torch.Tensor | None
    active: Activation
    pairs: torch.Tensor
    sums: torch.Tensor
    norms: torch.Tensor | None


class _Arena:
    """Tensors one after the other in given bytes; without bytes, only their sum."""

    def __init__(self, memory: torch.Tensor | None) -> None:
        self._memory = memory
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        start = self.used
        self.used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._memory[start : start + num_bytes].view(dtype).view(shape)


class Workspace:
    """Buffers of one rank's steps.

    Args:
        tokens, rows: the largest step; every row may sample.
        device: "meta" only counts.
    """

    def __init__(
        self,
        config: ModelConfig,
        kinds: Formats,
        target: Target,
        tokens: int,
        rows: int,
        device: torch.device,
    ) -> None:
        self._config, self._kinds, self._target = config, kinds, target
        # For the split of its product alone: shapes decide it.
        self._o = tiles.allocate(config.hidden_size, config.q_width, kinds.o, "meta")
        hidden = config.hidden_size

        def activation(width: int, kind: TileFormat) -> Activation:
            return quant.allocate(tokens, width, self._input_dtype(kind), device)

        self._x = torch.zeros(tokens, hidden, device=device)
        self._norms = torch.zeros(hidden // quant.GROUP * min(tokens, linear.MAX_FEW_TOKENS), device=device)
        self._h = activation(hidden, kinds.qkv)
        same = self._input_dtype(kinds.qkv) == self._input_dtype(kinds.w13)
        self._h2 = self._h if same else activation(hidden, kinds.w13)
        self._attn = activation(config.q_width, kinds.o)
        # Small steps split more: the largest step need not be the one that takes most.
        steps = {tokens, *(1 << power for power in range(tokens.bit_length()))}
        needed = [max(arena.used for arena in self._lay_out(step, None, None)[:2]) for step in steps]
        self._arena = torch.zeros(max(needed), dtype=torch.uint8, device=device)
        needed = [self._lay_out(step, None, None)[2].used for step in steps]
        self._pairs = torch.zeros(max(needed), dtype=torch.uint8, device=device)
        self.router = RouterWork.allocate(tokens, hidden, config.num_experts, config.num_experts_per_tok, device)
        self.decode = DecodeWork.allocate(rows, config.num_kv_heads, target, device)
        self.prefill = PrefillWork.allocate(target, device)
        self._views: dict[int, Buffers] = {}
        self.hidden = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=device)
        self.logits = torch.zeros(rows, config.vocab_size, device=device)

    @property
    def num_bytes(self) -> int:
        shared = 0 if self._h2 is self._h else self._h2.num_bytes
        plain = sum(one.numel() * one.element_size() for one in
                    (self._x, self._norms, self._arena, self._pairs, self.hidden, self.logits))  # fmt: skip
        work = self.router.num_bytes + self.decode.num_bytes + self.prefill.num_bytes
        return plain + shared + self._h.num_bytes + self._attn.num_bytes + work

    def buffers(self, num_tokens: int) -> Buffers:
        """Views for a step."""
        found = self._views.get(num_tokens)
        if found is None:
            if len(self._views) == MAX_VIEWS:
                self._views.clear()
            found = self._views[num_tokens] = self._make_views(num_tokens)
        return found

    def _make_views(self, num_tokens: int) -> Buffers:
        rows = slice(0, num_tokens)
        *_, qkv, q, squares, factors, o_parts, active, pairs = self._lay_out(num_tokens, self._arena, self._pairs)
        top_k = self._config.num_experts_per_tok
        sums = pairs.view(num_tokens, top_k, -1).transpose(0, 1)
        norms = None
        if num_tokens <= linear.MAX_FEW_TOKENS:
            norms = self._norms[: self._config.hidden_size // quant.GROUP * num_tokens].view(-1, num_tokens)
        return Buffers(self._x[rows], self._h[rows], self._h2[rows], qkv, q, self._attn[rows], squares, factors,
                       o_parts, active, pairs, sums, norms)  # fmt: skip

    def _lay_out(
        self, tokens: int, memory: torch.Tensor | None, pair_memory: torch.Tensor | None
    ) -> tuple[
        _Arena, _Arena, _Arena, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Activation,
        torch.Tensor,
    ]:  # fmt: skip
        """Both groups that share `memory`, and the pairs, laid out for a step."""
        config, first, second, third = self._config, _Arena(memory), _Arena(memory), _Arena(pair_memory)
        qkv = first.take((tokens, config.q_width + 2 * config.kv_width), torch.bfloat16)
        q = first.take((tokens, config.q_width), torch.bfloat16)
        squares = first.take((tokens, config.num_heads), torch.float32)
        factors = first.take((tokens,), torch.float32)
        o_parts = None
        if tokens <= linear.MAX_FEW_TOKENS:
            splits = linear.split_k(tokens, self._o, self._target)
            o_parts = first.take((splits, tokens, config.hidden_size), torch.float32)
        pairs, width = tokens * config.num_experts_per_tok, config.intermediate_size
        kind = self._input_dtype(self._kinds.w2)
        scale = None
        if kind != torch.bfloat16:
            scale = second.take((pairs, width // quant.GROUP), torch.float32)
        active = Activation(second.take((pairs, width), kind), scale)
        dtype = experts.pair_dtype(tokens, config.num_experts, config.num_experts_per_tok)
        outputs = third.take((pairs, config.hidden_size), dtype)
        return first, second, third, qkv, q, squares, factors, o_parts, active, outputs

    def _input_dtype(self, tile_format: TileFormat) -> torch.dtype:
        """What a matrix in these tiles multiplies: FP8 where weights and matrix units are, else bf16."""
        fp8 = isinstance(tile_format, Fp8Tiles) and self._target.has_fp8_dot
        return self._target.fp8_dtype if fp8 else torch.bfloat16

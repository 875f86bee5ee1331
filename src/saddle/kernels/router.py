# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Routing in two launches: residual, norm, logits, top-k, each expert's list of tokens, and the experts' input in FP8.

    x += sum of parts;  h = x / sqrt(mean(x^2) + eps) * weight;  s = sigmoid(h Wg^T) in float32
    E = top-k of s + bias, ties to the lower id;  w = s[E] / sum(s[E])

The first kernel multiplies slices of the hidden size by the gate before the norm is known: the logits are linear in
x, so 1 / rms joins in the second one. Products are as exact as float32 ones, but several of float16 or bf16: a rounded
logit would choose other experts. The second kernel, one program a token, selects, lists and quantises.

With many tokens all of it is one launch on sm_90 (`gate`), behind a product that has added its sums to x. Elsewhere
the norm is a kernel of its own, the gate is cut into bf16 parts once for all programs, and, for experts' kernels that
want units, a last kernel puts these in the order of experts, so that an expert's units find its weights in the cache.

A *pair* is token * top_k + j, the j-th expert of a token; its row in everything the experts write. A *unit* is
expert | tile << 16: up to `unit_tokens` pairs of one expert, of its list's tile-th stretch. Rows with position -1 pad
a batch: they enter no list. The order within a list depends on timing; no result does, because pairs are computed
each on its own. The math is that of `moe.route`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from saddle.kernels import fused_norm
from saddle.kernels.gate import LayerGate, many_logits, max_rows, num_flags
from saddle.kernels.launching import enqueue
from saddle.kernels.quant import Activation
from saddle.kernels.target import Target
from saddle.kernels.tile_dot import begin, launch_options, quantised, release
from saddle.kernels.whole import cdiv, next_power_of_2

# Up to here, and to so many pairs an expert (M2 has 8 then), the experts' kernels have the weights as the product's
# rows, see `experts`. They read them again for every 16 pairs: with 16 experts as wide as M2's they took 1.0 times as
# long as wgmma at 8 pairs an expert, 1.2 at 16, 2.0 at 32 and 5.1 at 128 (H100).
MAX_FEW_TOKENS, MAX_FEW_PAIRS = 256, 8
# Up to here the first kernel adds the parts of each slice, and the second one norms; above, one kernel does both.
MAX_FUSED_TOKENS = 128
MANY_BLOCK = 128
MANY_PROGRAMS = 132
FEW_UNIT_TOKENS = 16
MANY_UNIT_TOKENS = 128


@triton.jit
def _two_parts(values, AXIS: tl.constexpr):
    """High and low float16 part of values times a power of two for each group along AXIS, and what undoes that.

    The group's largest lies in [2^14, 2^15) then: both parts together keep 22 bits of it, and as many of all that is
    not below 2^-28 of it. Of the four products of parts that of the low ones is left out; so a sum is off by some 2^-22
    of its largest terms, as one of float32 products is.
    """
    exponent = (tl.max(tl.abs(values), AXIS).to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = tl.minimum(268 - exponent, 253)
    scaled = values * tl.expand_dims((power << 23).to(tl.float32, bitcast=True), AXIS)
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    return high, low, tl.expand_dims(((254 - power) << 23).to(tl.float32, bitcast=True), AXIS)


@triton.jit(do_not_specialize=["num_tokens", "part_stride", "part_token_stride"])
def _few_logits_kernel(
    x, parts, part_stride, part_token_stride, weight, gate, x_out, logits, squares, counts, num_tokens,
    NUM_PARTS: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, SLICE: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, COUNTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A slice of SLICE columns: x_out = x + parts, logits [slices, T, EXPERTS] and squares [slices, T] shares."""
    part = tl.program_id(0)
    expert_block = tl.program_id(1)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    column = part * SLICE + tl.arange(0, SLICE)
    expert = expert_block * BE + tl.arange(0, BE)
    real = expert < EXPERTS
    inside = (row < num_tokens)[:, None] & (column >= 0)[None, :]
    # No kernel writes these two: loaded and cut into parts before the wait.
    gain = tl.load(weight + column)
    rows = tl.load(gate + column[:, None] * EXPERTS + expert[None, :], mask=real[None, :], other=0.0)
    gate_high, gate_low, gate_unit = _two_parts(rows * gain[:, None], 0)
    begin(PDL)
    if (part == 0) & (expert_block == 0) & (tl.program_id(2) == 0):
        counter = tl.arange(0, COUNTERS)
        tl.store(counts + counter, tl.zeros([COUNTERS], tl.int32))
    place = row[:, None] * WIDTH + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0)
    for j in tl.static_range(NUM_PARTS):
        at = parts + j * part_stride + row[:, None] * part_token_stride + column[None, :]
        values += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    release(PDL)
    at = part * num_tokens + row
    if expert_block == 0:
        tl.store(x_out + place, values, mask=inside)
        tl.store(squares + at, tl.sum(values * values, 1), mask=row < num_tokens)
    high, low, unit = _two_parts(values, 1)
    total = tl.dot(high, gate_high, tl.dot(high, gate_low, tl.dot(low, gate_high))) * (unit * gate_unit)
    tl.store(logits + at[:, None] * EXPERTS + expert[None, :], total, mask=(row < num_tokens)[:, None] & real[None, :])


@triton.jit
def _mixed(value):
    """lowbias32, the 32-bit finaliser of `runner.random`."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def _uniform_ids(position, token_id, layer, choice, EXPERTS: tl.constexpr):
    """Distinct expert ids by a hash of where a token is: an odd step through a power of two visits each once."""
    seed = layer.to(tl.uint32) * 0x9E3779B1
    seed = seed ^ (position.to(tl.uint32) * 0x85EBCA6B) ^ (token_id.to(tl.uint32) * 0xC2B2AE35)
    start = _mixed(seed)
    step = ((_mixed(start) >> 1) & 127) * 2 + 1
    return ((start + choice.to(tl.uint32) * step) % EXPERTS).to(tl.int32)


@triton.jit
def _top_k(scores, keys, expert, choice, TOP_K: tl.constexpr):
    """Ids [len(choice)] of the TOP_K largest keys, equal ones in the order of ids."""
    bits = keys.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    ranked = (ordered << 16) | (0xFFFF - expert).to(tl.int64)
    chosen = tl.zeros_like(choice)
    for j in tl.static_range(TOP_K):
        best = tl.max(ranked, 0)
        ranked = tl.where(ranked == best, -0x7FFFFFFFFFFFFFFF, ranked)
        chosen = tl.where(choice == j, (0xFFFF - (best & 0xFFFF)).to(tl.int32), chosen)
    return chosen


@triton.jit
def _inverse_rms(
    squares, token, num_tokens, eps, WIDTH: tl.constexpr, SLICES: tl.constexpr, SLICES_PADDED: tl.constexpr
):  # fmt: skip
    """1 / rms of a token from the sums of squares of its slices."""
    part = tl.arange(0, SLICES_PADDED)
    square = tl.load(squares + part * num_tokens + token, mask=part < SLICES, other=0.0)
    return tl.rsqrt(tl.sum(square, 0) / WIDTH + eps)


@triton.jit
def _choose(
    logits, squares, bias, positions, token_ids, layer, eps, ids, weights, counts, lists, units, token, num_tokens,
    capacity, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr,
    CHOICES: tl.constexpr, SLICES: tl.constexpr, SLICES_PADDED: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
    UNIFORM: tl.constexpr, LISTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ids, weights and lists of one token."""
    expert = tl.arange(0, EXPERTS_PADDED)
    choice = tl.arange(0, CHOICES)
    real = expert < EXPERTS
    picked = choice < TOP_K
    offset = tl.load(bias + expert, mask=real, other=0.0)
    begin(PDL)
    position = tl.load(positions + token)
    inverse = _inverse_rms(squares, token, num_tokens, eps, WIDTH, SLICES, SLICES_PADDED)
    # Several rows at a time and every turn unrolled: all loads are under way before the first sum.
    row = tl.arange(0, ROWS)[:, None]
    shares = tl.zeros([ROWS, EXPERTS_PADDED], tl.float32)
    for j in tl.static_range(0, SLICES_PADDED, ROWS):
        at = logits + ((j + row) * num_tokens + token) * EXPERTS + expert[None, :]
        shares += tl.load(at, mask=(j + row < SLICES) & real[None, :], other=0.0)
    found = tl.sum(shares, 0)
    release(PDL)
    scores = tl.sigmoid(found * inverse)
    if UNIFORM:
        chosen = _uniform_ids(position, tl.load(token_ids + token), layer, choice, EXPERTS)
    else:
        chosen = _top_k(scores, tl.where(real, scores + offset, float("-inf")), expert, choice, TOP_K)
    pair = token * TOP_K + choice
    if LISTS > 0:
        listed = picked & (choice * 0 + position >= 0)
        place = tl.atomic_add(counts + chosen, 1, mask=listed, sem="relaxed")
        tl.store(lists + chosen * capacity + place, pair, mask=listed)
        if LISTS == 1:
            first = listed & (place % UNIT == 0)
            unit = tl.atomic_add(counts + EXPERTS + choice * 0, 1, mask=first, sem="relaxed")
            tl.store(units + unit, chosen | (place // UNIT << 16), mask=first)
    share = tl.where(picked, tl.gather(scores, chosen, 0), 0.0)
    tl.store(weights + pair, share / tl.sum(share, 0), mask=picked)
    tl.store(ids + pair, tl.where(position >= 0, chosen, -1), mask=picked)


@triton.jit
def _norm(
    x, x_out, squares, weight, eps, h, h_scales, token, num_tokens, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    SLICES: tl.constexpr, SLICES_PADDED: tl.constexpr, COPY: tl.constexpr, A8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The experts' input of one token; COPY: also x itself."""
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (group < WIDTH // 128)[:, None] & (column >= 0)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    begin(PDL)
    at = token.to(tl.int64) * WIDTH + column
    values = tl.load(x_out + at, mask=inside, other=0.0)
    normed = values * _inverse_rms(squares, token, num_tokens, eps, WIDTH, SLICES, SLICES_PADDED) * gain
    release(PDL)
    if A8:
        scale, numbers = quantised(normed, 1, h.dtype.element_ty)
        tl.store(h + at, numbers, mask=inside)
        tl.store(h_scales + token * (WIDTH // 128) + group, scale, mask=group < WIDTH // 128)
    else:
        tl.store(h + at, normed.to(h.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(x + at, values, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "layer", "capacity"])
def _select_kernel(
    x, x_out, logits, squares, weight, bias, positions, token_ids, layer, eps, ids, weights, counts, lists, units, h,
    h_scales, num_tokens, capacity, WIDTH: tl.constexpr, GROUPS: tl.constexpr, EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, SLICES: tl.constexpr,
    SLICES_PADDED: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, UNIFORM: tl.constexpr, COPY: tl.constexpr,
    LISTS: tl.constexpr, A8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: program (token, 0) chooses, program (token, 1), if there is one, norms: neither waits for the other.
    LISTS 0: ids alone (a step of one token), 1: lists and units, 2: lists."""
    token = tl.program_id(0)
    if tl.program_id(1) == 0:
        _choose(logits, squares, bias, positions, token_ids, layer, eps, ids, weights, counts, lists, units, token,
                num_tokens, capacity, WIDTH, EXPERTS, EXPERTS_PADDED, TOP_K, CHOICES, SLICES, SLICES_PADDED, ROWS,
                UNIT, UNIFORM, LISTS, PDL)  # fmt: skip
    else:
        _norm(x, x_out, squares, weight, eps, h, h_scales, token, num_tokens, WIDTH, GROUPS, SLICES, SLICES_PADDED,
              COPY, A8, PDL)  # fmt: skip


@triton.jit
def _units_kernel(
    counts, units, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The units of all experts in their order, and how many there are."""
    expert = tl.arange(0, EXPERTS_PADDED)
    begin(PDL)
    count = tl.load(counts + expert, mask=expert < EXPERTS, other=0)
    tiles = (count + UNIT - 1) // UNIT
    ends = tl.cumsum(tiles, 0)
    tl.store(counts + EXPERTS, tl.sum(tiles, 0))
    for tile in range(tl.max(tiles, 0)):
        tl.store(units + ends - tiles + tile, expert | (tile << 16), mask=tile < tiles)
    release(PDL)


@dataclass(frozen=True, slots=True)
class Slicing:
    """How the logits are computed: `num` slices of the hidden size, BE experts and BM tokens a program."""

    num: int
    be: int
    bm: int
    warps: int


def slicing(num_tokens: int, width: int, num_experts: int) -> Slicing:
    """Programs for every multiprocessor, and no more partial sums than that takes. Found on an H100."""
    padded = next_power_of_2(num_experts)
    if num_tokens <= 16:
        columns, be, bm, warps = 128, 64, 16, 8
    elif num_tokens <= 64:
        columns, be, bm, warps = 64, 128, 16 if num_tokens <= 32 else 32, 4
    elif num_tokens <= MAX_FUSED_TOKENS:
        columns, be, bm, warps = 64, 128, 64, 8
    else:
        blocks = cdiv(next_power_of_2(num_tokens), MANY_BLOCK)
        most = max(1, MANY_PROGRAMS // blocks)
        num = max(count for count in range(1, most + 1) if width % (64 * count) == 0)
        return Slicing(num, padded, MANY_BLOCK, 8)
    return Slicing(width // columns, min(padded, be), bm, warps)


@dataclass(frozen=True, slots=True)
class RouterWork:
    """Memory of the routing of one step, and its result.

    ids       [max_tokens * top_k] int32, -1 for tokens that pad
    weights   [max_tokens * top_k] float32
    counts    [E + 1, padded] int32: pairs of each expert, then the number of units
    lists     [E, max_tokens] int32: pairs of each expert
    units     [max units] int32
    logits, squares, x, gate_parts, flags   scratch; the flags are zeros between launches
    """

    top_k: int
    ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    lists: torch.Tensor
    units: torch.Tensor
    logits: torch.Tensor
    squares: torch.Tensor
    x: torch.Tensor
    gate_parts: torch.Tensor
    flags: torch.Tensor

    @staticmethod
    def shapes(
        max_tokens: int, width: int, num_experts: int, top_k: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor."""
        sizes = [min(max_tokens, 1 << power) for power in range(max_tokens.bit_length() + 1)]
        rows = max(slicing(size, width, num_experts).num * size for size in sizes)
        if max_tokens > MAX_FUSED_TOKENS:
            rows = max(rows, max_rows(max_tokens, width))
        num_parts = 3 if max_tokens > MAX_FUSED_TOKENS else 0
        return {
            "ids": ((max_tokens * top_k,), torch.int32),
            "weights": ((max_tokens * top_k,), torch.float32),
            "counts": ((next_power_of_2(num_experts + 1),), torch.int32),
            "lists": ((num_experts, max_tokens), torch.int32),
            "units": ((max_units(max_tokens, num_experts, top_k, FEW_UNIT_TOKENS),), torch.int32),
            "logits": ((rows * num_experts,), torch.float32),
            "squares": ((rows,), torch.float32),
            "x": ((min(max_tokens, MAX_FUSED_TOKENS), width), torch.float32),
            "gate_parts": ((num_parts, width, num_experts), torch.bfloat16),
            "flags": ((num_flags(max_tokens, num_experts),), torch.int32),
        }

    @classmethod
    def allocate(
        cls, max_tokens: int, width: int, num_experts: int, top_k: int, device: torch.device | str
    ) -> RouterWork:
        shapes = cls.shapes(max_tokens, width, num_experts, top_k)
        made = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        return cls(top_k, **made)

    @classmethod
    def bytes_for(cls, max_tokens: int, width: int, num_experts: int, top_k: int) -> int:
        """Bytes of `allocate`."""
        shapes = cls.shapes(max_tokens, width, num_experts, top_k).values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)

    @property
    def num_bytes(self) -> int:
        tensors = (getattr(self, item.name) for item in fields(self) if item.name != "top_k")
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def num_experts(self) -> int:
        return self.lists.shape[0]

    def takes_few(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens goes by the experts' kernels for few."""
        return num_tokens <= most_few_tokens(self.num_experts, self.top_k)


def max_units(num_tokens: int, num_experts: int, top_k: int, unit_tokens: int) -> int:
    """Most units that a step of so many tokens can have: known without looking at the device."""
    pairs = num_tokens * top_k
    return min(pairs, min(num_experts, pairs) + pairs // unit_tokens)


def most_few_tokens(num_experts: int, top_k: int) -> int:
    """Tokens up to which an expert has few pairs: a power of two, since tiles are chosen for these."""
    tokens = MAX_FEW_PAIRS * num_experts // top_k
    return min(MAX_FEW_TOKENS, 1 << tokens.bit_length() - 1)


def unit_tokens(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Pairs that one unit of a step of so many tokens holds at most."""
    return FEW_UNIT_TOKENS if num_tokens <= most_few_tokens(num_experts, top_k) else MANY_UNIT_TOKENS


def route(
    x: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor, eps: float, gate: torch.Tensor,
    bias: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, layer: int, uniform: bool,
    work: RouterWork, h: Activation, target: Target, pdl: int = 0, layer_gate: LayerGate | None = None,
    units: bool = True,
) -> None:  # fmt: skip
    """Add the parts to x, choose experts, list them and quantise their input.

    Args:
        x: [T, H] float32, changed.
        parts: [P, T, H] float32 or bf16, any strides but the last.
        weight: [H] float32, of the norm.
        gate: [H, E] float32; bias: [E] float32.
        positions: [T] int32, -1 for a row that pads; token_ids: [T] int32.
        layer, uniform: uniform chooses ids by a hash of (layer, position, token id) instead of the scores, whose
            weights it takes; E a power of two.
        h: [T, H], written.
        layer_gate: this gate and weight for the wgmma kernel; where it runs, it takes more than `MAX_FUSED_TOKENS`
            tokens if there are no parts.
        units: whether experts of many tokens want units.

    Raises:
        ValueError: the step is larger than the work's memory, or uniform routing of a number that is no power of two.
    """
    num_tokens, num_experts, top_k = len(x), work.num_experts, work.top_k
    if num_tokens == 0:
        return
    if num_tokens * top_k > len(work.ids):
        raise ValueError(f"The routing's memory is for {len(work.ids) // top_k} tokens, got {num_tokens}.")
    if uniform and num_experts & (num_experts - 1):
        raise ValueError(f"Uniform routing needs a power of two of experts, got {num_experts}.")
    product = None if layer_gate is None else layer_gate.product
    few, unit = work.takes_few(num_tokens), unit_tokens(num_tokens, num_experts, top_k)
    if layer_gate and product and num_tokens > MAX_FUSED_TOKENS and parts is None:
        product(layer_gate.image, h, work.lists.shape[1], unit if few else 0, layer, uniform, eps,
                x=x, gain=weight, logits=work.logits, squares=work.squares, bias=bias, positions=positions,
                token_ids=token_ids, ids=work.ids, weights=work.weights, counts=work.counts, lists=work.lists,
                units=work.units, flags=work.flags)  # fmt: skip
    else:
        _launches(x, parts, weight, eps, gate, bias, positions, token_ids, layer, uniform, work, h, target, pdl)
    if units and not few:
        enqueue(_units_kernel, (1, 1, 1), work.counts, work.units, EXPERTS=num_experts,
                EXPERTS_PADDED=next_power_of_2(num_experts), UNIT=unit, PDL=pdl,
                **launch_options(4, pdl))  # fmt: skip


def _launches(
    x: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor, eps: float, gate: torch.Tensor,
    bias: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor, layer: int, uniform: bool,
    work: RouterWork, h: Activation, target: Target, pdl: int,
) -> None:  # fmt: skip
    """`route` but for the units of many tokens, through Triton."""
    (num_tokens, width), num_experts = x.shape, work.num_experts
    cut = slicing(num_tokens, width, num_experts)
    # Several programs read a slice of x, one for each block of experts: they may not see it half changed.
    fused = num_tokens <= MAX_FUSED_TOKENS
    x_out = work.x if fused and next_power_of_2(num_experts) > cut.be else x
    if fused:
        _few_logits(x, parts, weight, gate, x_out, work, cut, pdl)
    else:
        fused_norm.add_norm(x, parts, weight, eps, h, pdl)
        many_logits(x, weight, gate, work.gate_parts, work.logits, work.squares, work.counts, cut.num, target, pdl)
    _select(x, x_out, weight, eps, bias, positions, token_ids, layer, uniform, work, h, cut, pdl)


def _few_logits(
    x: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor, gate: torch.Tensor, x_out: torch.Tensor,
    work: RouterWork, cut: Slicing, pdl: int,
) -> None:  # fmt: skip
    (num_tokens, width), num_experts = x.shape, work.num_experts
    blocks = next_power_of_2(num_experts) // cut.be
    num_parts, *strides = fused_norm.part_layout(parts)
    enqueue(
        _few_logits_kernel, (cut.num, blocks, cdiv(num_tokens, cut.bm)), x, parts, *strides, weight, gate, x_out,
        work.logits, work.squares, work.counts, num_tokens,
        NUM_PARTS=num_parts, WIDTH=width, EXPERTS=num_experts, SLICE=width // cut.num, BE=cut.be, BM=cut.bm,
        COUNTERS=len(work.counts), PDL=pdl, **launch_options(cut.warps, pdl),
    )  # fmt: skip


def _select(
    x: torch.Tensor, x_out: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor,
    positions: torch.Tensor, token_ids: torch.Tensor, layer: int, uniform: bool, work: RouterWork, h: Activation,
    cut: Slicing, pdl: int,
) -> None:  # fmt: skip
    (num_tokens, width), num_experts, top_k = x.shape, work.num_experts, work.top_k
    few, unit = work.takes_few(num_tokens), unit_tokens(num_tokens, num_experts, top_k)
    padded, slices = next_power_of_2(num_experts), next_power_of_2(cut.num)
    enqueue(
        _select_kernel, (num_tokens, 2 if num_tokens <= MAX_FUSED_TOKENS else 1, 1),
        x, x_out, work.logits, work.squares, weight, bias, positions, token_ids, layer, eps, work.ids, work.weights,
        work.counts, work.lists, work.units, h.data, h.data if h.scale is None else h.scale, num_tokens,
        work.lists.shape[1], WIDTH=width, GROUPS=next_power_of_2(width // 128), EXPERTS=num_experts,
        EXPERTS_PADDED=padded, TOP_K=top_k, CHOICES=next_power_of_2(top_k), SLICES=cut.num,
        SLICES_PADDED=slices, ROWS=min(8, slices), UNIT=unit, UNIFORM=uniform, COPY=x_out is not x,
        LISTS=0 if num_tokens == 1 else 1 if few else 2, A8=h.scale is not None, PDL=pdl, **launch_options(4, pdl),
    )  # fmt: skip

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""RMSNorm with what lies before and after it in one launch: sums into the residual, and FP8 for the next matrix.

    x += sum of parts;  h = x / sqrt(mean(x^2) + eps) * weight;  h as e4m3 with one scale per 128 columns, or as bf16

The residual x is float32. Parts are what the matrices before left behind unsummed: the slices of a split-K product,
or the weighted rows of a token's experts; they are added in their order, so a step's bits do not depend on timing.
The first layer's form looks its rows up in the embedding instead; the last one's serves the tokens that need logits.
One program a token; where tokens are few, one for every 128 columns, and then nobody knows a token's 1 / rms yet: sums
of squares are left behind, and the product that follows multiplies by it (`linear`), since scales of its input carry
any factor. The math is that of `norm_rope.rms_norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from saddle.kernels.launching import enqueue
from saddle.kernels.tile_dot import begin, launch_options, release
from saddle.kernels.whole import next_power_of_2

if TYPE_CHECKING:
    from saddle.kernels.quant import Activation

NUM_WARPS = 8
GROUP = 128  # columns that share an activation scale
SMALLEST = tl.constexpr(1e-20)  # of a group's largest x * weight: what is less may become zero


@triton.jit
def _norm_kernel(
    x, parts, part_stride, part_token_stride, index, table, weight, eps, out, scales,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, NUM_PARTS: tl.constexpr, EMBED: tl.constexpr, GATHER: tl.constexpr,
    WRITE_X: tl.constexpr, A8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: x [T, WIDTH] float32, out [T or S, WIDTH], scales [T, WIDTH / 128]; GROUPS = WIDTH / 128 rounded up
    to a power of two. `index`: token ids (EMBED) or tokens to serve (GATHER)."""
    target = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    columns = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (group < WIDTH // 128)[:, None] & (columns >= 0)
    gain = tl.load(weight + columns, mask=inside, other=0.0)  # no other kernel writes it: loaded before the wait
    begin(PDL)
    token = target
    if GATHER:
        token = tl.load(index + target).to(tl.int64)
    if EMBED:
        row = tl.load(index + target).to(tl.int64)
        values = tl.load(table + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        values = tl.load(x + token * WIDTH + columns, mask=inside, other=0.0)
    for part in tl.static_range(NUM_PARTS):
        place = parts + part * part_stride + token * part_token_stride
        values += tl.load(place + columns, mask=inside, other=0.0).to(tl.float32)
    release(PDL)
    if WRITE_X:
        tl.store(x + token * WIDTH + columns, values, mask=inside)
    inverse = tl.rsqrt(tl.sum(tl.sum(values * values, 1), 0) / WIDTH + eps)
    normed = values * inverse * gain
    if A8:
        LARGEST: tl.constexpr = 240.0 if out.dtype.element_ty == tl.float8e4b8 else 448.0
        scale = tl.maximum(tl.max(tl.abs(normed), 1), 1e-10) / LARGEST
        quantised = (normed / scale[:, None]).to(out.dtype.element_ty)
        tl.store(out + target * WIDTH + columns, quantised, mask=inside)
        tl.store(scales + target * (WIDTH // 128) + group, scale, mask=group < WIDTH // 128)
    else:
        tl.store(out + target * WIDTH + columns, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _group_kernel(
    x, parts, part_stride, part_token_stride, index, table, weight, squares, out, scales,
    WIDTH: tl.constexpr, NUM_PARTS: tl.constexpr, EMBED: tl.constexpr, A8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """128 columns of one token: out = x * weight, and squares [WIDTH / 128, T] = their part of the sum of x^2."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    column = group * 128 + tl.arange(0, 128)
    gain = tl.load(weight + column)
    begin(PDL)
    if EMBED:
        values = tl.load(table + tl.load(index + token).to(tl.int64) * WIDTH + column).to(tl.float32)
    else:
        values = tl.load(x + token * WIDTH + column)
    for part in tl.static_range(NUM_PARTS):
        values += tl.load(parts + part * part_stride + token * part_token_stride + column).to(tl.float32)
    release(PDL)
    tl.store(x + token * WIDTH + column, values)
    tl.store(squares + group * tl.num_programs(0) + token, tl.sum(values * values, 0))
    gained = values * gain
    if A8:
        LARGEST: tl.constexpr = 240.0 if out.dtype.element_ty == tl.float8e4b8 else 448.0
        scale = tl.maximum(tl.max(tl.abs(gained), 0), SMALLEST) / LARGEST
        tl.store(scales + token * (WIDTH // 128) + group, scale)
        gained /= scale
    tl.store(out + token * WIDTH + column, gained.to(out.dtype.element_ty))


def embed_norm(
    token_ids: torch.Tensor, table: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, out: Activation,
    pdl: int = 0, squares: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """First layer: x = table[token_ids], out = its norm.

    Args:
        token_ids: [T] int32, every one a row of the table (also of rows that only pad).
        table: [V, H] bfloat16.
        x: [T, H] float32, written.
        weight: [H] float32.
        out: [T, H], see `Activation`.
        pdl: 0 without programmatic dependent launch; 1, 2: the next kernel may start early, late.
        squares: as in `add_norm`.
    """
    if squares is not None:
        _launch_groups(x, None, token_ids, table, weight, squares, out, pdl)
        return
    _launch(len(token_ids), x, None, token_ids, table, weight, eps, out.data, out.scale, pdl, embed=True)


def add_norm(
    x: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor, eps: float, out: Activation, pdl: int = 0,
    squares: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """x += sum of parts; out = norm of x.

    Args:
        x: [T, H] float32.
        parts: [P, T, H] float32 or bfloat16, any strides but the last.
        squares: [H / 128, T] float32, written: sums of x^2 over 128 columns each. Then `out` lacks the factor 1 / rms,
            `eps` is not used, and many programs share a token's work: faster for few tokens.
    """
    if squares is not None:
        _launch_groups(x, parts, None, None, weight, squares, out, pdl)
        return
    _launch(x.shape[0], x, parts, None, None, weight, eps, out.data, out.scale, pdl)


def final_norm(
    x: torch.Tensor, parts: torch.Tensor | None, logit_index: torch.Tensor, weight: torch.Tensor, eps: float,
    out: torch.Tensor, pdl: int = 0,
) -> None:  # fmt: skip
    """out[s] = norm of (x + sum of parts)[logit_index[s]] as bfloat16 [S, H]; x stays as it is.

    Args:
        logit_index: [S] int32, tokens of the step.
    """
    _launch(len(logit_index), x, parts, logit_index, None, weight, eps, out, None, pdl)


def part_layout(parts: torch.Tensor | None) -> tuple[int, int, int]:
    """How many parts [P, T, H] there are, and the strides of a part and of a token in them."""
    return (0, 0, 0) if parts is None else (len(parts), parts.stride(0), parts.stride(1))


def _check_width(width: int) -> None:
    if width % GROUP:
        raise ValueError(f"the hidden size must be a multiple of {GROUP}, not {width}")


def _launch_groups(
    x: torch.Tensor, parts: torch.Tensor | None, index: torch.Tensor | None, table: torch.Tensor | None,
    weight: torch.Tensor, squares: torch.Tensor, out: Activation, pdl: int,
) -> None:  # fmt: skip
    num_tokens, width = x.shape
    _check_width(width)
    if squares.shape != (width // GROUP, num_tokens):
        raise ValueError(f"squares must be [{width // GROUP}, {num_tokens}], got {list(squares.shape)}")
    if num_tokens == 0:
        return
    num_parts, *strides = part_layout(parts)
    enqueue(
        _group_kernel, (num_tokens, width // GROUP, 1), x, parts, *strides, index, table, weight, squares, out.data,
        out.scale, width, num_parts, index is not None, out.scale is not None, pdl,
        **launch_options(1, pdl),
    )  # fmt: skip


def _launch(
    count: int, x: torch.Tensor, parts: torch.Tensor | None, index: torch.Tensor | None, table: torch.Tensor | None,
    weight: torch.Tensor, eps: float, out: torch.Tensor, scales: torch.Tensor | None, pdl: int, embed: bool = False,
) -> None:  # fmt: skip
    width = x.shape[-1]
    _check_width(width)
    if count == 0:
        return
    num_parts, *strides = part_layout(parts)
    enqueue(
        _norm_kernel, (count, 1, 1), x, parts, *strides, index, table, weight, eps, out, scales, width,
        next_power_of_2(width // GROUP), num_parts, embed, index is not None and not embed,
        embed or (parts is not None and index is None), scales is not None, pdl,
        **launch_options(NUM_WARPS if width > 1024 else 4, pdl),
    )  # fmt: skip

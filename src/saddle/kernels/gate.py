# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Routing of many tokens: on sm_90 one launch from the residual to lists of pairs and the experts' input in FP8.

    logits = x (gain * gate);   numbers * scales = x * gain in E4M3;   squares = sum of x^2

The norm's 1 / rms multiplies a token's logits and its scales at last, so the residual is read once, by blocks that each
know a part of its columns. A float32 product is three of float16 with
float32 sums: either factor is a high and a low part, together 22 bits, after a power of two of its own for each token
and for each expert, which costs no bit. gain * gate does not depend on the step: its parts are made once, in the order
in which the matrix units read them (`image`). The kernel, with wgmma, is `cuda/gate.cu`. Elsewhere a Triton kernel
computes the logits alone, behind the norm (`many_logits`).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from saddle.kernels import nvrtc
from saddle.kernels.launching import enqueue
from saddle.kernels.quant import GROUP, Activation
from saddle.kernels.target import Target
from saddle.kernels.tile_dot import begin, launch_options, release
from saddle.kernels.whole import cdiv, next_power_of_2
from saddle.version import VERSION

logger = logging.getLogger(__name__)

# As gate_shapes.cuh.
TOKENS = 128
STEP = 32
EXPERTS_PADDED = 256
BLOCK_THREADS = 384
APART = 32
SHARED_BYTES = 222 * 1024
MAX_BLOCKS = 132  # that share the work of a step which has less of its own
# The largest number of a column of gain * gate, or of a token, becomes less than two to this; float16 ends at 2^16.
LARGEST_EXPONENT = 14
SMALLEST = 2.0**-100
MAX_CHOICES = 8
PARTS_BLOCK = 1024

_POINTERS = ("x", "image", "factors", "gain", "logits", "squares", "numbers", "scales", "bias", "positions",
             "token_ids", "ids", "weights", "counts", "lists", "units", "flags")  # fmt: skip
_NUMBERS = ("num_tokens", "splits", "capacity", "unit", "layer", "uniform")


@triton.jit
def _bf16_parts(values):
    """Three bfloat16 numbers whose sum is the float32 number."""
    high = values.to(tl.bfloat16)
    rest = values - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _gate_parts_kernel(
    weight, gate, parts, counts, SIZE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, COUNTERS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """parts [3, WIDTH, EXPERTS] = weight * gate in three bfloat16 numbers; counters to zero."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    gained = tl.load(gate + place, mask=inside, other=0.0) * tl.load(weight + place // EXPERTS, mask=inside, other=0.0)
    high, middle, low = _bf16_parts(gained)
    begin(PDL)
    if tl.program_id(0) == 0:
        counter = tl.arange(0, COUNTERS)
        tl.store(counts + counter, tl.zeros([COUNTERS], tl.int32))
    release(PDL)
    tl.store(parts + place, high, mask=inside)
    tl.store(parts + SIZE + place, middle, mask=inside)
    tl.store(parts + 2 * SIZE + place, low, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _many_logits_kernel(
    x, parts, logits, squares, num_tokens, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, BE: tl.constexpr,
    SLICE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits [slices, T, EXPERTS] and squares [slices, T] of slices of SLICE columns of x, the gate being in parts.

    A float32 product is the six largest of the nine products of parts: as exact as float32 sums are, and on the
    matrix units twice as fast as three tf32 products, whose parts would be made anew in every program.
    """
    part = tl.program_id(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    expert = tl.arange(0, BE)
    real = (expert < EXPERTS)[None, :] & (column >= 0)[:, None]
    token = tl.minimum(row, num_tokens - 1).to(tl.int64)
    begin(PDL)
    x_at = x + token[:, None] * WIDTH + column[None, :]
    high_at = parts + column[:, None] * EXPERTS + expert[None, :]
    total = tl.zeros([BM, BE], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for step in tl.range(part * SLICE, part * SLICE + SLICE, BK, num_stages=STAGES):
        values = tl.load(x_at + step)
        gate_high = tl.load(high_at + step * EXPERTS, mask=real, other=0.0)
        gate_middle = tl.load(high_at + WIDTH * EXPERTS + step * EXPERTS, mask=real, other=0.0)
        gate_low = tl.load(high_at + 2 * WIDTH * EXPERTS + step * EXPERTS, mask=real, other=0.0)
        square += tl.sum(values * values, 1)
        high, middle, low = _bf16_parts(values)
        total = tl.dot(low, gate_high, total)
        total = tl.dot(middle, gate_middle, total)
        total = tl.dot(high, gate_low, total)
        total = tl.dot(middle, gate_high, total)
        total = tl.dot(high, gate_middle, total)
        total = tl.dot(high, gate_high, total)
    release(PDL)
    at = part * num_tokens + row
    tl.store(squares + at, square, mask=row < num_tokens)
    inside = (row < num_tokens)[:, None] & (expert < EXPERTS)[None, :]
    tl.store(logits + at[:, None] * EXPERTS + expert[None, :], total, mask=inside)


class Params(ctypes.Structure):
    """`Params` of gate_choose.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in _NUMBERS),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class GateImage:
    """gain * gate of a layer in two parts.

    parts    [H / 16, 2, 256, 16] float16: what one product of 16 columns takes, high parts, then low parts of every
             expert; columns in the order `places`, chunks of 8 swizzled as wgmma reads rows of 32 bytes; zeros where
             there is no expert
    factors  [256] float32, powers of two: what an expert's products are to be multiplied by
    """

    parts: torch.Tensor
    factors: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.parts, self.factors))


def places() -> torch.Tensor:
    """Which of 32 columns stands where in two products. A lane of the kernel loads 8 adjacent columns, of which the
    first four belong to one product and the others to the next, in the pairs in which an operand in registers wants
    them."""
    at = torch.arange(STEP)
    step, rest = at // 16, at % 16
    return rest % 8 // 2 * 8 + step * 4 + rest // 8 * 2 + rest % 2


def image(gate: torch.Tensor, gain: torch.Tensor) -> GateImage:
    """Parts of gate [H, E] float32 times gain [H] float32."""
    width, num_experts = gate.shape
    product = gate * gain[:, None]
    exponents = torch.frexp(product.abs().amax(0).clamp_(min=SMALLEST)).exponent
    scaled = torch.ldexp(product, LARGEST_EXPONENT - exponents)
    high = scaled.to(torch.float16)
    low = (scaled - high.to(torch.float32)).to(torch.float16)
    padded = torch.zeros(2, width, EXPERTS_PADDED, dtype=torch.float16, device=gate.device)
    padded[..., :num_experts] = torch.stack((high, low))
    blocks = padded.view(2, width // STEP, STEP, EXPERTS_PADDED)[:, :, places().to(gate.device)]
    # [2 parts, H / 32, 2 products, 2 chunks, 8, experts] -> [H / 16, 2 parts, experts, 2 chunks, 8]
    rows = blocks.view(2, width // STEP, 2, 2, 8, EXPERTS_PADDED).permute(1, 2, 0, 5, 3, 4).flatten(0, 1)
    chunk = torch.arange(2, device=gate.device)[None, :]
    expert = torch.arange(EXPERTS_PADDED, device=gate.device)[:, None]
    swizzled = rows[:, :, expert, chunk ^ (expert // 4 % 2)]
    factors = torch.ones(EXPERTS_PADDED, device=gate.device)
    factors[:num_experts] = torch.ldexp(torch.ones_like(factors[:num_experts]), exponents - LARGEST_EXPONENT)
    return GateImage(swizzled.reshape(width // 16, 2, EXPERTS_PADDED, 16).contiguous(), factors)


def image_bytes(width: int) -> int:
    """Bytes of `image`."""
    return 2 * width * EXPERTS_PADDED * 2 + EXPERTS_PADDED * 4


def num_splits(num_tokens: int, width: int) -> int:
    """Blocks among which a token's columns are divided: as many as there is room for, a divisor of its groups."""
    groups, most = width // GROUP, max(1, MAX_BLOCKS // cdiv(num_tokens, TOKENS))
    return max(count for count in range(1, min(groups, most) + 1) if groups % count == 0)


def max_rows(max_tokens: int, width: int) -> int:
    """Most rows of logits that steps of up to so many tokens can have: tokens times splits."""
    return max(max_tokens, min(max_tokens * (width // GROUP), MAX_BLOCKS * TOKENS))


def num_flags(max_tokens: int, num_experts: int) -> int:
    """By which the kernel's blocks count and wait for each other, see gate_choose.cuh."""
    return (num_experts + 2) * APART + cdiv(max_tokens, TOKENS)


def unsupported(width: int, num_experts: int, top_k: int, fp8: bool, target: Target) -> str | None:
    """Why the kernel cannot serve such a router on this GPU; fp8: the experts' input is; None: it can."""
    if target.capability != 90:
        return f"it needs sm_90, this is {target.arch}"
    if num_experts > EXPERTS_PADDED or num_experts % 8:
        return f"it is for a multiple of 8 and at most {EXPERTS_PADDED} experts, not {num_experts}"
    if top_k > MAX_CHOICES:
        return f"it chooses at most {MAX_CHOICES} experts, not {top_k}"
    if not fp8:
        return "it is for experts that take FP8"
    if width % GROUP:
        return f"it needs a hidden size of a multiple of {GROUP}, not {width}"
    return None


def compile_options(**shape: int) -> list[str]:
    """Options of NVRTC for a shape."""
    found = ["--gpu-architecture=sm_90a", "--std=c++17", "--device-as-default-execution-space"]
    return [*found, *(f"-DSADDLE_{name.upper()}={value}" for name, value in shape.items())]


class GateProduct:
    """The kernel for a model's routers. Compiles on construction, never later.

    Args:
        cache_dir: where compiled binaries are kept; None: nowhere.

    Raises:
        ValueError: shapes or a GPU that do not fit.
        CudaError: the kernel does not compile or load.
    """

    def __init__(
        self, width: int, num_experts: int, top_k: int, target: Target, device: torch.device,
        cache_dir: Path | None = None,
    ) -> None:  # fmt: skip
        why = unsupported(width, num_experts, top_k, True, target)
        if why is not None:
            raise ValueError(f"The wgmma kernel for routing does not run here: {why}.")
        self.width = width
        self._device = device.index or 0
        options = compile_options(hidden=width, num_experts=num_experts, top_k=top_k)
        tag = f"{target.arch}-{VERSION}"
        cubin = nvrtc.cached_cubin(cache_dir, "gate.cu", nvrtc.sources("gate.cu"), options, tag)
        self.kernel = nvrtc.Kernel(cubin, "gate_route", SHARED_BYTES)

    def __call__(
        self, gate: GateImage, h: Activation, capacity: int, unit: int, layer: int, uniform: bool, eps: float,
        **tensors: torch.Tensor,
    ) -> None:  # fmt: skip
        """Route the tokens of `tensors["x"]` [T, H] float32 and write their h in E4M3.

        Args:
            gate: made with the same `gain` [H].
            capacity: of a list.
            unit: pairs of a unit; 0: no units are written.
            tensors: the other pointers of `Params`; arguments and results as `router` has them.
        """
        assert h.scale is not None
        num_tokens = len(h.data)
        splits = num_splits(num_tokens, self.width)
        params = Params(num_tokens=num_tokens, splits=splits, capacity=capacity, unit=unit, layer=layer,
                        uniform=int(uniform), eps=eps)  # fmt: skip
        own = {"image": gate.parts, "factors": gate.factors, "numbers": h.data, "scales": h.scale}
        for name, tensor in (*own.items(), *tensors.items()):
            setattr(params, name, tensor.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self.kernel.launch_apart(cdiv(num_tokens, TOKENS) * splits, BLOCK_THREADS, params, stream)


def many_logits(
    x: torch.Tensor, gain: torch.Tensor, gate: torch.Tensor, parts: torch.Tensor, logits: torch.Tensor,
    squares: torch.Tensor, counts: torch.Tensor, num_slices: int, target: Target, pdl: int,
) -> None:  # fmt: skip
    """The same logits and squares, in `num_slices` parts, on GPUs that have no other kernel; counts to zero.

    Args:
        x: [T, H] float32; gain: [H]; gate: [H, E].
        parts: [3, H, E] bfloat16, scratch.
    """
    (num_tokens, width), num_experts = x.shape, gate.shape[1]
    enqueue(
        _gate_parts_kernel, (cdiv(gate.numel(), PARTS_BLOCK), 1, 1), gain, gate, parts, counts,
        SIZE=gate.numel(), EXPERTS=num_experts, BLOCK=PARTS_BLOCK, COUNTERS=len(counts), PDL=pdl,
        **launch_options(4, pdl),
    )  # fmt: skip
    stages = 3 if target.shared_bytes > 200 * 1024 else 1  # 56 KB each, and the parts of x
    enqueue(
        _many_logits_kernel, (num_slices, cdiv(num_tokens, TOKENS), 1), x, parts, logits, squares, num_tokens,
        WIDTH=width, EXPERTS=num_experts, BE=next_power_of_2(num_experts), SLICE=width // num_slices, BM=TOKENS, BK=32,
        STAGES=stages, PDL=pdl, **launch_options(8, pdl),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerGate:
    """What the kernel multiplies by in one layer, and the kernel where it runs."""

    image: GateImage
    product: GateProduct | None


def prepare(
    gates: Sequence[tuple[torch.Tensor, torch.Tensor]], top_k: int, fp8: bool, target: Target,
    cache_dir: Path | None = None,
) -> tuple[list[LayerGate], str]:  # fmt: skip
    """For each layer's (gate, gain) what the kernel needs, none where it is not made for them; and the line that says
    what routes many tokens, with the reason. Arguments as `unsupported` and `GateProduct`."""
    gate = gates[0][0]
    width, num_experts = gate.shape
    found, product = [], None
    why = unsupported(width, num_experts, top_k, fp8, target)
    if why is None:
        found = [image(*one) for one in gates]
        why = f"the weights are on {gate.device.type}"
        if gate.device.type == "cuda":
            try:
                product = GateProduct(width, num_experts, top_k, target, gate.device, cache_dir)
            except nvrtc.CudaError as error:
                why = f"it does not compile here: {error}"
                logger.warning("No wgmma kernel for routing: %s", error)
    line = "the wgmma kernel" if product is not None else f"Triton kernels, not the wgmma one, because {why}"
    return [LayerGate(one, product) for one in found], f"routing of many tokens: {line}"

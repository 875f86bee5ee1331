"""Routings, and what the experts' kernels have to give for them."""

from __future__ import annotations

import packed_support as support
import torch
import torch.nn.functional as F

from saddle.kernels import quant, router
from saddle.kernels.target import Target

# bf16 rounding, and FP8 rounding of numbers between the two launches that falls the other way: one in a few hundred
# of a group, a step of 6 % each; more of the whole where there are few.
ERROR = {"m2": 6e-3, "demo": 2e-2}


def routed(size: int, num_experts: int, top_k: int, width: int, num_pads: int = 0) -> router.RouterWork:
    """Random choices of a step, made by the router's own kernels."""
    work = router.RouterWork.allocate(size, width, num_experts, top_k, "cuda")
    positions = torch.randint(0, 9999, (size,), device="cuda", dtype=torch.int32)
    if num_pads:
        positions[-num_pads:] = -1
    chip = support.targets()[0]
    h = quant.allocate(size, width, chip.fp8_dtype, "cuda")
    router.route(torch.randn(size, width, device="cuda"), None, torch.ones(width, device="cuda"), 1e-6,
                 torch.randn(width, num_experts, device="cuda") * 0.03, torch.zeros(num_experts, device="cuda"),
                 positions, positions, 0, False, work, h, chip)  # fmt: skip
    return work


def wanted_rows(
    h: torch.Tensor, work: router.RouterWork, w13: torch.Tensor, w2: torch.Tensor, chip: Target
) -> torch.Tensor:
    """Weighted rows [T * k, H]; the numbers between the products are rounded as the kernels round them."""
    pairs = len(h) * work.top_k
    ids, out = work.ids[:pairs], torch.zeros(pairs, w2.shape[1], device="cuda")
    for expert in torch.unique(ids).tolist():
        if expert < 0:
            continue
        mine = (ids == expert).nonzero().flatten()
        gate, up = (h[mine // work.top_k] @ w13[expert].T).chunk(2, -1)
        active = quant.dequantise(support.activation(F.silu(gate) * up, chip))
        out[mine] = (active @ w2[expert].T) * work.weights[mine, None]
    return out


SHAPES = {"m2": (32, 8, 3072, 1536), "demo": (16, 4, 256, 128)}

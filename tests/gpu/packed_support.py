"""Random packed weights of real and small shapes on the GPU, with their values."""

from __future__ import annotations

import pytest
import torch

from saddle.kernels import quant, target, tiles
from saddle.kernels.quant import Activation
from saddle.kernels.target import Target
from saddle.kernels.tiles import PackedMatrix

SIZES = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 128, 1000, 8192)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: kernels are not tested")


def targets() -> list[Target]:
    """This GPU, and the path of GPUs without FP8 units (which runs here too)."""
    here = [target.detect()] if torch.cuda.is_available() else []
    return [*here, target.of_arch("sm_80")]


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def fp8_weight(*shape: int, interleaved: bool = False) -> PackedMatrix:
    """Values of standard deviation about 1 / sqrt(K), scales differing from block to block."""
    weight = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn)
    for part in weight.view(-1, *shape[-2:]):
        part.copy_(torch.randn(shape[-2:], device="cuda"))
    blocks = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    return tiles.pack(weight, (torch.rand(blocks, device="cuda") + 0.5) * shape[-1] ** -0.5, interleaved)


def activation(x: torch.Tensor, chip: Target) -> Activation:
    return quant.quantise(x, chip.fp8_dtype if chip.has_fp8_dot else torch.bfloat16)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||; NaN never passes a comparison."""
    wide = wanted.to(torch.float64)
    return float((found.to(torch.float64) - wide).norm() / wide.norm())

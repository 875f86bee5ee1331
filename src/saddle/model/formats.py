"""Weight formats as types: which tensors of a checkpoint make up a weight, how a slice of it is cut, its value.

A kernel takes the format; there is no second copy of a kernel for a format. FP8 weights are cut as bytes together
with their scales, exactly as every rank of every device does it, and only then dequantised where a device computes
in wider numbers. A further format (4-bit ones have other members, packed two to a byte) is one more class here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from saddle.model.config import ModelConfig
from saddle.parallel.layout import Slice, scale_granularity

ReadSlice = Callable[[str, Slice, Slice], torch.Tensor]  # suffix of the tensor's name, rows, columns


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a stored weight: the end of its name, its shape, the dtypes it may have (in safetensors' words)."""

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bf16:
    """Plain numbers: BF16, or F32 where a checkpoint has it."""

    def members(self, shape: tuple[int, ...]) -> list[Member]:
        return [Member("", shape, ("BF16", "F32"))]

    def read(self, get: ReadSlice, rows: Slice, columns: Slice) -> torch.Tensor:
        """Numbers [R, C] of a slice, in the stored dtype."""
        return get("", rows, columns)


@dataclass(frozen=True, slots=True)
class Fp8Slice:
    """FP8 bytes [R, C] float8_e4m3fn and their scales [R / r, C / c] float32, at the granularity (r, c)."""

    weight: torch.Tensor
    scale: torch.Tensor
    granularity: tuple[int, int]

    def dequantise(self) -> torch.Tensor:
        """weight[i, j] * scale[i // r, j // c], [R, C] float32."""
        (rows, columns), (r, c) = self.weight.shape, self.granularity
        blocks = self.weight.to(torch.float32).view(rows // r, r, columns // c, c)
        return blocks.mul_(self.scale[:, None, :, None]).view(rows, columns)


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """E4M3 with one F32 scale per block: W[i, j] = q[i, j] * scale[i // block[0], j // block[1]]."""

    block: tuple[int, int] = (128, 128)

    def members(self, shape: tuple[int, ...]) -> list[Member]:
        scales = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))
        return [Member("", shape, ("F8_E4M3",)), Member("_scale_inv", scales, ("F32",))]

    def read(self, get: ReadSlice, rows: Slice, columns: Slice) -> Fp8Slice:
        """A slice of the bytes, and the checkpoint's scales repeated to the granularity that divides the slice."""
        granularity = scale_granularity(rows, self.block[0]), scale_granularity(columns, self.block[1])
        covering = [Slice(part.start // block, -(-part.stop // block))
                    for part, block in zip((rows, columns), self.block, strict=True)]  # fmt: skip
        scale = get("_scale_inv", *covering)
        for dim, (part, step) in enumerate(zip((rows, columns), granularity, strict=True)):
            block = self.block[dim]
            index = torch.arange(part.start, part.stop, step) // block - part.start // block
            scale = scale.index_select(dim, index)
        return Fp8Slice(get("", rows, columns), scale, granularity)


WeightFormat = Bf16 | Fp8Block


def format_of(config: ModelConfig, module: str) -> WeightFormat:
    """How the checkpoint stores the weight of a projection, given its dotted name."""
    quantization = config.quantization
    return Fp8Block(quantization.block) if quantization is not None and quantization.covers(module) else Bf16()

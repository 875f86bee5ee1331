"""Weight formats as types: which tensors of a checkpoint make up a weight, how a slice of it is cut, its value.

A kernel takes the format; there is no second copy of a kernel for a format. FP8 weights are cut as bytes together
with their scales, exactly as every rank of every device does it, and only then dequantised where a device computes
in wider numbers. 4-bit weights are cut as numbers: two lie in a byte, or eight in a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from saddle.errors import CheckpointError
from saddle.kernels import nibbles
from saddle.kernels.tiles import NibbleTiles
from saddle.model.config import ModelConfig
from saddle.parallel.layout import Slice, scale_granularity


class ReadSlice(Protocol):
    """Reads a slice of one tensor of a weight: the suffix of its name, rows and columns; all of it without them."""

    def __call__(self, suffix: str, *parts: Slice) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a stored weight: the end of its name, its shape, the dtypes it may have (in safetensors' words).

    A single number may be stored with the shape () or (1,).
    """

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

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """E4M3 with one scale per block: W[i, j] = q[i, j] * scale[i // block[0], j // block[1]].

    packed   compressed-tensors' name of the scales, which may be BF16; else MiniMax's, F32
    """

    block: tuple[int, int] = (128, 128)
    packed: bool = False

    @property
    def _scales(self) -> str:
        return "_scale" if self.packed else "_scale_inv"

    def members(self, shape: tuple[int, ...]) -> list[Member]:
        scales = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))
        return [
            Member("", shape, ("F8_E4M3",)),
            Member(self._scales, scales, ("F32", "BF16") if self.packed else ("F32",)),
        ]

    def read(self, get: ReadSlice, rows: Slice, columns: Slice) -> Fp8Slice:
        """A slice of the bytes, and the checkpoint's scales repeated to the granularity that divides the slice."""
        granularity = scale_granularity(rows, self.block[0]), scale_granularity(columns, self.block[1])
        covering = [Slice(part.start // block, -(-part.stop // block))
                    for part, block in zip((rows, columns), self.block, strict=True)]  # fmt: skip
        scale = get(self._scales, *covering).to(torch.float32)
        for dim, (part, step) in enumerate(zip((rows, columns), granularity, strict=True)):
            block = self.block[dim]
            index = torch.arange(part.start, part.stop, step) // block - part.start // block
            scale = scale.index_select(dim, index)
        return Fp8Slice(get("", rows, columns), scale, granularity)


@dataclass(frozen=True, slots=True)
class NibbleSlice:
    """4-bit numbers [R, C] uint8 (0 to 15), scales [R, C / group] as stored, and the factor of the whole weight."""

    numbers: torch.Tensor
    scale: torch.Tensor
    factor: float
    tiles: NibbleTiles

    def dequantise(self) -> torch.Tensor:
        """value(number) * scale * factor, [R, C] float32."""
        wide = self.scale.to(torch.float32).repeat_interleave(self.tiles.group, 1)
        return nibbles.values(self.numbers, self.tiles).mul_(wide).mul_(self.factor)

    @property
    def num_bytes(self) -> int:
        return self.numbers.numel() // 2 + self.scale.nbytes


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """E2M1 numbers, an E4M3 scale per 16 columns, one float32 factor; two numbers a byte, the even column low.

    packed   compressed-tensors' names, whose factor is stored as its reciprocal; else ModelOpt's
    """

    packed: bool

    @property
    def tiles(self) -> NibbleTiles:
        return NibbleTiles("e2m1", 16)

    def members(self, shape: tuple[int, ...]) -> list[Member]:
        rows, columns = shape
        numbers, factor = ("_packed", "_global_scale") if self.packed else ("", "_scale_2")
        return [
            Member(numbers, (rows, columns // 2), ("U8",)),
            Member("_scale", (rows, columns // 16), ("F8_E4M3",)),
            Member(factor, (), ("F32",)),
        ]

    def read(self, get: ReadSlice, rows: Slice, columns: Slice) -> NibbleSlice:
        """A slice of the numbers with its scales."""
        numbers, _, factor = (member.suffix for member in self.members((rows.size, columns.size)))
        raw = get(numbers, rows, _divided(columns, 2))
        value = float(get(factor).reshape(()))
        scale = get("_scale", rows, _divided(columns, 16))
        return NibbleSlice(nibbles.from_bytes(raw), scale, 1 / value if self.packed else value, self.tiles)


@dataclass(frozen=True, slots=True)
class Int4:
    """Integers (number - 8) with a bf16 scale per `group` columns; eight numbers an int32 word (pack-quantized).

    The checkpoint's scales are repeated to the granularity that divides a slice: 64 of 128 columns at TP8.
    """

    group: int

    @property
    def tiles(self) -> NibbleTiles:
        return NibbleTiles("int4", self.group)

    def members(self, shape: tuple[int, ...]) -> list[Member]:
        rows, columns = shape
        return [
            Member("_packed", (rows, columns // 8), ("I32",)),
            Member("_scale", (rows, columns // self.group), ("BF16",)),
            Member("_shape", (2,), ("I64", "I32")),
        ]

    def read(self, get: ReadSlice, rows: Slice, columns: Slice) -> NibbleSlice:
        """A slice of the numbers with its scales."""
        words = get("_packed", rows, _divided(columns, 8))
        granularity = scale_granularity(columns, self.group)
        covering = Slice(columns.start // self.group, -(-columns.stop // self.group))
        index = torch.arange(columns.start, columns.stop, granularity) // self.group - covering.start
        scale = get("_scale", rows, covering).index_select(1, index)
        return NibbleSlice(nibbles.from_words(words), scale, 1.0, NibbleTiles("int4", granularity))


def _divided(part: Slice, step: int) -> Slice:
    """A slice of columns in units of `step` columns.

    Raises:
        CheckpointError: it cuts a unit.
    """
    if part.start % step or part.stop % step:
        raise CheckpointError(f"Columns {part.start} to {part.stop} cut 4-bit groups of {step}.")
    return Slice(part.start // step, part.stop // step)


WeightFormat = Bf16 | Fp8Block | Nvfp4 | Int4


def format_of(config: ModelConfig, module: str) -> WeightFormat:
    """How the checkpoint stores the weight of a projection, given its dotted name."""
    how = config.quantization.of(module) if config.quantization is not None else None
    if how is None:
        return Bf16()
    if how.kind.startswith("fp8"):
        return Fp8Block(how.block, packed=how.kind == "fp8-packed")
    if how.kind == "int4-packed":
        return Int4(how.block[1])
    return Nvfp4(packed=how.kind == "nvfp4-packed")

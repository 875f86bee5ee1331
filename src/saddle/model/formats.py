"""Weight formats as types: what a checkpoint tensor is made of and how it becomes numbers.

A format knows which tensors belong to one weight, how a slice of it is cut, and its dequantised value. Kernels take
the format; there is no second copy of a kernel for a format. FP8 weights are cut as bytes together with their
scales, exactly as every rank of every device does it, and only then dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saddle.parallel.layout import Slice, scale_granularity

SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True, slots=True)
class Bf16:
    """Plain numbers: BF16, or F32 where the checkpoint has it."""

    def cut(self, weight: torch.Tensor, rows: Slice, columns: Slice) -> torch.Tensor:
        return weight[rows.start : rows.stop, columns.start : columns.stop]


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """E4M3 with one F32 scale per `block` x `block` weights: W[i, j] = q[i, j] * scale[i // block, j // block].

    After a cut the scales may be finer than the checkpoint's: `rows_per_scale` and `columns_per_scale` say how fine.
    """

    block: int = 128

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // self.block), -(-columns // self.block)

    def cut(
        self, weight: torch.Tensor, scale: torch.Tensor, rows: Slice, columns: Slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes [R, C] of a slice and its scales, repeated to the granularity that divides the slice.

        Args:
            weight: [N, K] float8_e4m3fn.
            scale: [ceil(N / block), ceil(K / block)] float32.

        Returns:
            q [R, C] float8_e4m3fn and scales [R / r, C / c] float32 with r, c from `scale_granularity`.
        """
        row_step, column_step = scale_granularity(rows.size, self.block), scale_granularity(columns.size, self.block)
        row_index = torch.arange(rows.start, rows.stop, row_step) // self.block
        column_index = torch.arange(columns.start, columns.stop, column_step) // self.block
        fine = scale.index_select(0, row_index).index_select(1, column_index)
        return weight[rows.start : rows.stop, columns.start : columns.stop], fine


def dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Numbers [R, C] float32 of FP8 bytes [R, C] and block scales [R / r, C / c]."""
    rows, columns = scale.shape
    blocks = weight.to(torch.float32).view(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns)
    return (blocks * scale[:, None, :, None]).view(weight.shape)

"""A norm of few tokens whose last factor the product behind it takes over, on the GPU, against float64."""

from __future__ import annotations

import packed_support as support
import pytest
import torch

from saddle.kernels import fused_norm, linear, quant, tiles

pytestmark = support.needs_gpu
EPS = 1e-6


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 100, 128])
def test_norm_and_product(size: int) -> None:
    torch.manual_seed(size)
    for chip in support.targets():
        for rows, width in ((8192, 3072), (2048, 256)):
            matrix, weight = support.fp8_weight(rows, width), torch.rand(width, device="cuda") + 0.5
            scale = torch.logspace(-3, 3, size, device="cuda")[:, None]  # eps counts in the first tokens
            parts = torch.randn(8, size, width, device="cuda") * scale
            start = torch.randn(size, width, device="cuda") * scale
            wanted_x = start.double() + parts.double().sum(0)
            dtype = chip.fp8_dtype if chip.has_fp8_dot else torch.bfloat16
            found = []
            for _ in range(2):
                x, h = start.clone(), quant.allocate(size, width, dtype, "cuda")
                squares = support.poisoned(width // 128, size)
                h.data.view(torch.uint8).fill_(0x7F)
                out = support.poisoned(size, rows, dtype=torch.bfloat16)
                fused_norm.add_norm(x, parts, weight, EPS, h, 2 if chip.has_pdl else 0, squares)
                linear.linear(h, matrix, out, chip, 2 if chip.has_pdl else 0, squares=squares, eps=EPS)
                found.append(out)
            assert torch.equal(*found), "same bits"
            assert support.error(x, wanted_x) < 1e-6
            inverse = (wanted_x.square().mean(-1, keepdim=True) + EPS).rsqrt()
            limit = 3e-3 if h.scale is None else 0.04
            each = quant.dequantise(h).double() * inverse
            assert support.error(each, wanted_x * inverse * weight.double()) < limit
            # Every token by itself: a large one would hide what is wrong with a small one.
            product = each @ tiles.dequantise(matrix).double().T
            assert ((out.double() - product).norm(dim=-1) / product.norm(dim=-1)).max() < 5e-3

"""RMSNorm and partial rotary embedding.

M2 normalises q over its whole width (all heads) and k over its whole width, before the split into heads, and then
rotates the first half of each head's dimensions in NeoX pairs (i, i + rotary_dim / 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, squares summed in float32.

    Args:
        x: [..., N]; weight: [N] of the same dtype.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotary_table(
    rotary_dim: int, theta: float, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotary_dim / 2] of position * theta^(-2 i / rotary_dim), computed in float32."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    frequencies = 1.0 / theta**exponents
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `2 * cos.shape[-1]` dims of each head; the others pass through.

    Args:
        x: [T, heads, D]; cos, sin: [T, 1, R / 2] for rotary_dim R.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

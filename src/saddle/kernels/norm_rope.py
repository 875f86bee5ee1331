"""RMSNorm and partial rotary embedding.

M2 normalises q over its whole width (all heads) and k over its whole width, before the split into heads, and then
rotates the first half of each head's dimensions in NeoX pairs (i, i + rotary_dim / 2).
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; everything but the result in float32.

    Args:
        x: [T, N]; weight: [N], of the same dtype.

    Returns:
        [T, N], contiguous.
    """
    wide = x.to(torch.float32)
    return wide.mul(_inverse_rms(wide, eps)).mul_(weight).to(x.dtype)


def rms_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """`rms_norm` in place; x may be a slice of columns."""
    if x.dtype == torch.float32:
        x.mul_(_inverse_rms(x, eps)).mul_(weight)
    else:
        x.copy_(rms_norm(x, weight, eps))


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    # Five small operations: on a CPU this takes 0.6 of the time of torch's rms_norm.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((1,), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def rotary_table(
    rotary_dim: int, theta: float, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotary_dim / 2] of position * theta^(-2 i / rotary_dim), computed in float32."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    frequencies = 1.0 / theta**exponents
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotation(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `rotary_table` [T, R / 2] as `rotate_` wants them: each [T, 1, 2, R / 2], (cos, cos) and (-sin, sin)."""
    return torch.stack((cos, cos), dim=1).unsqueeze(1), torch.stack((-sin, sin), dim=1).unsqueeze(1)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first R dims of each head in place: (a, b) -> (a cos - b sin, b cos + a sin); the rest stays.

    Args:
        x: [T, heads, D]; heads and D adjacent in memory.
        cos, sin: from `rotation`.
    """
    half = cos.shape[-1]
    pairs = x[..., : 2 * half].view(*x.shape[:-1], 2, half)
    swapped = pairs.flip(-2)
    pairs.mul_(cos).addcmul_(swapped, sin)

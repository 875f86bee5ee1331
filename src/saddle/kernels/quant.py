"""FP8 activations: E4M3 numbers with one float32 scale per token and 128 columns (W8A8), or plain bf16 (W8A16).

    scale = max(|x|) / 448,  data = round(x / scale)     over each 128 columns of a token

448 is the largest number of E4M3; E4M3FNUZ (gfx942) ends at 240. The scale of a group of zeros is tiny, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 128
MIN_ABSMAX = 1e-10
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}


@dataclass(frozen=True, slots=True)
class Activation:
    """Input of a matrix product.

    data    [T, K] E4M3, or bf16 where scale is None
    scale   [T, K / 128] float32
    """

    data: torch.Tensor
    scale: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        scales = 0 if self.scale is None else self.scale.numel() * self.scale.element_size()
        return self.data.numel() * self.data.element_size() + scales

    def __getitem__(self, rows: slice) -> Activation:
        """Some rows, as views."""
        return Activation(self.data[rows], None if self.scale is None else self.scale[rows])


def allocate(num_tokens: int, width: int, dtype: torch.dtype, device: torch.device | str) -> Activation:
    """Zeros, so that rows which no kernel writes are finite; dtype bfloat16 has no scales."""
    data = torch.zeros(num_tokens, width, dtype=torch.uint8 if dtype in FP8_MAX else dtype, device=device)
    if dtype not in FP8_MAX:
        return Activation(data, None)
    return Activation(data.view(dtype), torch.zeros(num_tokens, width // GROUP, device=device))


def quantise(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Activation:
    """The reference: x [T, K] as an activation of the given FP8 type, or of bfloat16."""
    if dtype not in FP8_MAX:
        return Activation(x.to(dtype), None)
    groups = torch.unflatten(x.to(torch.float32), -1, (-1, GROUP))
    scale = groups.abs().amax(-1).clamp_(min=MIN_ABSMAX) / FP8_MAX[dtype]
    return Activation((groups / scale[..., None]).to(dtype).flatten(-2), scale)


def dequantise(activation: Activation) -> torch.Tensor:
    """Values [T, K] float32."""
    wide = activation.data.to(torch.float32)
    if activation.scale is None:
        return wide
    return wide.mul_(activation.scale.repeat_interleave(GROUP, -1))

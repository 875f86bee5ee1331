"""The demo's model for training and scoring: MiniMax-M2 in a small shape, plain PyTorch.

All experts are computed for every token and weighted with zero where they were not chosen: at this size two large
products beat any routing. The math is that of the released model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    hidden: int = 256
    layers: int = 6
    heads: int = 12
    kv_heads: int = 2
    head_dim: int = 128
    rotary: int = 64
    experts: int = 16
    top_k: int = 4
    width: int = 128
    vocabulary: int = 1024
    context: int = 4096
    theta: float = 5e6


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of the dims of x [B, heads, T, D] in pairs (i, i + 32)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class Layer(nn.Module):
    """One layer; `dtype` is what products run in, the router stays float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

        def matrix(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size) * 0.02)

        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_norm, self.post_norm = nn.Parameter(torch.ones(shape.hidden)), nn.Parameter(torch.ones(shape.hidden))
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(q)), nn.Parameter(torch.ones(kv))
        self.q, self.k, self.v = matrix(q, shape.hidden), matrix(kv, shape.hidden), matrix(kv, shape.hidden)
        self.o = matrix(shape.hidden, q)
        self.gate = matrix(shape.experts, shape.hidden)
        self.w1, self.w3 = (matrix(shape.experts, shape.width, shape.hidden) for _ in range(2))
        self.w2 = matrix(shape.experts, shape.hidden, shape.width)
        self.bias: torch.Tensor
        self.register_buffer("bias", torch.zeros(shape.experts))

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [B, heads, T, D], rotated k and v [B, kv_heads, T, D] of x [B, T, H]."""
        s, dtype = self.shape, x.dtype
        h = F.rms_norm(x, (s.hidden,), self.input_norm.to(dtype), EPS)
        q = F.rms_norm(F.linear(h, self.q.to(dtype)), self.q_norm.shape, self.q_norm.to(dtype), EPS)
        k = F.rms_norm(F.linear(h, self.k.to(dtype)), self.k_norm.shape, self.k_norm.to(dtype), EPS)
        v = F.linear(h, self.v.to(dtype))
        q, k, v = (t.unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for t in (q, k, v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def experts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, T, H] of the experts, and how many tokens each one got [E]."""
        s, dtype = self.shape, x.dtype
        h = F.rms_norm(x, (s.hidden,), self.post_norm.to(dtype), EPS).flatten(0, 1)
        score = torch.sigmoid(F.linear(h.float(), self.gate))
        chosen = torch.zeros_like(score).scatter_(-1, (score + self.bias).topk(s.top_k, -1).indices, 1.0)
        weight = score * chosen
        weight = weight / weight.sum(-1, keepdim=True)
        up = F.linear(h, self.w3.flatten(0, 1).to(dtype))
        active = F.silu(F.linear(h, self.w1.flatten(0, 1).to(dtype))) * up  # [N, E * W]
        active = (active.unflatten(-1, (s.experts, s.width)) * weight.unsqueeze(-1).to(dtype)).flatten(1)
        out = active @ self.w2.transpose(1, 2).flatten(0, 1).to(dtype)
        return out.view_as(x), chosen.sum(0)


class Model(nn.Module):
    """ids [B, T] -> logits [B, T, V] and loads [layers, experts]."""

    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden) * 0.02)
        self.head = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden) * 0.02)
        self.layers = cast("list[Layer]", nn.ModuleList(Layer(shape) for _ in range(shape.layers)))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        frequencies = shape.theta ** (-torch.arange(0, shape.rotary, 2).float() / shape.rotary)
        angles = torch.arange(shape.context).float()[:, None] * frequencies
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.embedding(ids, self.embed.to(dtype))
        cos, sin = self.cos[: ids.shape[1]].to(dtype), self.sin[: ids.shape[1]].to(dtype)
        loads = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            q, k, v = layer.project(x, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).flatten(2), layer.o.to(dtype))
            out, load = layer.experts(x)
            x = x + out
            loads.append(load)
        x = F.rms_norm(x, (self.shape.hidden,), self.norm.to(dtype), EPS)
        return F.linear(x, self.head.to(dtype)), torch.stack(loads)

    def quantised(self) -> list[nn.Parameter]:
        """The weights that the checkpoint holds in FP8."""
        return [p for layer in self.layers for p in (layer.q, layer.k, layer.v, layer.o, layer.w1, layer.w3, layer.w2)]


def quantise(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 and scales of 128 x 128 blocks of the last two dims: weight = q * scale."""
    *lead, rows, columns = weight.shape
    blocks = weight.float().view(*lead, rows // block, block, columns // block, block)
    scale = blocks.abs().amax((-3, -1)).clamp_min(1e-12) / 448
    q = (blocks / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(weight.shape), scale


def dequantise(q: torch.Tensor, scale: torch.Tensor, block: int = 128) -> torch.Tensor:
    *lead, rows, columns = q.shape
    blocks = q.float().view(*lead, rows // block, block, columns // block, block)
    return (blocks * scale[..., :, None, :, None]).view(q.shape)

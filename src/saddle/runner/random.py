"""Random numbers as a pure function of (seed, position, token id).

A row's noise does not depend on its batch, its row, earlier draws or the device: equal logits give equal tokens.
Integer arithmetic modulo 2^32 in int64 is exact everywhere; the mixing function is the 32-bit finaliser known as
lowbias32 (Chris Wellons, "Prospecting for hash functions").
"""

from __future__ import annotations

import torch

MASK = 0xFFFFFFFF


def mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit values held in int64; a bijection."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for each candidate: argmax(logits + noise) samples from softmax(logits).

    Args:
        seeds: [S] int64, all 64 bits count.
        positions: [S] int64, the position that the token will take.
        token_ids: [S, K] int64.

    Returns:
        [S, K] float64.
    """
    key = mix(mix((seeds & MASK) ^ 0x9E3779B9) ^ ((seeds >> 32) & MASK))
    key = mix(key ^ (positions & MASK)).unsqueeze(1)
    bits = mix(mix(token_ids ^ key) ^ mix(key ^ 0x85EBCA6B))
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))

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
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(MASK)
    x = x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(MASK)
    return x.bitwise_xor_(x >> 16)


def _mix_number(x: int) -> int:
    """`mix` of one number; a tensor operation takes longer than all of this."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def key_numbers(seed: int) -> tuple[int, int]:
    """Two keys of 32 bits; all 64 bits of the seed count in both."""
    low, high = seed & MASK, (seed >> 32) & MASK
    return (
        _mix_number(_mix_number(low ^ 0x9E3779B9) ^ high),
        _mix_number(_mix_number(high ^ 0x85EBCA6B) ^ low),
    )


def keys_of(seed: int) -> torch.Tensor:
    """[2] int64: `key_numbers`."""
    return torch.tensor(key_numbers(seed), dtype=torch.int64)


def uniform(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1), odd multiples of 2^-33, all different within a row.

    Args:
        keys: [S, 2] int64, rows from `keys_of`.
        positions: [S] int64, the position that the token will take, below 2^32.
        token_ids: [S, K] int64.

    Returns:
        [S, K] float64.
    """
    first, second = mix(keys ^ positions.unsqueeze(1)).chunk(2, dim=1)
    bits = mix(mix(token_ids ^ first) ^ second)
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-32)


def gumbel(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for each candidate: argmax(logits + noise) samples from softmax(logits).

    Arguments and result as `uniform`.
    """
    return uniform(keys, positions, token_ids).log_().neg_().log_().neg_()

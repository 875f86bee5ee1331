"""The random stream: a function of seed, position and token id alone, uniform, and the same on every device."""

from __future__ import annotations

import math

import torch

from saddle.runner.random import gumbel, keys_of, mix, uniform

MASK = 0xFFFFFFFF
GOLDEN = [0.175376, 0.856022, 0.814246]  # seed 42, position 100, ids 0 to 2


def python_mix(x: int) -> int:
    """The published 32-bit finaliser, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def python_uniform(seed: int, position: int, token_id: int) -> float:
    low, high = seed & MASK, seed >> 32 & MASK
    first = python_mix(python_mix(python_mix(low ^ 0x9E3779B9) ^ high) ^ position)
    second = python_mix(python_mix(python_mix(high ^ 0x85EBCA6B) ^ low) ^ position)
    return (python_mix(python_mix(token_id ^ first) ^ second) + 0.5) / 2**32


def noise(seed: int, position: int, num_ids: int) -> torch.Tensor:
    return uniform(keys_of(seed)[None], torch.tensor([position]), torch.arange(num_ids)[None])[0]


def test_exact_integers_whatever_computes_them() -> None:
    values = [0, 1, 2, 0x7FFFFFFF, 0x80000000, MASK, 200_063]
    assert mix(torch.tensor(values)).tolist() == [python_mix(value) for value in values]
    for seed, position in ((0, 0), (1, 5), (-1, 7), (2**63 - 1, 196_607), (-(2**63), 1), (2**40, 3)):
        expected = [python_uniform(seed, position, token_id) for token_id in range(40)]
        assert noise(seed, position, 40).tolist() == expected


def test_values_of_this_release() -> None:
    """A request with a seed gives the same text after an update: these numbers do not change."""
    assert [round(value, 6) for value in noise(42, 100, 3).tolist()] == GOLDEN


def test_uniform_and_uncorrelated() -> None:
    count = 1 << 16
    base = noise(3, 17, count)
    assert len(base.unique()) == count
    assert base.min() > 0 and base.max() < 1
    cells = torch.histc(base, 256, 0, 1)
    distance = float(((cells - count / 256) ** 2 / (count / 256)).sum())
    assert abs(distance - 255) < 5 * math.sqrt(2 * 255)
    for other in (noise(4, 17, count), noise(3, 18, count), noise(3 + (1 << 32), 17, count), noise(-3, 17, count),
                  base.roll(1)):  # fmt: skip
        correlation = torch.corrcoef(torch.stack((base, other)))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(count)


def test_one_id_over_many_positions_and_seeds() -> None:
    """The stream along a request, and across requests, is as good as the one along the vocabulary."""
    count = 1 << 14
    keys = keys_of(9).expand(count, 2)
    along = uniform(keys, torch.arange(count), torch.full((count, 1), 77))[:, 0]
    across = uniform(torch.stack([keys_of(seed) for seed in range(count)]), torch.full((count,), 5),
                     torch.full((count, 1), 77))[:, 0]  # fmt: skip
    for found in (along, across):
        cells = torch.histc(found, 64, 0, 1)
        distance = float(((cells - count / 64) ** 2 / (count / 64)).sum())
        assert abs(distance - 63) < 5 * math.sqrt(2 * 63)


def test_gumbel_has_mean_and_variance_of_the_standard_one() -> None:
    found = gumbel(keys_of(1)[None], torch.tensor([0]), torch.arange(1 << 16)[None])
    assert torch.isfinite(found).all()
    assert abs(found.mean() - 0.5772157) < 0.025
    assert abs(found.var() - math.pi**2 / 6) < 0.06

"""Whole numbers that grids and constants are made of.

Triton's functions of the same names also serve inside kernels, and take the host two microseconds a call.
"""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """Parts of `size` that hold `count`."""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`, at least 1."""
    return 1 << max(0, number - 1).bit_length()

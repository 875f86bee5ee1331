# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Gumbel noise inside Triton kernels: the same function of (seed, position, token id) as `runner.random`.

The integers are equal bit for bit. The reference takes its two logarithms in float64; here they are float32, arranged
so that nothing cancels: with bits b, u = (b + 1/2) / 2^32 and w = 1 - u known exactly, -log(u) near u = 1 is
log1p(-w) by Kahan's correction, log(y) * w / (y - 1) with y = 1 - w rounded. The noise then differs from the
reference by less than 1e-5.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix32(x):
    """Scramble uint32 values: the finaliser lowbias32, as `runner.random.mix`."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def gumbel(first, second, token_ids):
    """Standard Gumbel noise, float32, in the shape of `token_ids` (int32).

    first, second: uint32 scalars, mix32(key ^ position) of the row's two keys.
    """
    bits = mix32(mix32(token_ids.to(tl.uint32, bitcast=True) ^ first) ^ second)
    is_high = bits >= tl.full([], 0x80000000, tl.uint32)
    # Of u and w = 1 - u the smaller one: both are odd multiples of 2^-33, which float32 rounds by 2^-24 of the value.
    small = (tl.where(is_high, ~bits, bits).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    y = tl.where(is_high, 1.0 - small, small)
    minus_log = -tl.log(y)
    step = 1.0 - y
    corrected = tl.where(step == 0.0, small, minus_log * (small / tl.where(step == 0.0, 1.0, step)))
    return -tl.log(tl.where(is_high, corrected, minus_log))

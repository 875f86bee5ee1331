# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The inner loops of decode attention: online softmax of a tile of 16 query rows over some blocks of paged memory.

Both read whole blocks of 64 tokens in the layout of `paged_kv`, keep several in flight, and never read what lies
behind a row's context. Callers: `paged_decode`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saddle.kernels.paged_kv import swizzled


@triton.jit
def attend(queries, kv, table, start, num_blocks, limit, head, column,
            KV_HEADS: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Online softmax over the blocks of an item.

    Returns largest scores [16], sums of weights [16] and unnormalised outputs [16, 128].
    """
    within = tl.arange(0, 64)
    offsets = swizzled(within, column, CHUNK, 128)
    best = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    result = tl.zeros([16, 128], tl.float32)
    # Block ids are fetched one turn ahead: as a load inside the same turn they would take half of the stages.
    block = tl.load(table + start)
    for index in tl.range(start, start + num_blocks, num_stages=STAGES):
        plane = (block.to(tl.int64) * (2 * KV_HEADS) + head) * 64
        block = tl.load(table + tl.minimum(index + 1, start + num_blocks - 1))
        known = index * 64 + within < limit
        # What lies behind the context may be anything that a freed row left, NaN too: it must not be read.
        keys = tl.load(kv + plane * 128 + offsets, mask=known[:, None], other=0.0, eviction_policy="evict_first")
        values = tl.load(kv + (plane + KV_HEADS * 64) * 128 + offsets, mask=known[:, None], other=0.0,
                         eviction_policy="evict_first")  # fmt: skip
        scores = tl.where(known[None, :], tl.dot(queries, tl.trans(keys)), -1e30)
        higher = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - higher)
        weights = tl.where(known[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(queries.dtype), values, result * shrink[:, None])
        best = higher
    return best, total, result


@triton.jit
def _unpacked(pairs, LIKE: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr):
    """First and second number of pairs of FP8 numbers; ASM: by the converter of NVIDIA's sm_89 and later."""
    if ASM:
        # Two pairs a register: convert each, then sort first to first. Four instructions for four numbers, a third of
        # what the plain form compiles to.
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            .reg .b32 a, b;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 a, low;
            cvt.rn.f16x2.e4m3x2 b, high;
            prmt.b32 $0, a, b, 0x5410;
            prmt.b32 $1, a, b, 0x7632;
            }""", "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip
    else:
        first = (pairs & 0xFF).to(tl.uint8).to(LIKE, bitcast=True).to(WIDE)
        second = (pairs >> 8).to(tl.uint8).to(LIKE, bitcast=True).to(WIDE)
    return first, second


@triton.jit
def attend_fp8(queries, kv, kv_scales, k_scale, v_scale, table, start, num_blocks, limit, head,
                KV_HEADS: tl.constexpr, STAGES: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
                SCALES: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """`attend` for FP8 memory, two blocks at a time, read as pairs of numbers: 16-bit elements can be transposed on
    their way from shared memory to the tensor cores (ldmatrix), 8-bit ones cannot. Even and odd columns are
    multiplied apart."""
    WIDE: tl.constexpr = queries.dtype
    LIKE: tl.constexpr = kv.dtype.element_ty
    memory = kv.to(tl.pointer_type(tl.uint16), bitcast=True)
    within = tl.arange(0, TILE)
    offsets = swizzled(within % 64, tl.arange(0, 64), CHUNK // 2, 64)
    stop = start + num_blocks
    limit = tl.minimum(limit, stop * 64)
    even, odd = tl.split(tl.reshape(queries, [16, 64, 2]))
    best = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    result_even = tl.zeros([16, 64], tl.float32)
    result_odd = tl.zeros([16, 64], tl.float32)
    blocks = tl.load(table + tl.minimum(start + within // 64, stop - 1))
    for index in tl.range(start, stop, TILE // 64, num_stages=STAGES):
        plane = (blocks.to(tl.int64) * (2 * KV_HEADS) + head) * 64
        blocks = tl.load(table + tl.minimum(index + TILE // 64 + within // 64, stop - 1))
        known = index * 64 + within < limit
        place = (plane * 64)[:, None] + offsets
        keys = tl.load(memory + place, mask=known[:, None], other=0, eviction_policy="evict_first")
        values = tl.load(memory + KV_HEADS * 64 * 64 + place, mask=known[:, None], other=0,
                         eviction_policy="evict_first")  # fmt: skip
        keys_even, keys_odd = _unpacked(tl.trans(keys), LIKE, WIDE, ASM)
        scores = tl.dot(odd, keys_odd, tl.dot(even, keys_even))
        if SCALES == 1:
            scores *= k_scale
        if SCALES == 2:
            scale_place = kv_scales + plane + within % 64
            scores *= tl.load(scale_place, mask=known, other=0.0)[None, :]
        scores = tl.where(known[None, :], scores, -1e30)
        higher = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - higher)
        weights = tl.where(known[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(weights, 1)
        result_even *= shrink[:, None]
        result_odd *= shrink[:, None]
        values_even, values_odd = _unpacked(values, LIKE, WIDE, ASM)
        if SCALES == 2:
            # Weights times scales would leave float16's range: only their ratio to the largest goes in.
            scale = tl.load(scale_place + KV_HEADS * 64, mask=known, other=0.0)
            largest = tl.maximum(tl.max(scale, 0), 1e-30)
            weights = (weights * (scale / largest)[None, :]).to(WIDE)
            result_even += tl.dot(weights, values_even) * largest
            result_odd += tl.dot(weights, values_odd) * largest
        else:
            weights = weights.to(WIDE)
            result_even = tl.dot(weights, values_even, result_even)
            result_odd = tl.dot(weights, values_odd, result_odd)
        best = higher
    result = tl.reshape(tl.join(result_even, result_odd), [16, 128])
    if SCALES == 1:
        result *= v_scale
    return best, total, result

"""Every Triton kernel, launched at the shapes of M2, so that all of them can be compiled for a GPU that is not there.

`CASES` maps a name to a function that calls one launcher with tensors that have no memory. `compiling(target)` makes
launches compile and not run, for the given GPU family; it yields the list of what was compiled. Used by the test of
all families and to look at the machine code without a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from saddle.kernels import (
    compile_steps,
    experts,
    fused_norm,
    linear,
    paged_decode,
    paged_prefill,
    qk_rope,
    quant,
    router,
    tiles,
)
from saddle.kernels.paged_kv import KVLayer
from saddle.kernels.quant import Activation
from saddle.kernels.target import SHARED_BYTES, Target
from saddle.kernels.tiles import Bf16Tiles, Fp8Tiles, NibbleTiles, PackedMatrix, TileFormat

HIDDEN, HEADS_WIDTH, QKV_WIDTH, EXPERTS, TOP_K, INTERMEDIATE = 3072, 6144, 8192, 256, 8, 1536

Case = Callable[[Target], None]


class _NoDriver:
    """Stands for the driver of a GPU that is not there: Triton asks it what to compile for."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target = target
        self.device = device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def compiling(target: Target) -> Iterator[list[Any]]:
    """Launches compile for `target` instead of running."""
    gpu = GPUTarget("cuda", target.capability, 32) if target.is_cuda else GPUTarget("hip", target.arch, 64)
    run, made = JITFunction.run, []

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        made.append(run(self, *args, **{**options, "warmup": True}))
        return made[-1]

    driver = triton.runtime.driver
    before = driver._active
    JITFunction.run = compile_only
    # Kernels remember the family of a device: every family is a device of its own.
    driver.set_active(_NoDriver(gpu, list(SHARED_BYTES).index(target.arch)))
    try:
        yield made
    finally:
        JITFunction.run = run
        driver._active = before


def fp8_matrix(
    target: Target, rows: int, columns: int, lead: tuple[int, ...] = (), interleaved: bool = False
) -> PackedMatrix:
    return tiles.allocate(rows, columns, Fp8Tiles(fnuz=target.is_fnuz), "meta", lead, interleaved)


def activation(target: Target, num_tokens: int, width: int) -> Activation:
    return quant.allocate(num_tokens, width, target.fp8_dtype if target.has_fp8_dot else torch.bfloat16, "meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(num_tokens: int, target: Target) -> None:
    qkv, o = fp8_matrix(target, QKV_WIDTH, HIDDEN), fp8_matrix(target, HIDDEN, HEADS_WIDTH)
    pdl = 2 if target.has_pdl else 0
    linear.linear(activation(target, num_tokens, HIDDEN), qkv, empty(num_tokens, QKV_WIDTH, dtype=torch.bfloat16),
                  target, pdl)  # fmt: skip
    add = num_tokens > linear.MAX_FEW_TOKENS  # as the model does it
    out = empty(num_tokens, HIDDEN) if add else empty(linear.split_k(num_tokens, o, target), num_tokens, HIDDEN)
    linear.linear(activation(target, num_tokens, HEADS_WIDTH), o, out, target, pdl, add=add)


def _linear_nibbles(tile_format: NibbleTiles, target: Target) -> None:
    """Attention of a checkpoint that quantises it too."""
    qkv, pdl = tiles.allocate(QKV_WIDTH, HIDDEN, tile_format, "meta"), 2 if target.has_pdl else 0
    for num_tokens in (8, 8192):
        a, out = quant.allocate(num_tokens, HIDDEN, torch.bfloat16, "meta"), empty(num_tokens, QKV_WIDTH)
        linear.linear(a, qkv, out, target, pdl)


def _lm_head(num_tokens: int, target: Target) -> None:
    matrix = tiles.allocate(200064, HIDDEN, Bf16Tiles(), "meta")
    linear.lm_head(empty(num_tokens, HIDDEN, dtype=torch.bfloat16), matrix, empty(num_tokens, 200064), target)


def _route(num_tokens: int, uniform: bool, target: Target) -> None:
    work = router.RouterWork.allocate(num_tokens, HIDDEN, EXPERTS, TOP_K, "meta")
    ids = empty(num_tokens, dtype=torch.int32)
    router.route(empty(num_tokens, HIDDEN), empty(1, num_tokens, HIDDEN), empty(HIDDEN), 1e-6, empty(HIDDEN, EXPERTS),
                 empty(EXPERTS), ids, ids, 1, uniform, work, activation(target, num_tokens, HIDDEN), target,
                 2 if target.has_pdl else 0)  # fmt: skip


def _experts(num_tokens: int, target: Target, tile_format: TileFormat | None = None) -> None:
    work = router.RouterWork.allocate(num_tokens, HIDDEN, EXPERTS, TOP_K, "meta")
    tile_format = tile_format or Fp8Tiles(fnuz=target.is_fnuz)
    w13 = tiles.allocate(2 * INTERMEDIATE, HIDDEN, tile_format, "meta", (EXPERTS,), True)
    w2 = tiles.allocate(HIDDEN, INTERMEDIATE, tile_format, "meta", (EXPERTS,))
    pairs = num_tokens * TOP_K
    out = empty(pairs, HIDDEN, dtype=experts.pair_dtype(num_tokens, EXPERTS, TOP_K))
    widths = (num_tokens, HIDDEN), (pairs, INTERMEDIATE)
    if isinstance(tile_format, NibbleTiles):
        h, act = (quant.allocate(*width, torch.bfloat16, "meta") for width in widths)
    else:
        h, act = (activation(target, *width) for width in widths)
    experts.experts(h, w13, w2, work, act, out, target, 2 if target.has_pdl else 0)


def _norms(num_tokens: int, target: Target) -> None:
    x, weight, pdl = empty(num_tokens, HIDDEN), empty(HIDDEN), 2 if target.has_pdl else 0
    ids, table = empty(num_tokens, dtype=torch.int32), empty(200064, HIDDEN, dtype=torch.bfloat16)
    pairs = empty(num_tokens, TOP_K, HIDDEN, dtype=experts.pair_dtype(num_tokens, EXPERTS, TOP_K)).transpose(0, 1)
    out = activation(target, num_tokens, HIDDEN)
    fused_norm.embed_norm(ids, table, x, weight, 1e-6, out, pdl)
    fused_norm.add_norm(x, pairs, weight, 1e-6, out, pdl)
    fused_norm.final_norm(x, pairs, ids, weight, 1e-6, empty(num_tokens, HIDDEN, dtype=torch.bfloat16), pdl)


def _kv(kind: str, target: Target) -> KVLayer:
    shape = (100, 2, 8, 64, 128)
    if kind == "bf16":
        return KVLayer(empty(*shape, dtype=torch.bfloat16))
    data = empty(*shape, dtype=target.fp8_dtype)
    return KVLayer(data, empty(*shape[:4]) if kind == "fp8_dynamic" else None)


def _attention(kind: str, target: Target) -> None:
    """Decode, fused and plain, and prompts."""
    if kind != "bf16" and not target.has_fp8_dot:
        kind = "bf16"  # FP8 memory needs a GPU that converts it
    rows, pdl, kv = 8, 2 if target.has_pdl else 0, _kv(kind, target)
    table = empty(200000, 32)
    ids, tables = empty(rows + 1, dtype=torch.int32), empty(rows, 3200, dtype=torch.int32)
    qkv, q = empty(rows, QKV_WIDTH, dtype=torch.bfloat16), empty(rows, HEADS_WIDTH, dtype=torch.bfloat16)
    q_norm, k_norm, out = empty(HEADS_WIDTH), empty(8 * 128), activation(target, rows, HEADS_WIDTH)
    qk_rope.qk_rope_write(qkv, q_norm, k_norm, 1e-6, table, table, ids, empty(rows, dtype=torch.int64), kv, q, pdl)
    if target.capability == 90:
        qk_rope.kv_write(qkv, empty(rows, HEADS_WIDTH // 128), k_norm, 1e-6, table, table, ids,
                         empty(rows, dtype=torch.int64), kv, empty(rows), pdl)  # fmt: skip
    work = paged_decode.DecodeWork.allocate(rows, 8, target, torch.device("meta"))
    paged_decode.plan_decode(ids, work, rows, pdl)
    paged_decode.decode_fused(qkv, q_norm, k_norm, 1e-6, table, table, kv, tables, ids, ids, work, rows, out, pdl)
    paged_decode.decode(q, kv, tables, ids, ids, work, rows, out, pdl)
    paged_prefill.prefill(q, kv, tables, ids, ids, ids, 0, rows, rows, out, target, pdl)
    if kind == "bf16":
        parts = paged_prefill.PrefillWork.allocate(target, torch.device("meta"))
        paged_prefill.prefill(q, kv, tables, ids, ids, ids, 0, rows, rows, out, target, pdl, parts, 100_000)


CASES: dict[str, Case] = {
    "linear, 8 tokens": lambda target: _linear(8, target),
    "linear, 8192 tokens": lambda target: _linear(8192, target),
    "linear, INT4": lambda target: _linear_nibbles(NibbleTiles("int4", 32), target),
    "linear, NVFP4": lambda target: _linear_nibbles(NibbleTiles("e2m1", 16), target),
    "lm_head, 8 tokens": lambda target: _lm_head(8, target),
    "lm_head, 256 tokens": lambda target: _lm_head(256, target),
    "router, 8 tokens": lambda target: _route(8, False, target),
    "router, 8192 tokens": lambda target: _route(8192, True, target),
    "experts, 1 token": lambda target: _experts(1, target),
    "experts, 64 tokens": lambda target: _experts(64, target),
    "experts, 8192 tokens": lambda target: _experts(8192, target),
    "experts, NVFP4, 8 tokens": lambda target: _experts(8, target, NibbleTiles("e2m1", 16)),
    "experts, INT4, 8192 tokens": lambda target: _experts(8192, target, NibbleTiles("int4", 128)),
    "norms, 8 tokens": lambda target: _norms(8, target),
    "norms, 8192 tokens": lambda target: _norms(8192, target),
    "attention, bf16": lambda target: _attention("bf16", target),
    "attention, static FP8": lambda target: _attention("fp8", target),
    "attention, dynamic FP8": lambda target: _attention("fp8_dynamic", target),
    "step inputs": compile_steps.launch_inputs,
    "sampling": compile_steps.launch_sampling,
}

"""Attention of prompts on sm_90 over bf16 or static FP8 memory: CUDA C++ with wgmma, one launch.

The kernel is `cuda/prefill*.cu(h)`; this file says what it supports, compiles it for a number of heads, and launches
it. It computes what `paged_prefill` computes with its Triton kernel, for any rows, tiles and splits alike, so the same
second launch adds up split keys. Blocks of threads claim tiles at run time and the host never waits.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch

from saddle.kernels import nvrtc
from saddle.kernels.paged_kv import BLOCK_SIZE, DYNAMIC, HEAD_DIM, UNSCALED, KVLayer
from saddle.kernels.quant import Activation
from saddle.kernels.target import Target
from saddle.version import VERSION

logger = logging.getLogger(__name__)

# As prefill_shapes.cuh.
LINES, KEYS = 128, 128
STAGES = 2
BF16_QUERY_SLOTS, FP8_QUERY_SLOTS = 2, 1
BLOCK_THREADS = 384
MAX_ROWS = 1024
MAX_TILES = 2**16 - 1
# As cuda.h.
TENSOR_MAP_BYTES = 128
TYPE_UINT8, TYPE_BFLOAT16 = 0, 9
INTERLEAVE_NONE, SWIZZLE_NONE, SWIZZLE_128B, PROMOTION_256B, FILL_NONE = 0, 0, 3, 3, 0

_Map = ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8)
_POINTERS = ("query_factors", "block_tables", "row_ids", "query_starts", "context_lens", "output", "output_scales",
             "partial", "stats", "queue")  # fmt: skip


class Params(ctypes.Structure):
    """`Params` of prefill_work.cuh."""

    _fields_ = [
        ("queries", _Map),
        ("memory", _Map),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in ("table_stride", "first_row", "num_rows", "num_splits")),
        *((name, ctypes.c_float) for name in ("k_scale", "v_scale")),
        ("padding", ctypes.c_int * 6),  # the maps are aligned to 64 bytes, so the whole is a multiple of them
    ]


def unsupported(kv: KVLayer, num_heads: int, target: Target) -> str | None:
    """Why the kernel cannot serve this memory on this GPU; None: it can."""
    if target.capability != 90:
        return f"it needs sm_90, this is {target.arch}"
    if kv.scale_kind == DYNAMIC:
        return "keys and values have a scale for each token"
    if kv.data.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"it needs bfloat16 or float8_e4m3fn keys and values, these are {kv.data.dtype}"
    if num_heads % kv.num_kv_heads or num_heads // kv.num_kv_heads > LINES:
        return f"{num_heads} query heads over {kv.num_kv_heads} do not fill its tiles"
    return None


def prepare(
    kv: KVLayer, num_heads: int, target: Target, cache_dir: Path | None = None
) -> tuple[PromptAttention | None, str]:
    """The kernel if it runs here, and the line that says what computes attention of prompts, with the reason.

    Args: as `PromptAttention`.
    """
    why = unsupported(kv, num_heads, target)
    if why is None and kv.data.device.type != "cuda":
        why = f"the memory is on {kv.data.device.type}"
    if why is None:
        try:
            return PromptAttention(kv, num_heads, target, cache_dir), "attention of prompts: wgmma kernel"
        except nvrtc.CudaError as error:
            why = f"it does not compile here: {error}"
            logger.warning("No wgmma kernel for attention of prompts: %s", error)
    return None, f"attention of prompts: Triton kernel, not the wgmma one, because {why}"


def shared_bytes(fp8: bool) -> int:
    """Dynamic shared memory: queries, rings, of FP8 both parts of the queries, barriers, tiles and sums of tiles."""
    line = 2 * HEAD_DIM
    if fp8:
        rings = FP8_QUERY_SLOTS * LINES * line + 2 * LINES * HEAD_DIM + STAGES * KEYS * (HEAD_DIM + HEAD_DIM + line)
    else:
        rings = (BF16_QUERY_SLOTS * LINES + 2 * STAGES * KEYS) * line
    return rings + 1024 + 1024 + 2 * MAX_ROWS  # 1,024 to align by


def sources() -> dict[str, str]:
    """The kernel's files by name."""
    return nvrtc.sources("prefill.cu")


def compile_options(num_heads: int, kv_heads: int, fp8: bool) -> list[str]:
    """Options of NVRTC for a number of heads and a kind of memory."""
    defines = {
        "KV_HEADS": kv_heads, "GROUP": num_heads // kv_heads, "KEYS": KEYS, "STAGES": STAGES, "FP8": int(fp8),
        "QUERY_SLOTS": FP8_QUERY_SLOTS if fp8 else BF16_QUERY_SLOTS, "MAX_ROWS": MAX_ROWS,
    }  # fmt: skip
    found = ["--gpu-architecture=sm_90a", "--std=c++17", "--device-as-default-execution-space"]
    return [*found, *(f"-DSADDLE_{name}={value}" for name, value in defines.items())]


class PromptAttention:
    """The kernel for a number of heads. Compiles on construction, never later.

    Args:
        kv: of any layer; shape and type are those of all.
        cache_dir: where compiled binaries are kept; None: nowhere.

    Raises:
        ValueError: heads or memory that do not fit.
        CudaError: the kernel does not compile or load.
    """

    LINES, KEYS, MAX_TILES = LINES, KEYS, MAX_TILES  # of a tile, of a turn, of a step

    def __init__(self, kv: KVLayer, num_heads: int, target: Target, cache_dir: Path | None = None) -> None:
        why = unsupported(kv, num_heads, target)
        if why is not None:
            raise ValueError(f"The kernel for attention of prompts does not run here: {why}.")
        self._num_heads, self.num_blocks = num_heads, target.num_sms
        self._queue = torch.zeros(2, dtype=torch.int32, device=kv.data.device)
        self._params: dict[int, Params] = {}
        self._queries: dict[tuple[int, int, int], Any] = {}
        fp8 = kv.scale_kind != UNSCALED
        options = compile_options(num_heads, kv.num_kv_heads, fp8)
        tag = f"{target.arch}-{VERSION}"
        cubin = nvrtc.cached_cubin(cache_dir, "prefill.cu", sources(), options, tag)
        self.kernel = nvrtc.Kernel(cubin, "prefill", shared_bytes(fp8))

    def attend(
        self, q: torch.Tensor, kv: KVLayer, block_tables: torch.Tensor, row_ids: torch.Tensor,
        query_starts: torch.Tensor, context_lens: torch.Tensor, first_row: int, num_rows: int, out: Activation,
        partial: torch.Tensor | None = None, stats: torch.Tensor | None = None, splits: int = 1,
        factors: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Arguments as `paged_prefill.prefill`; with splits > 1 partial results go to `partial` and `stats`."""
        at = kv.data.data_ptr()
        params = self._params.get(at)
        if params is None:
            params = self._params[at] = Params()
            params.memory = memory_map(kv)
            params.queue = self._queue.data_ptr()
            params.k_scale, params.v_scale = kv.k_scale, kv.v_scale
        params.queries = self._queries_map(q, kv.num_kv_heads)
        params.query_factors = None if factors is None else factors.data_ptr()
        params.block_tables, params.row_ids = block_tables.data_ptr(), row_ids.data_ptr()
        params.query_starts, params.context_lens = query_starts.data_ptr(), context_lens.data_ptr()
        params.output = out.data.data_ptr()
        params.output_scales = None if out.scale is None else out.scale.data_ptr()
        params.partial = None if partial is None else partial.data_ptr()
        params.stats = None if stats is None else stats.data_ptr()
        params.table_stride, params.first_row = block_tables.stride(0), first_row
        params.num_rows, params.num_splits = num_rows, splits
        stream = torch._C._cuda_getCurrentRawStream(q.get_device())
        self.kernel.launch_apart(self.num_blocks, BLOCK_THREADS, params, stream)

    def _queries_map(self, q: torch.Tensor, kv_heads: int) -> Any:
        """The tensor map of a step's queries; those of a few numbers of tokens are kept."""
        key = (q.data_ptr(), len(q), q.stride(0))
        found = self._queries.get(key)
        if found is None:
            if len(self._queries) >= 64:
                self._queries.clear()
            group, token_bytes = self._num_heads // kv_heads, q.stride(0) * 2
            found = self._queries[key] = tensor_map(
                TYPE_BFLOAT16, key[0], (HEAD_DIM, self._num_heads, len(q)), (HEAD_DIM * 2, token_bytes),
                (HEAD_DIM // 2, group, LINES // group), SWIZZLE_128B,
            )  # fmt: skip
        return found


def memory_map(kv: KVLayer) -> Any:
    """A box is 128 bytes of a block's 64 tokens, as they lie: half of bf16 numbers, all of FP8 ones."""
    size = kv.data.element_size()
    return tensor_map(
        TYPE_UINT8 if size == 1 else TYPE_BFLOAT16, kv.data.data_ptr(), (HEAD_DIM, kv.data.numel() // HEAD_DIM),
        (HEAD_DIM * size,), (HEAD_DIM // size, BLOCK_SIZE), SWIZZLE_NONE,
    )  # fmt: skip


def tensor_map(
    kind: int, at: int, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> Any:  # fmt: skip
    """How the copy engine sees a tensor at an address: dims and box innermost first, strides in bytes.

    Raises:
        CudaError: the driver does not take it.
    """
    rank = len(dims)
    room = (ctypes.c_uint8 * (TENSOR_MAP_BYTES + 64))()
    to = -(-ctypes.addressof(room) // 64) * 64
    status = nvrtc.driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(to), kind, rank, ctypes.c_void_p(at), (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        INTERLEAVE_NONE, swizzle, PROMOTION_256B, FILL_NONE,
    )  # fmt: skip
    if status:
        raise nvrtc.CudaError(f"cuTensorMapEncodeTiled: error {status} for {dims}, strides {strides}, box {box}")
    return _Map.from_buffer_copy(ctypes.string_at(to, TENSOR_MAP_BYTES))

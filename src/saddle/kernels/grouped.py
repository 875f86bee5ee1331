"""The experts' products over many tokens on sm_90: CUDA C++ with wgmma, two launches over the packed weights.

The kernels are `cuda/grouped*.cu(h)`; this file says what they support, compiles them for a model's shape, and launches
them. They compute what `experts` computes with its Triton kernels, from the same routing, into the same memory: FP8
activations with a scale per 128 columns, products in the matrix units over 128 columns at a time, sums in float32. Work
is claimed tile by tile at run time, so the host never waits and a CUDA graph may capture a launch.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch

from saddle.kernels import nvrtc
from saddle.kernels.quant import Activation
from saddle.kernels.router import MAX_FEW_TOKENS, RouterWork
from saddle.kernels.target import Target
from saddle.kernels.tiles import TILE_BYTES, TILE_ROW_BYTES, TILE_ROWS, Fp8Tiles, PackedMatrix, slot_bytes
from saddle.version import VERSION

logger = logging.getLogger(__name__)

# As grouped_shapes.cuh.
ROWS = 256
BLOCK_THREADS = 384
MAX_COLUMNS = 4096
STAGES, STAGE_BYTES = 4, 48 * 1024
# As cuda.h.
TENSOR_MAP_BYTES = 128
TYPE_UINT8, INTERLEAVE_NONE, SWIZZLE_128B, PROMOTION_256B, FILL_NONE = 0, 0, 3, 3, 0

_POINTERS = ("packed", "input", "input_scales", "counts", "lists", "shares", "output", "output_scales", "queue")


class Params(ctypes.Structure):
    """`Params` of grouped_work.cuh."""

    _fields_ = [
        ("weights", ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8)),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("capacity", ctypes.c_int),
        ("padding", ctypes.c_int * 13),  # the map is aligned to 64 bytes, so the whole is a multiple of them
    ]


def unsupported(w13: PackedMatrix, w2: PackedMatrix, target: Target) -> str | None:
    """Why the kernels cannot serve these weights on this GPU; None: they can."""
    if target.capability != 90:
        return f"they need sm_90, this is {target.arch}"
    if w13.format != Fp8Tiles() or w2.format != Fp8Tiles():
        return f"they need FP8 tiles with scales of 128 columns, the experts are {w13.format} and {w2.format}"
    if w2.num_rows % ROWS or w13.num_rows % ROWS:
        return f"they need a hidden size that is a multiple of {ROWS}, not {w2.num_rows}"
    if max(w13.num_cols, w2.num_cols) > MAX_COLUMNS or w13.data.shape[0] > BLOCK_THREADS:
        return f"they are for at most {MAX_COLUMNS} columns and {BLOCK_THREADS} experts"
    return None


def prepare(
    w13: PackedMatrix, w2: PackedMatrix, top_k: int, target: Target, cache_dir: Path | None = None
) -> tuple[GroupedExperts | None, str]:
    """The kernels if they run here, and the line that says what computes the experts of many tokens, with the reason.

    Args: as `GroupedExperts`.
    """
    why = unsupported(w13, w2, target)
    if why is None and w13.data.device.type != "cuda":
        why = f"the weights are on {w13.data.device.type}"
    if why is None:
        try:
            line = f"experts of more than {MAX_FEW_TOKENS} tokens: wgmma kernels"
            return GroupedExperts(w13, w2, top_k, target, cache_dir), line
        except nvrtc.CudaError as error:
            why = f"they do not compile here: {error}"
            logger.warning("No wgmma kernels for experts: %s", error)
    return None, f"experts of more than {MAX_FEW_TOKENS} tokens: Triton kernels, not wgmma ones, because {why}"


def sources() -> dict[str, str]:
    """The kernels' files by name."""
    return nvrtc.sources("grouped.cu")


def compile_options(hidden: int, intermediate: int, num_experts: int, top_k: int) -> list[str]:
    """Options of NVRTC for a shape."""
    defines = {"HIDDEN": hidden, "INTERMEDIATE": intermediate, "NUM_EXPERTS": num_experts, "TOP_K": top_k}
    found = ["--gpu-architecture=sm_90a", "--std=c++17", "--device-as-default-execution-space"]
    return [*found, *(f"-DSADDLE_{name}={value}" for name, value in defines.items())]


class GroupedExperts:
    """Both kernels for one shape of experts. Compiles on construction, never later.

    Args:
        w13, w2: of any layer; their shapes and formats are those of all.
        cache_dir: where compiled binaries are kept; None: nowhere.

    Raises:
        ValueError: shapes or formats that do not fit.
        CudaError: the kernels do not compile or load.
    """

    def __init__(
        self, w13: PackedMatrix, w2: PackedMatrix, top_k: int, target: Target, cache_dir: Path | None = None
    ) -> None:
        why = unsupported(w13, w2, target)
        if why is not None:
            raise ValueError(f"The grouped expert kernels do not run here: {why}.")
        self._num_blocks = target.num_sms
        self._queue = torch.zeros(2, dtype=torch.int32, device=w13.data.device)
        self._maps: dict[int, Any] = {}
        options = compile_options(w2.num_rows, w2.num_cols, w13.data.shape[0], top_k)
        tag = f"{target.arch}-{VERSION}"
        cubin = nvrtc.cached_cubin(cache_dir, "grouped.cu", sources(), options, tag)
        shared = STAGES * STAGE_BYTES + 8192
        self.kernels = {name: nvrtc.Kernel(cubin, f"grouped_{name}", shared) for name in ("up", "down")}

    def up(self, h: Activation, w13: PackedMatrix, work: RouterWork, act: Activation) -> None:
        """act [pairs, I] = silu(h W_1) * (h W_3) of every listed pair; rows of others are not written."""
        self._launch("up", h, w13, work, act.data, act.scale)

    def down(self, act: Activation, w2: PackedMatrix, work: RouterWork, out: torch.Tensor) -> None:
        """out [pairs, H] bf16 = weight times act W_2 of every listed pair."""
        self._launch("down", act, w2, work, out, None)

    def _launch(
        self, name: str, a: Activation, w: PackedMatrix, work: RouterWork, out: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> None:  # fmt: skip
        assert a.scale is not None
        params = Params()
        params.weights = self._map(w)
        params.packed, params.input, params.input_scales = w.data.data_ptr(), a.data.data_ptr(), a.scale.data_ptr()
        params.counts, params.lists = work.counts.data_ptr(), work.lists.data_ptr()
        params.shares, params.output = work.weights.data_ptr(), out.data_ptr()
        params.output_scales = 0 if scales is None else scales.data_ptr()
        params.queue, params.capacity = self._queue.data_ptr(), work.lists.shape[1]
        stream = torch._C._cuda_getCurrentRawStream(self._queue.get_device())
        self.kernels[name].launch_apart(self._num_blocks, BLOCK_THREADS, params, stream)

    def _map(self, w: PackedMatrix) -> Any:
        """The tensor map of a matrix, made once."""
        at = w.data.data_ptr()
        if at not in self._maps:
            self._maps[at] = tensor_map(w)
        return self._maps[at]


def tensor_map(w: PackedMatrix) -> Any:
    """How the copy engine sees a packed matrix: two rows of a tile x half a tile's rows x tiles x slots x rows of
    tiles; a copy takes one column of tiles, 256 rows high.

    Raises:
        CudaError: the driver does not take it.
    """
    size = slot_bytes(w.slot_k, w.format)
    row_tiles = w.num_bytes // (w.num_slots * size)
    width = 2 * TILE_ROW_BYTES
    dims = (width, TILE_ROWS // 2, w.slot_k // TILE_ROW_BYTES, w.num_slots, row_tiles)
    strides = (width, TILE_BYTES, size, w.num_slots * size)
    box = (width, TILE_ROWS // 2, 1, 1, ROWS // TILE_ROWS)
    room = (ctypes.c_uint8 * (TENSOR_MAP_BYTES + 64))()
    at = -(-ctypes.addressof(room) // 64) * 64
    status = nvrtc.driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), TYPE_UINT8, len(dims), ctypes.c_void_p(w.data.data_ptr()),
        (ctypes.c_uint64 * 5)(*dims), (ctypes.c_uint64 * 4)(*strides), (ctypes.c_uint32 * 5)(*box),
        (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1), INTERLEAVE_NONE, SWIZZLE_128B, PROMOTION_256B, FILL_NONE,
    )  # fmt: skip
    if status:
        raise nvrtc.CudaError(f"cuTensorMapEncodeTiled: error {status} for {dims}, strides {strides}, box {box}")
    return (ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8)).from_buffer_copy(ctypes.string_at(at, TENSOR_MAP_BYTES))

"""Products of FP8 weights and many tokens on sm_90: CUDA C++ with wgmma over the packed weights.

The kernels are `cuda/grouped*` (the experts' two products) and `cuda/dense.cu` (one weight for all tokens, by the same
machinery); this file says what they support, compiles them for a model's shapes, and launches them. They compute what
`experts` and `linear` compute with their Triton kernels, from the same routing, into the same memory: FP8 activations
with a scale per 128 columns, products in the matrix units over 128 columns at a time, sums in float32. Work is claimed
tile by tile at run time, so the host never waits and a CUDA graph may capture a launch.
"""

from __future__ import annotations

import ctypes
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saddle.kernels import nvrtc
from saddle.kernels.paged_kv import HEAD_DIM
from saddle.kernels.quant import Activation
from saddle.kernels.router import RouterWork, most_few_tokens
from saddle.kernels.target import Target
from saddle.kernels.tiles import TILE_BYTES, TILE_ROW_BYTES, TILE_ROWS, Fp8Tiles, PackedMatrix, slot_bytes
from saddle.version import VERSION

logger = logging.getLogger(__name__)

# As grouped_shapes.cuh.
ROWS = 256
BLOCK_THREADS = 384
STAGES, STAGE_BYTES = 4, 48 * 1024
SPARE_BYTES = 8192  # barriers, tiles, scales, and what the ring needs to begin at a multiple of 1,024
# From here on a dense product is faster here than through Triton, found on an H100.
MIN_DENSE_TOKENS = 512
# As cuda.h.
TENSOR_MAP_BYTES = 128
TYPE_UINT8, INTERLEAVE_NONE, SWIZZLE_128B, PROMOTION_256B, FILL_NONE = 0, 0, 3, 3, 0

_POINTERS = ("packed", "input", "input_scales", "counts", "lists", "shares", "output", "output_scales", "queue",
             "gain", "cos", "sin", "positions", "squares")  # fmt: skip


class Params(ctypes.Structure):
    """`Params` of grouped_work.cuh."""

    _fields_ = [
        ("weights", ctypes.c_uint64 * (TENSOR_MAP_BYTES // 8)),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("capacity", ctypes.c_int),
        ("turned", ctypes.c_int),
        ("padding", ctypes.c_int * 2),  # the map is aligned to 64 bytes, so the whole is a multiple of them
    ]


def unsupported(w: PackedMatrix, target: Target) -> str | None:
    """Why the kernels cannot multiply with this weight on this GPU; None: they can."""
    if target.capability != 90:
        return f"they need sm_90, this is {target.arch}"
    if w.format != Fp8Tiles():
        return f"they need FP8 tiles with scales of 128 columns, not {w.format}"
    if w.num_rows % ROWS:
        return f"they need weights of a multiple of {ROWS} rows, not {w.num_rows}"
    if w.data.dim() == 4 and w.data.shape[0] > BLOCK_THREADS:
        return f"they are for at most {BLOCK_THREADS} experts, not {w.data.shape[0]}"
    return None


def sources() -> dict[str, str]:
    """The kernels' files by name."""
    return nvrtc.sources("grouped.cu") | nvrtc.sources("dense.cu")


def compile_options(**shape: int) -> list[str]:
    """Options of NVRTC for a shape."""
    found = ["--gpu-architecture=sm_90a", "--std=c++17", "--device-as-default-execution-space"]
    return [*found, *(f"-DSADDLE_{name.upper()}={value}" for name, value in shape.items())]


class _Kernels:
    """Kernels of one file for one shape, and how they are launched."""

    def __init__(
        self, file: str, names: tuple[str, ...], shape: dict[str, int], w: PackedMatrix, target: Target,
        cache_dir: Path | None,
    ) -> None:  # fmt: skip
        device = w.data.device
        self._device = device.index or 0
        self.num_blocks = target.num_sms
        self._queue = torch.zeros(2, dtype=torch.int32, device=device)
        self._maps: dict[int, Any] = {}
        tag = f"{target.arch}-{VERSION}"
        cubin = nvrtc.cached_cubin(cache_dir, file, nvrtc.sources(file), compile_options(**shape), tag)
        self._kernels = {name: nvrtc.Kernel(cubin, name, STAGES * STAGE_BYTES + SPARE_BYTES) for name in names}

    def launch(
        self, name: str, a: Activation, w: PackedMatrix, out: torch.Tensor, capacity: int, turned: int = 0,
        **others: torch.Tensor,
    ) -> None:  # fmt: skip
        """Launch on the current stream; others: further pointers of `Params`."""
        assert a.scale is not None
        at = w.data.data_ptr()
        if at not in self._maps:
            self._maps[at] = tensor_map(w)
        params = Params(self._maps[at], at, a.data.data_ptr(), a.scale.data_ptr(), capacity=capacity, turned=turned)
        params.output, params.queue = out.data_ptr(), self._queue.data_ptr()
        for field, tensor in others.items():
            setattr(params, field, tensor.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        self._kernels[name].launch_apart(self.num_blocks, BLOCK_THREADS, params, stream)

    def spilled_bytes(self) -> dict[str, int]:
        """Local memory a thread of each kernel."""
        return {name: k.attribute(nvrtc.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES) for name, k in self._kernels.items()}


class GroupedExperts:
    """Both products of experts of one shape. Compiles on construction, never later.

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
        why = unsupported(w13, target) or unsupported(w2, target)
        if why is not None:
            raise ValueError(f"The wgmma kernels do not run here: {why}.")
        shape = {"hidden": w2.num_rows, "intermediate": w2.num_cols, "num_experts": len(w13.data), "top_k": top_k}
        self.kernels = _Kernels("grouped.cu", ("grouped_up", "grouped_down"), shape, w13, target, cache_dir)

    def up(self, h: Activation, w13: PackedMatrix, work: RouterWork, act: Activation) -> None:
        """act [pairs, I] = silu(h W_1) * (h W_3) of every listed pair; rows of others are not written."""
        assert act.scale is not None
        self.kernels.launch("grouped_up", h, w13, act.data, work.lists.shape[1], counts=work.counts, lists=work.lists,
                            output_scales=act.scale)  # fmt: skip

    def down(self, act: Activation, w2: PackedMatrix, work: RouterWork, out: torch.Tensor) -> None:
        """out [pairs, H] bf16 = weight times act W_2 of every listed pair."""
        self.kernels.launch("grouped_down", act, w2, out, work.lists.shape[1], counts=work.counts, lists=work.lists,
                            shares=work.weights)  # fmt: skip


class GroupedLinear:
    """y = x W^T for weights of one shape. Arguments and errors as `GroupedExperts`, and
        num_heads: query heads of 128 rows that a weight begins with; 0: it has none.
    """  # fmt: skip

    def __init__(
        self, w: PackedMatrix, target: Target, cache_dir: Path | None = None, num_heads: int = 0
    ) -> None:
        why = unsupported(w, target)
        if why is not None:
            raise ValueError(f"The wgmma kernels do not run here: {why}.")
        shape = {"columns": w.num_cols, "rows": w.num_rows}
        names: tuple[str, ...] = ("dense_bf16", "dense_f32", "dense_added")
        self.num_heads = num_heads
        if self.turns:
            names, shape = (*names, "dense_turned"), {**shape, "turned": 1}
        self.kernels = _Kernels("dense.cu", names, shape, w, target, cache_dir)

    @property
    def turns(self) -> bool:
        """Whether `turned` is there."""
        return self.num_heads > 0 and self.num_heads * HEAD_DIM % ROWS == 0

    @staticmethod
    def pays(num_tokens: int) -> bool:
        """Whether so many tokens are faster here than through Triton."""
        return num_tokens >= MIN_DENSE_TOKENS

    def __call__(self, a: Activation, w: PackedMatrix, out: torch.Tensor, add: bool = False) -> None:
        """out [.., T, N] bf16 or float32, contiguous = a W^T; add: float32, out += a W^T."""
        if add and out.dtype != torch.float32:
            raise ValueError(f"Sums are added to float32 alone, got {out.dtype}.")
        name = "dense_added" if add else "dense_bf16" if out.dtype == torch.bfloat16 else "dense_f32"
        self.kernels.launch(name, a, w, out, len(a.data))

    def turned(
        self, a: Activation, w: PackedMatrix, out: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor,
        sin: torch.Tensor, positions: torch.Tensor, squares: torch.Tensor,
    ) -> None:  # fmt: skip
        """out [T, N] bf16 = a W^T, its queries multiplied by gain [heads * 128] and rotated, as
        `qk_rope.qk_rope_write` does it but for 1 / rms; squares [T, heads] float32: sums of theirs, before the gain."""
        self.kernels.launch("dense_turned", a, w, out, len(a.data), self.num_heads * HEAD_DIM // ROWS, gain=gain,
                            cos=cos, sin=sin, positions=positions, squares=squares)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grouped:
    """The kernels of a model's layers; None where they do not run."""

    experts: GroupedExperts | None = None
    qkv: GroupedLinear | None = None
    o: GroupedLinear | None = None


def prepare(
    w13: PackedMatrix, w2: PackedMatrix, qkv: PackedMatrix, o: PackedMatrix, top_k: int, target: Target,
    cache_dir: Path | None = None,
) -> tuple[Grouped, str]:  # fmt: skip
    """The kernels that run for a layer's weights, and the line that says what computes many tokens, with the reason.

    Args: as `GroupedExperts`.
    """
    why = unsupported(w13, target) or unsupported(w2, target)
    if why is None and w13.data.device.type != "cuda":
        why = f"the weights are on {w13.data.device.type}"
    if why is None:
        try:
            with ThreadPoolExecutor(3) as pool:  # seconds each, and NVRTC lets go of Python's lock
                experts = pool.submit(GroupedExperts, w13, w2, top_k, target, cache_dir)
                dense = [
                    pool.submit(GroupedLinear, w, target, cache_dir, heads) if unsupported(w, target) is None else None
                    for w, heads in ((qkv, o.num_cols // HEAD_DIM), (o, 0))
                ]
            found = Grouped(experts.result(), *(None if one is None else one.result() for one in dense))
            most_few = most_few_tokens(len(w13.data), top_k)
            sizes = f"experts of more than {most_few} tokens, projections from {MIN_DENSE_TOKENS} on"
            return found, f"{sizes}: wgmma kernels"
        except nvrtc.CudaError as error:
            why = f"they do not compile here: {error}"
            logger.warning("No wgmma kernels: %s", error)
    return Grouped(), f"steps of many tokens: Triton kernels, not wgmma ones, because {why}"


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

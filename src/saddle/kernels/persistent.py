"""The persistent decode kernel: one launch a step of up to 16 rows, from token ids to logits. GPUs of sm_90 only.

The kernel is CUDA C++ (`cuda/persistent.cu` and one header a stage). This file says what it supports, compiles it for
the model's shape, and launches it. Its math is that of `model/m2.py`; activations are float16 where the other GPU path
has FP8, so it is the more exact of the two. The residual is summed in 64-bit fixed point: a step gives the same bits
whenever it is run on the same input. A row whose residual leaves the range (2^20 a contribution) gets NaN logits.

Rows that only pad (context 0) touch no expert and read no KV. Any block may be behind any other in a block table.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from saddle.kernels import nvrtc
from saddle.kernels.paged_kv import BLOCK_SIZE, DYNAMIC, HEAD_DIM, STATIC, KVLayer
from saddle.kernels.target import Target
from saddle.kernels.tiles import Bf16Tiles, Fp8Tiles, PackedMatrix
from saddle.version import VERSION

MAX_ROWS = 16
ROTARY_DIM = 64
VARIANTS = (1, 2, 4, 8, 12, 16)  # rows that a binary is compiled for
# As shapes.cuh.
GROUP = 6
SPLITS = 16
CTAS_FOR_ROUTER = 2  # rows of the router a multiprocessor
BLOCK_THREADS = 512
SHARED_BYTES = 232448  # all that a block may have on sm_90; what state.cuh adds up is below it
PARTIAL_PITCH = HEAD_DIM + 2
CLAIM_PITCH = 32
SYNC_WORDS = 128
PROFILE_STAGES = 16
# Stages of a launch; tests run some of them alone.
ATTENTION, EXPERTS, HEAD = 1, 2, 4
ALL_STAGES = ATTENTION | EXPERTS | HEAD
# Why the kernel gave up, as state.cuh.
FAILURES = {
    1: "a slot of the ring did not come",
    2: "a copy on the way did not land",
    3: "a multiprocessor did not come to the grid barrier",
    4: "words of another multiprocessor did not come",
    5: "the routing did not come",
}


class Layer(Protocol):
    """What the kernel reads of a layer: `PackedLayer` of model/packed.py."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    qkv: PackedMatrix
    o: PackedMatrix
    gate: torch.Tensor
    gate_bias: torch.Tensor
    w13: PackedMatrix
    w2: PackedMatrix


class Model(Protocol):
    """What the kernel reads of a model: `PackedModel` of model/packed.py."""

    embed: torch.Tensor
    norm: torch.Tensor
    lm_head: PackedMatrix

    @property
    def layers(self) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Numbers that the kernel is compiled for."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    num_experts: int
    top_k: int
    intermediate: int
    vocab: int
    num_layers: int
    norm_eps: float = 1e-6
    rope_theta: float = 5e6

    @classmethod
    def of(cls, model: Model, top_k: int, norm_eps: float, rope_theta: float) -> DecodeShape:
        """The shape of a packed model."""
        first = model.layers[0]
        heads, rows = first.o.num_cols // HEAD_DIM, first.qkv.num_rows // HEAD_DIM
        return cls(
            first.qkv.num_cols, heads, (rows - heads) // 2, first.gate.shape[1], top_k, first.w2.num_cols,
            model.lm_head.num_rows, len(model.layers), norm_eps, rope_theta,
        )  # fmt: skip


def unsupported(target: Target, shape: DecodeShape, model: Model | None = None) -> str | None:
    """Why the kernel cannot serve this model on this GPU; None: it can."""
    if not target.has_persistent_path:
        return next((line for line in target.decisions() if "persistent" in line), "the GPU is not of sm_90")
    checks = (
        (shape.hidden % 128 == 0 and shape.hidden <= 3072, f"hidden size {shape.hidden} is no multiple of 128 <= 3072"),
        (shape.num_heads == GROUP * shape.num_kv_heads, f"{GROUP} query heads a KV head are needed"),
        (shape.num_kv_heads * SPLITS <= target.num_sms, f"more than {target.num_sms // SPLITS} KV heads"),
        (target.num_sms % 2 == 0, f"{target.num_sms} multiprocessors do not make pairs"),
        (
            shape.num_experts % 8 == 0 and shape.num_experts // CTAS_FOR_ROUTER <= target.num_sms <= 256,
            f"{shape.num_experts} experts do not spread over {target.num_sms} multiprocessors",
        ),
        (shape.num_experts <= 256 and shape.top_k <= 8, "more than 256 experts or 8 a token"),
        (shape.intermediate % 128 == 0 and shape.intermediate <= 1536, f"expert width {shape.intermediate} over 1536"),
        (shape.vocab % 16 == 0, f"vocabulary {shape.vocab} is no multiple of 16"),
        ((shape.top_k + -(-shape.num_heads * HEAD_DIM // 3072)) * shape.num_layers < 2048, "too many layers"),
    )
    for holds, why in checks:
        if not holds:
            return why
    if model is None:
        return None
    for layer in model.layers:
        for name in ("qkv", "o", "w13", "w2"):
            if getattr(layer, name).format != Fp8Tiles():
                return f"{name} is {getattr(layer, name).format}, FP8 tiles with scales of 128 columns are needed"
    return None if model.lm_head.format == Bf16Tiles() else "lm_head is not in bf16 tiles"


_POINTERS = {
    "step": ("token_ids", "positions", "context_lens", "row_ids", "block_tables", "logits"),
    "memory": ("kv", "kv_scales", "embed", "final_norm", "lm_head"),
    "workspace": ("residual", "qkv_words", "square_words", "partial_words", "attention_words", "router_words",
                  "activations", "claims", "sync", "error", "profile"),
}  # fmt: skip
_INTEGERS = ("num_rows", "max_blocks", "num_blocks", "num_layers", "stages", "uniform_routing")
LAYER_POINTERS = ("qkv", "o", "w13", "w2", "gate", "gate_bias", "input_norm", "post_norm", "q_norm", "k_norm")


class LayerParams(ctypes.Structure):
    """`LayerWeights` of state.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in LAYER_POINTERS),
        ("k_scale", ctypes.c_float),
        ("v_scale", ctypes.c_float),
    ]


def params_type(num_layers: int) -> type[ctypes.Structure]:
    """`Params` of state.cuh for a number of layers."""

    class Params(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_void_p) for names in _POINTERS.values() for name in names),
            ("step_limit", ctypes.c_int64),
            *((name, ctypes.c_int) for name in _INTEGERS),
            ("rotary_frequencies", ctypes.c_float * (ROTARY_DIM // 2)),
            ("layers", LayerParams * num_layers),
        ]

    return Params


def sources() -> dict[str, str]:
    """The kernel's files by name."""
    return nvrtc.sources("persistent.cu")


def compile_options(shape: DecodeShape, rows: int, kv_format: int, num_ctas: int, profile: bool = False) -> list[str]:
    """Options of NVRTC for one binary."""
    defines = {
        "MAX_ROWS": rows, "HIDDEN": shape.hidden, "NUM_HEADS": shape.num_heads, "NUM_KV_HEADS": shape.num_kv_heads,
        "NUM_EXPERTS": shape.num_experts, "TOP_K": shape.top_k, "INTERMEDIATE": shape.intermediate,
        "VOCAB": shape.vocab, "NUM_LAYERS": shape.num_layers, "NUM_CTAS": num_ctas, "KV_FORMAT": kv_format,
        "NORM_EPS": f"{shape.norm_eps:.9e}f",
    }  # fmt: skip
    found = ["--gpu-architecture=sm_90a", "--std=c++17", "--device-as-default-execution-space"]
    found += [f"-DSADDLE_{name}={value}" for name, value in defines.items()]
    return [*found, "-DSADDLE_PROFILE"] if profile else found


class PersistentDecode:
    """The kernel for one model and one KV memory. Compiles on construction, never later.

    Args:
        model: FP8 tiles; kept, and must not move.
        kv: one entry a layer, adjacent in memory in the order of layers.
        max_rows: most rows of a step, at most 16.
        cache_dir: where compiled binaries are kept; None: nowhere.
        uniform_routing: experts are a hash of layer, position and token; for timing with dummy weights.
        wait_seconds: a step that still waits for something after this time has failed and ends with a CUDA error.

    Raises:
        ValueError: shapes that do not fit.
        CudaError: the kernel does not compile or load.
    """

    def __init__(
        self,
        model: Model,
        shape: DecodeShape,
        target: Target,
        kv: Sequence[KVLayer],
        max_rows: int = MAX_ROWS,
        cache_dir: Path | None = None,
        uniform_routing: bool = False,
        wait_seconds: float = 10.0,
        profile: bool = False,
    ) -> None:
        why = unsupported(target, shape, model)
        if why is not None:
            raise ValueError(f"The persistent kernel does not run here: {why}.")
        if len(kv) != shape.num_layers or not 1 <= max_rows <= MAX_ROWS:
            raise ValueError(f"{len(kv)} layers of KV for {shape.num_layers}, {max_rows} rows of at most {MAX_ROWS}.")
        self.shape = shape
        self.num_ctas = target.num_sms
        self.stages = ALL_STAGES
        self.num_layers = shape.num_layers  # tests run fewer
        self._model, self._kv = model, kv
        device = model.embed.device
        kv_format = {STATIC: 1, DYNAMIC: 2}.get(kv[0].scale_kind, 0)
        self.variants = VARIANTS[: 1 + next(i for i, rows in enumerate(VARIANTS) if rows >= max_rows)]
        self.workspace = _workspace(shape, self.variants[-1], self.num_ctas, device)
        self._error = torch.zeros(1, dtype=torch.int32).pin_memory()
        # [layers, H, E] is what the other kernels read; here a multiprocessor's rows have to be one copy.
        self._gates = [layer.gate.t().contiguous() for layer in model.layers]
        self._params = self._fill(uniform_routing, wait_seconds)
        files, tag = sources(), f"{target.arch}-{VERSION}"

        def compiled(rows: int) -> bytes:
            options = compile_options(shape, rows, kv_format, self.num_ctas, profile)
            return nvrtc.cached_cubin(cache_dir, "persistent.cu", files, options, tag)

        with ThreadPoolExecutor(len(self.variants)) as pool:  # seconds each, and NVRTC lets go of Python's lock
            cubins = list(pool.map(compiled, self.variants))
        self._kernels = {
            rows: nvrtc.Kernel(cubin, "persistent_decode", SHARED_BYTES)
            for rows, cubin in zip(self.variants, cubins, strict=True)
        }
        if any(kernel.blocks_per_sm(BLOCK_THREADS) < 1 for kernel in self._kernels.values()):
            raise ValueError("The persistent kernel does not fit a multiprocessor of this GPU.")

    @staticmethod
    def num_bytes(shape: DecodeShape, max_rows: int, num_ctas: int) -> int:
        """Device memory that this object holds beside model and KV: its workspace and a turned copy of each router."""
        rows = next(size for size in VARIANTS if size >= max_rows)
        work = _workspace(shape, rows, num_ctas, torch.device("meta")).values()
        gates = shape.num_layers * shape.num_experts * shape.hidden * 4
        return gates + sum(tensor.numel() * tensor.element_size() for tensor in work)

    def spilled_bytes(self) -> dict[int, int]:
        """Local memory a thread of each binary, by rows."""
        return {rows: k.attribute(nvrtc.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES) for rows, k in self._kernels.items()}

    def step(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        context_lens: torch.Tensor,
        row_ids: torch.Tensor,
        block_tables: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """Launch one step on the current stream. A CUDA graph may capture it.

        Args:
            token_ids, positions, context_lens, row_ids: [R] int32, R at most `max_rows`; context 0: the row pads.
            block_tables: [num_rows, max_blocks] int32.
            logits: [R, vocab] float32, written for the rows that do not pad.
        """
        rows, params = len(token_ids), self._params
        variant = next(size for size in self.variants if size >= rows)
        params.token_ids = token_ids.data_ptr()
        params.positions = positions.data_ptr()
        params.context_lens = context_lens.data_ptr()
        params.row_ids = row_ids.data_ptr()
        params.block_tables = block_tables.data_ptr()
        params.logits = logits.data_ptr()
        params.num_rows = rows
        params.max_blocks = block_tables.shape[1]
        params.stages = self.stages
        params.num_layers = self.num_layers
        stream = torch.cuda.current_stream().cuda_stream
        self._kernels[variant].launch(self.num_ctas, BLOCK_THREADS, params, stream)

    def failure(self) -> str | None:
        """Why the kernel gave up; None if it did not. Host memory: readable when the device is gone."""
        word = int(self._error[0])
        if word == 0:
            return None
        why = FAILURES.get(word & 255, f"code {word & 255}")
        return f"The persistent kernel gave up on multiprocessor {word >> 8}: {why}."

    def _fill(self, uniform_routing: bool, wait_seconds: float) -> Any:
        model, shape, first = self._model, self.shape, self._kv[0]
        params: Any = params_type(shape.num_layers)()
        bytes_a_layer = first.data.numel() * first.data.element_size()
        for number, (layer, kv) in enumerate(zip(model.layers, self._kv, strict=True)):
            if kv.data.data_ptr() != first.data.data_ptr() + number * bytes_a_layer:
                raise ValueError("The layers of KV memory must be adjacent, in order.")
            entry = params.layers[number]
            for name in ("qkv", "o", "w13", "w2"):
                setattr(entry, name, getattr(layer, name).data.data_ptr())
            for name in ("gate_bias", "input_norm", "post_norm", "q_norm", "k_norm"):
                setattr(entry, name, _float32(name, getattr(layer, name)))
            entry.gate = _float32("gate", self._gates[number])
            entry.k_scale, entry.v_scale = kv.k_scale, kv.v_scale
        if first.data.shape[1:] != (2, shape.num_kv_heads, BLOCK_SIZE, HEAD_DIM):
            raise ValueError(f"KV memory of {shape.num_kv_heads} heads is needed, got {tuple(first.data.shape)}.")
        params.kv, params.num_blocks = first.data.data_ptr(), first.data.shape[0]
        params.kv_scales = 0 if first.scales is None else first.scales.data_ptr()
        params.embed = model.embed.data_ptr()
        params.final_norm = _float32("norm", model.norm)
        params.lm_head = model.lm_head.data.data_ptr()
        for name, tensor in self.workspace.items():
            setattr(params, name, tensor.data_ptr())
        params.error = self._error.data_ptr()
        params.step_limit = int(wait_seconds * 1e9)
        params.uniform_routing = int(uniform_routing)
        exponents = torch.arange(0, ROTARY_DIM, 2, dtype=torch.float32) / ROTARY_DIM
        for i, frequency in enumerate((1.0 / shape.rope_theta**exponents).tolist()):
            params.rotary_frequencies[i] = frequency
        return params


def _float32(name: str, tensor: torch.Tensor) -> int:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32, got {tensor.dtype}.")
    return tensor.data_ptr()


def _workspace(shape: DecodeShape, rows: int, num_ctas: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Memory between the stages, zeros: no word has an epoch yet, no counter counts."""
    q_width, kv_width = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
    qkv_width = q_width + 2 * kv_width

    def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return {
        "residual": zeros(rows, shape.hidden),
        "qkv_words": zeros(rows, qkv_width),
        "square_words": zeros(qkv_width // 16, 8 if rows <= 8 else 16),
        "partial_words": zeros(shape.num_kv_heads * SPLITS, rows, GROUP, PARTIAL_PITCH),
        "attention_words": zeros(rows, q_width // 2),
        "router_words": zeros(rows, shape.num_experts),
        "activations": zeros(rows * shape.top_k, rows, shape.intermediate, dtype=torch.float16),
        "claims": zeros(shape.num_layers + 1, CLAIM_PITCH, dtype=torch.int32),
        "sync": zeros(SYNC_WORDS, dtype=torch.int32),
        "profile": zeros(shape.num_layers + 1, PROFILE_STAGES, num_ctas),
    }

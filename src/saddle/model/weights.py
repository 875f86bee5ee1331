"""From a published checkpoint to resident tensors: one table, every tensor consumed exactly once.

The table says for each name of the checkpoint where it goes and which part of it this rank holds. Destinations are
allocated first and filled in place, so the peak is the loaded model plus one tensor per reader. File membership is
taken from the index's `weight_map` alone: its `total_size` and the "of-N" in file names are unreliable.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from saddle.errors import CheckpointError
from saddle.model.config import ModelConfig, read_json
from saddle.model.formats import SCALE_SUFFIX, Fp8Block, dequantise
from saddle.parallel.layout import ParallelLayout, Slice

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
OPTIONAL = re.compile(r"\.(k_scale|v_scale|input_scale)$")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
NUM_READERS = 2
PLAIN = (torch.bfloat16, torch.float32)
Report = Callable[[float, str], None]  # share done from 0 to 1, note


@dataclass(slots=True)
class LayerWeights:
    """One layer of one rank, H hidden, D head_dim, E experts, I expert width.

    Matrices are stored transposed, [in, out]: x @ W reads them in order, which for few tokens takes 0.6 of the time
    of x @ W^T on a CPU.

    input_norm, post_norm  [H]
    qkv      [H, (heads + 2 kv_heads) * D]    columns of q, k, v side by side
    q_norm, k_norm  [heads * D], [kv_heads * D]
    o        [heads * D, H]
    gate     [H, E] float32
    gate_bias  [E] float32
    w13      [E, H, 2 I]    columns of w1 (gate), then of w3 (up)
    w2       [E, I, H]
    """

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    o: torch.Tensor
    gate: torch.Tensor
    gate_bias: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor


@dataclass(slots=True)
class ModelWeights:
    """All weights of one rank; embed [V, H], norm [H], lm_head [H, V]."""

    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.embed, self.norm, self.lm_head)
        for layer in self.layers:
            yield from (getattr(layer, name) for name in LayerWeights.__slots__)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def allocate(config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Uninitialised weights of one rank in `dtype`; the router stays float32."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    hidden, dim = config.hidden_size, config.head_dim
    q = layout.query_heads(config.num_heads).size * dim
    kv = layout.kv_heads(config.num_kv_heads).size * dim
    experts = layout.experts(config.num_experts).size
    width = layout.expert_width(config.intermediate_size).size
    vocab = layout.vocabulary(config.vocab_size).size

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=empty(hidden),
            post_norm=empty(hidden),
            qkv=empty(hidden, q + 2 * kv),
            q_norm=empty(q),
            k_norm=empty(kv),
            o=empty(q, hidden),
            gate=empty(hidden, config.num_experts, of=torch.float32),
            gate_bias=empty(config.num_experts, of=torch.float32),
            w13=empty(experts, hidden, 2 * width),
            w2=empty(experts, width, hidden),
        )

    layers = [layer() for _ in range(config.num_layers)]
    return ModelWeights(empty(vocab, hidden), layers, empty(hidden), empty(hidden, vocab))


# ---------------------------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes.

    shape   of the whole tensor in the checkpoint
    parts   the slice of each dimension that this rank holds
    into    destination, a view of the shape of the slice
    quantised   FP8 with a scale tensor beside it, if the checkpoint is FP8
    widens  float32 here, whether the checkpoint has F32 or BF16
    """

    shape: tuple[int, ...]
    parts: tuple[Slice, ...]
    into: torch.Tensor
    quantised: bool = False
    widens: bool = False


def table(config: ModelConfig, layout: ParallelLayout, weights: ModelWeights) -> dict[str, Target]:
    """Name in the checkpoint -> target, for every tensor that this rank reads a part of."""
    hidden = config.hidden_size
    vocab = layout.vocabulary(config.vocab_size)
    whole = Slice(0, hidden)
    found = {
        "model.embed_tokens.weight": Target((config.vocab_size, hidden), (vocab, whole), weights.embed),
        "lm_head.weight": Target((config.vocab_size, hidden), (vocab, whole), weights.lm_head.t()),
        "model.norm.weight": Target((hidden,), (whole,), weights.norm),
    }
    for number, layer in enumerate(weights.layers):
        found |= _layer_table(f"model.layers.{number}.", config, layout, layer)
    return found


def _layer_table(prefix: str, config: ModelConfig, layout: ParallelLayout, layer: LayerWeights) -> dict[str, Target]:
    hidden, dim, whole = config.hidden_size, config.head_dim, Slice(0, config.hidden_size)
    heads, kv_heads = layout.query_heads(config.num_heads), layout.kv_heads(config.num_kv_heads)
    q, kv = Slice(heads.start * dim, heads.stop * dim), Slice(kv_heads.start * dim, kv_heads.stop * dim)
    q_rows, k_rows, v_rows = torch.split(layer.qkv.t(), [q.size, kv.size, kv.size])
    attention, moe = prefix + "self_attn.", prefix + "block_sparse_moe."
    experts = Slice(0, config.num_experts)
    found = {
        prefix + "input_layernorm.weight": Target((hidden,), (whole,), layer.input_norm),
        prefix + "post_attention_layernorm.weight": Target((hidden,), (whole,), layer.post_norm),
        attention + "q_proj.weight": Target((config.q_width, hidden), (q, whole), q_rows, True),
        attention + "k_proj.weight": Target((config.kv_width, hidden), (kv, whole), k_rows, True),
        attention + "v_proj.weight": Target((config.kv_width, hidden), (kv, whole), v_rows, True),
        attention + "o_proj.weight": Target((hidden, config.q_width), (whole, q), layer.o.t(), True),
        attention + "q_norm.weight": Target((config.q_width,), (q,), layer.q_norm),
        attention + "k_norm.weight": Target((config.kv_width,), (kv,), layer.k_norm),
        moe + "gate.weight": Target((config.num_experts, hidden), (experts, whole), layer.gate.t(), widens=True),
        moe + "e_score_correction_bias": Target((config.num_experts,), (experts,), layer.gate_bias, widens=True),
    }
    width, full = layout.expert_width(config.intermediate_size), config.intermediate_size
    mine = layout.experts(config.num_experts)
    for index in range(mine.start, mine.stop):
        w1, w3 = torch.split(layer.w13[index - mine.start].t(), [width.size, width.size])
        expert = f"{moe}experts.{index}."
        found[expert + "w1.weight"] = Target((full, hidden), (width, whole), w1, True)
        found[expert + "w3.weight"] = Target((full, hidden), (width, whole), w3, True)
        found[expert + "w2.weight"] = Target((hidden, full), (whole, width), layer.w2[index - mine.start].t(), True)
    return found


# ---------------------------------------------------------------------------------------------------------------
# reading


def weight_map(folder: Path) -> dict[str, Path]:
    """File of every tensor: from the index, or from the only file.

    Raises:
        CheckpointError: no weights, or an indexed file is missing.
    """
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{INDEX} has no weight_map.")
        missing = sorted({file for file in names.values() if not (folder / file).exists()})
        if missing:
            raise CheckpointError(f"{len(missing)} weight files are missing, the first is {missing[0]}.")
        return {name: folder / file for name, file in names.items()}
    if not (folder / SINGLE_FILE).exists():
        raise CheckpointError(f"The checkpoint folder {folder} has neither {INDEX} nor {SINGLE_FILE}.")
    with safe_open(folder / SINGLE_FILE, "pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE_FILE)


class _Files:
    """Open handles of the checkpoint's files, one set for each reading thread."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._local = threading.local()
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        handles = self._local.__dict__.setdefault("handles", {})
        path = self._files[name]
        if path not in handles:
            with self._lock:
                try:
                    handles[path] = self._stack.enter_context(safe_open(path, "pt"))
                except Exception as error:  # safetensors has no common base class for its errors
                    raise CheckpointError(f"{path.name} is not a readable safetensors file: {error}") from None
        try:
            tensor: torch.Tensor = handles[path].get_tensor(name)
        except Exception as error:
            raise CheckpointError(f"{name} cannot be read from {path.name}: {error}") from None
        return tensor

    def close(self) -> None:
        self._stack.close()


def is_skipped(name: str, num_layers: int) -> bool:
    """Tensors that may be there and are not used: draft layers behind the last one, scales of activations."""
    layer = LAYER.match(name)
    return bool(OPTIONAL.search(name)) or (layer is not None and int(layer.group(1)) >= num_layers)


def plan_reads(found: set[str], targets: dict[str, Target], config: ModelConfig) -> None:
    """Hold the names of the checkpoint against the table.

    Raises:
        CheckpointError: a tensor is missing or unknown; names the first.
    """
    wanted = set(targets)
    if config.is_fp8:
        wanted |= {name + SCALE_SUFFIX for name, target in targets.items() if target.quantised}
    missing = sorted(wanted - found)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint, the first is {missing[0]}.")
    extra = sorted(name for name in found - wanted if not is_skipped(name, config.num_layers))
    if extra:
        hint = " Is quantization_config missing from config.json?" if extra[0].endswith(SCALE_SUFFIX) else ""
        raise CheckpointError(f"{len(extra)} tensors of the checkpoint are unknown, the first is {extra[0]}.{hint}")


def load(folder: Path, config: ModelConfig, layout: ParallelLayout, weights: ModelWeights, report: Report) -> str:
    """Fill `weights` from a checkpoint folder. Returns a line with size, time and rate.

    Raises:
        CheckpointError: naming the tensor or file at fault.
    """
    began = time.perf_counter()
    targets = table(config, layout, weights)
    files = weight_map(folder)
    plan_reads(set(files), targets, config)
    order = sorted(targets, key=lambda name: (files[name], name))
    reader = _Files(files)
    num_bytes = 0
    try:
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="weights") as pool:
            reads = pool.map(lambda name: fill(name, targets[name], reader.read, config), order)
            for done, size in enumerate(reads, 1):
                num_bytes += size
                report(done / len(order), f"{num_bytes / 1e9:.2f} GB")
    finally:
        reader.close()
    seconds = time.perf_counter() - began
    return (
        f"weights: read {num_bytes / 1e9:.2f} GB in {seconds:.1f} s ({num_bytes / 1e9 / seconds:.2f} GB/s), "
        f"{weights.num_bytes / 1e9:.2f} GB resident"
    )


def fill(name: str, target: Target, read: Callable[[str], torch.Tensor], config: ModelConfig) -> int:
    """Read one tensor, check it, and copy this rank's part into place. Returns the bytes read."""
    tensor = read(name)
    if tuple(tensor.shape) != target.shape:
        raise CheckpointError(f"{name} must have shape {list(target.shape)}, got {list(tensor.shape)}.")
    size = tensor.numel() * tensor.element_size()
    if target.quantised and config.is_fp8:
        scale_name = name + SCALE_SUFFIX
        _expect_dtype(name, tensor, torch.float8_e4m3fn)
        scale, form = read(scale_name), Fp8Block()
        _expect_dtype(scale_name, scale, torch.float32)
        rows, columns = target.shape
        if tuple(scale.shape) != form.scale_shape(rows, columns):
            expected = list(form.scale_shape(rows, columns))
            raise CheckpointError(f"{scale_name} must have shape {expected}, got {list(scale.shape)}.")
        target.into.copy_(dequantise(*form.cut(tensor, scale, *target.parts)))
        return size + scale.numel() * 4
    _expect_dtype(name, tensor, *PLAIN[:: -1 if target.widens else 1])
    target.into.copy_(tensor[tuple(slice(part.start, part.stop) for part in target.parts)])
    return size


def _expect_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise CheckpointError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}.")


def dummy(weights: ModelWeights, seed: int) -> None:
    """Random weights (`--load-format dummy`): norms near one, matrices scaled by the square root of their width, so
    that activations keep their size through all layers and logits are not degenerate."""
    generator = torch.Generator(weights.embed.device).manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.normal_(mean, std, generator=generator)

    normal(weights.embed, 1.0)
    normal(weights.norm, 0.1, 1.0)
    normal(weights.lm_head, 3.0 * weights.lm_head.shape[0] ** -0.5)
    for layer in weights.layers:
        for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm):
            normal(norm, 0.1, 1.0)
        for matrix in (layer.qkv, layer.o, layer.w13, layer.w2, layer.gate):
            normal(matrix, matrix.shape[-2] ** -0.5)
        normal(layer.gate_bias, 0.05)


def dtype_of(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in for `--dtype`, and why."""
    named: dict[str, Any] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name in named:
        return named[name], "--dtype"
    return (torch.float32, "the default on a CPU") if device.type == "cpu" else (torch.bfloat16, "the default on a GPU")

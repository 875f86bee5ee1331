"""From a published checkpoint to resident tensors: one table, every tensor consumed exactly once.

The table says for each name of the checkpoint where it goes and which part of it this rank holds. Destinations are
allocated first and filled in place, a strip of rows at a time, so the peak is the loaded model plus less than one
tensor per reader.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from saddle.errors import CheckpointError
from saddle.model.config import ModelConfig
from saddle.model.files import TensorFiles
from saddle.model.formats import Bf16, Fp8Slice, Member, NibbleSlice, WeightFormat, format_of
from saddle.parallel.layout import ParallelLayout, Slice

OPTIONAL = re.compile(r"\.(k_scale|v_scale|q_scale|input_scale|input_global_scale)$")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
NUM_READERS = 2
STRIP_ROWS = 512  # a multiple of every scale block: bounds what a reader holds
Report = Callable[[float, str], None]  # share done from 0 to 1, note
Table = dict[str, "Target"]

Stored = torch.Tensor | Fp8Slice | NibbleSlice  # rows of a weight as the checkpoint has them


class Sink(Protocol):
    """A destination that is no plain tensor: it takes rows of a weight as the checkpoint stores them."""

    def put(self, row: int, value: Stored) -> None:
        """Take rows `row`, `row + 1`, ... of this rank's slice."""


Place = torch.Tensor | Sink


class Layer(Protocol):
    """A layer's weights in any layout: where each of them goes."""

    def places(self, q: int, kv: int) -> dict[str, Place]: ...
    def expert_places(self, expert: int) -> tuple[Place, Place, Place]: ...


class Model(Protocol):
    """A model's weights in any layout."""

    @property
    def num_bytes(self) -> int: ...
    def layer_places(self) -> Sequence[Layer]: ...
    def places(self) -> dict[str, Place]: ...


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

    def places(self, q: int, kv: int) -> dict[str, Place]:
        """Where each weight of the layer goes, by a short name; the widths of q and of k and v are this rank's."""
        q_rows, k_rows, v_rows = torch.split(self.qkv.t(), [q, kv, kv])
        found: dict[str, Place] = {"q": q_rows, "k": k_rows, "v": v_rows, "o": self.o.t(), "gate": self.gate.t()}
        for name in ("input_norm", "post_norm", "q_norm", "k_norm", "gate_bias"):
            found[name] = getattr(self, name)
        return found

    def expert_places(self, expert: int) -> tuple[Place, Place, Place]:
        """Where w1, w2 and w3 of this rank's expert go."""
        w1, w3 = torch.chunk(self.w13[expert].t(), 2)
        return w1, self.w2[expert].t(), w3


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

    def layer_places(self) -> Sequence[Layer]:
        return self.layers

    def places(self) -> dict[str, Place]:
        """Where the weights outside the layers go, by a short name."""
        return {"embed": self.embed, "lm_head": self.lm_head.t(), "norm": self.norm}

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
    """Where a weight of the checkpoint goes.

    shape   of the whole weight
    parts   the slice of each dimension that this rank holds
    into    destination, a view of the shape of the slice or a sink; None: another rank's
    form    how a projection is stored; None: plain numbers
    """

    shape: tuple[int, ...]
    parts: tuple[Slice, ...]
    into: Place | None
    form: WeightFormat | None = None

    def members(self) -> list[Member]:
        return (self.form or Bf16()).members(self.shape)


def table(config: ModelConfig, layout: ParallelLayout, weights: Model) -> dict[str, Target]:
    """Name in the checkpoint -> target, for every weight of the model."""
    vocab, whole = layout.vocabulary(config.vocab_size), Slice(0, config.hidden_size)
    shape = config.vocab_size, config.hidden_size
    places = weights.places()
    found = {
        "model.embed_tokens.weight": Target(shape, (vocab, whole), places["embed"]),
        "lm_head.weight": Target(shape, (vocab, whole), places["lm_head"]),
        "model.norm.weight": Target((config.hidden_size,), (whole,), places["norm"]),
    }
    for number, layer in enumerate(weights.layer_places()):
        prefix = f"model.layers.{number}."
        found |= _attention_table(prefix, config, layout, layer)
        found |= _experts_table(prefix + "block_sparse_moe.", config, layout, layer)
    return found


def _attention_table(prefix: str, config: ModelConfig, layout: ParallelLayout, layer: Layer) -> Table:
    hidden, whole = config.hidden_size, Slice(0, config.hidden_size)
    q = layout.query_heads(config.num_heads).scaled(config.head_dim)
    kv = layout.kv_heads(config.num_kv_heads).scaled(config.head_dim)
    places = layer.places(q.size, kv.size)
    attention, moe = prefix + "self_attn.", prefix + "block_sparse_moe."

    def projection(name: str, width: int, part: Slice) -> Table:
        module = f"{attention}{name}_proj"
        target = Target((width, hidden), (part, whole), places[name], format_of(config, module))
        return {module + ".weight": target}

    o_proj, every = attention + "o_proj", Slice(0, config.num_experts)
    return {
        prefix + "input_layernorm.weight": Target((hidden,), (whole,), places["input_norm"]),
        prefix + "post_attention_layernorm.weight": Target((hidden,), (whole,), places["post_norm"]),
        **projection("q", config.q_width, q),
        **projection("k", config.kv_width, kv),
        **projection("v", config.kv_width, kv),
        o_proj + ".weight": Target((hidden, config.q_width), (whole, q), places["o"], format_of(config, o_proj)),
        attention + "q_norm.weight": Target((config.q_width,), (q,), places["q_norm"]),
        attention + "k_norm.weight": Target((config.kv_width,), (kv,), places["k_norm"]),
        moe + "gate.weight": Target((config.num_experts, hidden), (every, whole), places["gate"]),
        moe + "e_score_correction_bias": Target((config.num_experts,), (every,), places["gate_bias"]),
    }


def _experts_table(prefix: str, config: ModelConfig, layout: ParallelLayout, layer: Layer) -> Table:
    hidden, full, number = config.hidden_size, config.intermediate_size, config.num_experts
    whole = Slice(0, hidden)
    width, mine = layout.expert_width(full), layout.experts(number)
    found = {}
    for index in range(number):
        places: tuple[Place | None, ...] = (None, None, None)
        if mine.start <= index < mine.stop:
            places = layer.expert_places(index - mine.start)
        for name, into in zip(("w1", "w2", "w3"), places, strict=True):
            module = f"{prefix}experts.{index}.{name}"
            shape, parts = ((hidden, full), (whole, width)) if name == "w2" else ((full, hidden), (width, whole))
            found[module + ".weight"] = Target(shape, parts, into, format_of(config, module))
    return found


# ---------------------------------------------------------------------------------------------------------------
# reading


def is_skipped(name: str, num_layers: int) -> bool:
    """Tensors that may be there and are not used: draft layers behind the last one, scales of activations."""
    layer = LAYER.match(name)
    return bool(OPTIONAL.search(name)) or (layer is not None and int(layer.group(1)) >= num_layers)


def check(files: TensorFiles, targets: dict[str, Target], num_layers: int) -> None:
    """Hold the checkpoint against the table, before anything is read: every tensor has exactly one place.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype; names it.
    """
    members = {name + member.suffix: member for name, target in targets.items() for member in target.members()}
    found = set(files.names)
    missing = sorted(members.keys() - found)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint, the first is {missing[0]}.")
    extra = sorted(name for name in found - members.keys() if not is_skipped(name, num_layers))
    if extra:
        hint = " Is quantization_config missing from config.json?" if extra[0].endswith("_scale_inv") else ""
        raise CheckpointError(f"{len(extra)} tensors of the checkpoint are unknown, the first is {extra[0]}.{hint}")
    for name, member in members.items():
        same = files.shape(name) == member.shape or (member.shape == () and files.shape(name) == (1,))
        if not same:
            expected, got = list(member.shape), list(files.shape(name))
            raise CheckpointError(f"{name} must have shape {expected} by config.json, got {got}.")
        if files.dtype(name) not in member.dtypes:
            raise CheckpointError(f"{name} must be {' or '.join(member.dtypes)}, got {files.dtype(name)}.")


def load(
    folder: Path,
    config: ModelConfig,
    layout: ParallelLayout,
    weights: Model,
    report: Report,
    num_readers: int = NUM_READERS,
) -> str:
    """Fill `weights` from a checkpoint folder. Returns a line with size, time and rate.

    Raises:
        CheckpointError: naming the tensor or file at fault.
    """
    began = time.perf_counter()
    targets = table(config, layout, weights)
    num_bytes = 0
    with TensorFiles(folder) as files, ThreadPoolExecutor(num_readers, thread_name_prefix="weights") as pool:
        check(files, targets, config.num_layers)
        order = sorted((name for name, target in targets.items() if target.into is not None),
                       key=lambda name: (files.file_of(name + targets[name].members()[0].suffix), name))  # fmt: skip
        for done, size in enumerate(pool.map(lambda name: _fill(files, name, targets[name]), order), 1):
            num_bytes += size
            report(done / len(order), f"{num_bytes / 1e9:.2f} GB")
    seconds = time.perf_counter() - began
    return (
        f"weights: read {num_bytes / 1e9:.2f} GB in {seconds:.1f} s ({num_bytes / 1e9 / seconds:.2f} GB/s) with "
        f"{num_readers} readers, {weights.num_bytes / 1e9:.2f} GB resident"
    )


def _fill(files: TensorFiles, name: str, target: Target) -> int:
    """Read this rank's part of a weight, a strip of rows at a time, and put it in place. Returns the bytes read."""
    assert target.into is not None
    rows, *rest = target.parts
    num_bytes = 0
    for start in range(rows.start, rows.stop, STRIP_ROWS if rest else rows.size):
        strip = Slice(start, min(start + STRIP_ROWS, rows.stop) if rest else rows.stop)
        value, size = _read(files, name, target, (strip, *rest))
        row = strip.start - rows.start
        if isinstance(target.into, torch.Tensor):
            numbers = value if isinstance(value, torch.Tensor) else value.dequantise()
            _place(target.into[row : row + strip.size], numbers)
        else:
            target.into.put(row, value)
        num_bytes += size
    return num_bytes


def _read(
    files: TensorFiles, name: str, target: Target, parts: tuple[Slice, ...]
) -> tuple[Stored, int]:
    """A slice of a weight, and how many bytes of the checkpoint it took."""
    if target.form is None:
        value = files.read(name, parts)
        return value, value.nbytes
    found = target.form.read(lambda suffix, *part: files.read(name + suffix, part), *parts)
    return found, found.nbytes if isinstance(found, torch.Tensor) else found.num_bytes


def _place(into: torch.Tensor, value: torch.Tensor) -> None:
    """Copy and convert. A transposed destination gets a transposed source: torch transposes whole matrices block by
    block, which takes a quarter of the time of writing across rows."""
    if value.dim() == 2 and into.stride(0) < into.stride(1):
        value = value.to(into.dtype).t().contiguous().t()
    into.copy_(value)


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

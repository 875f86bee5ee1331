"""`saddle bench kernels`: every stage of the fused model alone, at the sizes of real steps, against its own floor.

A stage is timed as a graph of its launches in all layers one after the other, so that each reads other weights and no
cache helps; the launch gap is part of its time. What it must move and compute comes from `work`, the ceilings are
measured in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import triton

from saddle.config import EngineConfig
from saddle.errors import StartupError
from saddle.kernels import fused_norm, paged_decode, sampling
from saddle.kernels.paged_kv import BLOCK_SIZE
from saddle.kernels.target import detect
from saddle.model import packed
from saddle.model.config import ModelConfig
from saddle.model.fused import FusedMiniMaxM2
from saddle.model.inputs import DeviceInputs
from saddle.model.kv_memory import KVMemory, kind_of
from saddle.model.source import resolve_model
from saddle.model.workspace import Buffers
from saddle.parallel.layout import ParallelLayout
from saddle.perf import device as measuring
from saddle.perf.work import Shape, Work, floor_s, stages, step
from saddle.protocol import SamplingParams
from saddle.runner.device_rows import row_numbers

# The released model's own values, as in `step`.
SAMPLING = SamplingParams(temperature=1.0, top_p=0.95, top_k=40)
SPARE_BYTES = 2 << 30  # left to graphs, the compiler and the library's products


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """Which steps: decode batches at a context, and prompts of a length."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    contexts: tuple[int, ...] = (2048,)
    prompts: tuple[int, ...] = ()
    uniform: bool = True


def decode_inputs(
    num_rows: int, context: int, num_blocks: int, vocab_size: int, seed: int, device: str = "cuda"
) -> DeviceInputs:
    """A decode step of rows whose contexts (the new token included) are all `context` long, in scattered blocks; rows
    share blocks only if there are not enough."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks_a_row = -(-context // BLOCK_SIZE)
    order = torch.randperm(num_blocks, generator=generator, device=device, dtype=torch.int32)
    needed = num_rows * blocks_a_row
    tables = order.repeat(-(-needed // num_blocks))[:needed].view(num_rows, blocks_a_row).contiguous()
    position = context - 1
    slots = tables[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE

    def full(value: int, count: int = num_rows) -> torch.Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    every = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    ids = torch.randint(vocab_size, (num_rows,), generator=generator, device=device, dtype=torch.int32)
    return DeviceInputs(ids, full(position), slots, tables, every[:-1], every, full(context), every[:-1], num_rows, 1,
                        context)  # fmt: skip


def prompt_inputs(
    length: int, num_blocks: int, vocab_size: int, seed: int, start: int = 0, device: str = "cuda"
) -> DeviceInputs:
    """One row that computes `length` tokens behind `start` others."""
    context = start + length
    one = decode_inputs(1, context, num_blocks, vocab_size, seed, device)
    positions = torch.arange(start, context, dtype=torch.int32, device=device)
    slots = one.block_tables[0].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(vocab_size, (length,), generator=generator, device=device, dtype=torch.int32)
    starts = torch.tensor([0, length], dtype=torch.int32, device=device)
    last = torch.tensor([length - 1], dtype=torch.int32, device=device)
    return DeviceInputs(ids, positions, slots, one.block_tables, one.row_ids, starts, one.context_lens, last, 0, length,
                        context, (length,))  # fmt: skip


class Bench:
    """A model with random weights, its KV memory, and the card's ceilings.

    Raises:
        StartupError: there is no GPU, or the model does not fit it.
    """

    def __init__(self, config: EngineConfig, spec: KernelSpec) -> None:
        if not torch.cuda.is_available():
            raise StartupError("saddle bench kernels needs a GPU.")
        folder = Path(resolve_model(config.load.model, config.load.revision, config.load.download_dir))
        self.config = ModelConfig.load(folder, config.load.hf_overrides)
        self.target, device = detect(), torch.device("cuda")
        self.kind = kind_of(config.cache.kv_cache_dtype, self.target)
        self.weights = packed.allocate(self.config, ParallelLayout(), device, self.target.is_fnuz)
        packed.dummy(self.weights, config.load.seed)
        longest = max((*spec.contexts, *spec.prompts))
        self.model = FusedMiniMaxM2(
            self.config, self.weights, max_positions=longest, max_tokens=max((*spec.batches, *spec.prompts)),
            max_rows=max(spec.batches), target=self.target, uniform_routing=spec.uniform,
        )  # fmt: skip
        torch.cuda.synchronize()
        block_bytes = KVMemory.bytes_per_token(self.config, self.kind) * BLOCK_SIZE
        free = torch.cuda.mem_get_info(device)[0] - SPARE_BYTES
        most = max(spec.batches) * -(-longest // BLOCK_SIZE)
        self.num_blocks = min(most, free // block_bytes)
        if self.num_blocks * BLOCK_SIZE < longest:
            raise StartupError(f"Weights leave {free} bytes for KV memory, too few for {longest} tokens; give fewer "
                               "layers with --hf-overrides.")  # fmt: skip
        self.kv = self.model.allocate_kv(self.num_blocks, BLOCK_SIZE, self.kind)
        self.kv.randomise(config.load.seed)
        self.bytes_per_s = measuring.read_bytes_per_s(list(self.weights.tensors()))
        self.flops_per_s = measuring.fp8_flops_per_s()

    def measure(self, inputs: DeviceInputs, shape: Shape) -> Iterator[dict[str, Any]]:
        """One line for each stage of a step, one for their sum, one for the forward pass and one for sampling."""
        work = self.model.space.buffers(len(inputs.token_ids))
        layers, memory = self.weights.layers, self.kv.layers
        model, pdl = self.model, self.model.pdl
        hidden = model.hidden(inputs, self.kv)  # routing and lists of a real step
        every = len(layers)
        # How many layers, and the launches of layer n.
        runs: dict[str, tuple[int, Callable[[int], object]]] = {
            "norm": (every, lambda n: model.norm(n, inputs, work)),
            "qkv": (every, lambda n: model.qkv(layers[n], inputs, work)),
            "attention": (every, lambda n: model.attention(layers[n], memory[n], inputs, work)),
            "o": (every, lambda n: model.project(layers[n], work)),
            "router": (every, lambda n: model.route(n, inputs, work)),
            "experts": (every, lambda n: model.experts(layers[n], work)),
            "final_norm": (1, lambda n: fused_norm.final_norm(
                work.x, work.sums, inputs.logit_index, self.weights.norm, self.config.rms_norm_eps, hidden, pdl)),
            "lm_head": (1, lambda n: model.logits(hidden)),
        }  # fmt: skip
        if inputs.num_decode_rows:
            runs["plan"] = (1, lambda n: paged_decode.plan_decode(
                inputs.context_lens, model.space.decode, inputs.num_decode_rows, pdl))  # fmt: skip
        needed = stages(self.config, shape)
        needed["experts"] = needed.pop("up") + needed.pop("down")
        total = 0.0
        for name, (count, launch) in runs.items():
            milliseconds = measuring.graph_ms(functools.partial(_each, launch, count))
            total += milliseconds
            yield self._line(name, shape, milliseconds / count, needed.get(name, Work()))
        yield self._line("sum of stages", shape, total, Work())
        milliseconds = measuring.graph_ms(lambda: model.logits(model.hidden(inputs, self.kv)))
        yield self._line("forward", shape, milliseconds, step(self.config, shape))
        rows = len(inputs.logit_index)
        logits_read = Work(4.0 * rows * self.config.vocab_size)
        yield self._line("sampling", shape, measuring.graph_ms(self._sampling(rows)), logits_read)

    def _sampling(self, num_rows: int) -> Callable[[], None]:
        """Launches that draw from the logits as they lie there, with the released model's sampling values."""
        vocab, device = self.config.vocab_size, torch.device("cuda")
        work = sampling.SamplingWork.allocate(num_rows, vocab, device)
        numbers = [row_numbers(SAMPLING, row, 0, vocab) for row in range(num_rows)]
        state = torch.tensor(numbers, dtype=torch.int32, device=device)
        rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        positions, drawn = torch.zeros_like(rows), torch.zeros_like(rows)
        tokens = torch.zeros(num_rows, 1, dtype=torch.int32, device=device)
        logits = self.model.space.logits[:num_rows]
        return lambda: sampling.launch(logits, rows, positions, state, work, tokens, drawn, vocab)

    def _line(self, name: str, shape: Shape, milliseconds: float, work: Work) -> dict[str, Any]:
        floor_ms = 1e3 * floor_s(work, self.bytes_per_s, self.flops_per_s)
        seconds = milliseconds * 1e-3
        return {
            "kernel": name, "card": self.target.name, "tokens": shape.tokens, "context": max(shape.context_lens),
            "us": round(1e3 * milliseconds, 2), "bytes": round(work.num_bytes), "flops": round(work.flops),
            "gb_per_s": round(work.num_bytes / seconds / 1e9, 1), "tflops": round(work.flops / seconds / 1e12, 2),
            "floor_us": round(1e3 * floor_ms, 2), "share": round(floor_ms / milliseconds, 4),
            "read_gb_per_s": round(self.bytes_per_s / 1e9, 1),
            "fp8_tflops": None if self.flops_per_s is None else round(self.flops_per_s / 1e12, 1),
        }  # fmt: skip

@torch.inference_mode()
def distinct_by_layer(model: FusedMiniMaxM2, inputs: DeviceInputs, kv: KVMemory) -> list[int]:
    """How many experts each layer of a step touches; runs the step."""
    found: list[int] = []
    route = model.route

    def observed(number: int, inputs: DeviceInputs, work: Buffers) -> None:
        route(number, inputs, work)
        ids = model.space.router.ids[: len(inputs.token_ids) * model.config.num_experts_per_tok]
        found.append(torch.unique(ids[ids >= 0]).numel())

    model.route = observed  # type: ignore[method-assign]
    try:
        model.hidden(inputs, kv)
    finally:
        del model.route
    return found


@torch.inference_mode()
def count_launches(model: FusedMiniMaxM2, inputs: DeviceInputs, kv: KVMemory) -> float:
    """Kernels that a layer of a step launches, counted."""
    count = 0

    def hook(*args: Any) -> None:
        nonlocal count
        count += 1

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        model.hidden(inputs, kv)
        # The list of KV items and the last norm belong to no layer.
        return round((count - 1 - bool(inputs.num_decode_rows)) / len(kv.layers), 2)
    finally:
        hooks.remove(hook)


def _each(launch: Callable[[int], object], count: int) -> None:
    for number in range(count):
        launch(number)


@torch.inference_mode()
def run(config: EngineConfig, spec: KernelSpec) -> Iterator[dict[str, Any]]:
    """Lines for every stage of every step of the spec."""
    bench = Bench(config, spec)
    seed, vocab, blocks = config.load.seed, bench.config.vocab_size, bench.num_blocks
    points: Sequence[tuple[DeviceInputs, list[int]]] = [
        *((decode_inputs(batch, context, blocks, vocab, seed), [1] * batch)
          for context in spec.contexts for batch in spec.batches),
        *((prompt_inputs(length, blocks, vocab, seed), [length]) for length in spec.prompts),
    ]  # fmt: skip
    for inputs, lengths in points:
        context = inputs.max_context_len
        distinct = fmean(distinct_by_layer(bench.model, inputs, bench.kv))
        shape = Shape(lengths, [context] * len(lengths), len(lengths), distinct, bench.kind)
        yield from bench.measure(inputs, shape)

"""`saddle bench step`: whole steps through the runner, embedding and sampling included, against the card's floor.

Plans are driven as the engine does it: plan N+1 is enqueued while N runs, and the result of N is read after that. A
step's time is what lies between two events on the device behind two steps' samplings, the median of many steps; the
host's is what its two calls take. Contexts are not computed: KV memory is filled at random, rows are admitted behind
it, and grow by a token a step through the length that is asked for. Prompts are computed, in the parts that the
engine would cut them into.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch

from saddle.config import EngineConfig
from saddle.errors import EngineError, StartupError
from saddle.executor.base import ProgressFn
from saddle.model.config import ModelConfig
from saddle.model.source import resolve_model
from saddle.perf.work import Shape, floor_s, step
from saddle.plan.memory import plan_device
from saddle.protocol import DeviceInfo, RowAdmit, RowWork, SamplingParams, StepPlan
from saddle.runner.runner import Runner

WARM_STEPS, STEPS = 6, 40
WARM_S = 1.0  # for which a GPU works before its first point: it comes from loading weights, with low clocks
PROMPT_RUNS = 5
PROBES = 8  # steps whose experts are counted
# The released model's own sampling values.
SAMPLING = SamplingParams(temperature=1.0, top_p=0.95, top_k=40, ignore_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """Which steps: decode batches at contexts, prompts of given lengths."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    contexts: tuple[int, ...] = (2048,)
    prompts: tuple[int, ...] = ()
    uniform: bool = True


class Driver:
    """Rows of a runner and plans for them; nothing decides anything.

    Args:
        config: its sizes are set to what the spec needs, where they were left open.
    """

    def __init__(self, config: EngineConfig, spec: StepSpec, on_progress: ProgressFn) -> None:
        self._spec = spec
        self.config = config = fitting(config, spec)
        folder = Path(resolve_model(config.load.model, config.load.revision, config.load.download_dir))
        self.shape = ModelConfig.load(folder, config.load.hf_overrides)
        self.on_gpu = torch.cuda.is_available()
        self.runner = Runner(config, folder)
        memory = self.runner.load(on_progress)
        self.predicted_bytes = memory.weight_bytes + memory.step_bytes
        self.info: DeviceInfo = plan_device(config, memory)
        self.predicted_bytes += self.info.num_blocks * self.info.block_size * memory.bytes_per_token
        # Of a GPU the bench also wants to know what it holds and which kernels ran.
        self.path = cast(Any, self.runner.path)
        if self.is_fused:
            self.path.uniform_routing = spec.uniform
        elif spec.uniform and self.on_gpu:
            raise StartupError("--routing uniform needs the GPU kernels (sm_80 or newer).")
        self.runner.allocate(self.info, on_progress)
        self.real_bytes = self._used() if self.is_fused else 0  # before benches take memory of their own
        if self.is_fused:
            self.path.kv.randomise(config.load.seed)
        self._order = list(range(self.info.num_blocks))
        self._rng = random.Random(config.load.seed)
        self._rng.shuffle(self._order)
        self._epochs = [0] * self.info.max_num_seqs
        self._number = 0

    @property
    def is_fused(self) -> bool:
        return not self.runner.waits

    def memory(self) -> dict[str, Any]:
        """What was predicted to be taken, and what is after the start, of the device's memory."""
        return {
            "kind": "memory", "predicted_bytes": self.predicted_bytes, "real_bytes": self.real_bytes,
            "predicted_over_real": round(self.predicted_bytes / self.real_bytes, 4),
            "num_blocks": self.info.num_blocks,
        }  # fmt: skip

    @staticmethod
    def _used() -> int:
        """Bytes of the device that are used, by whomever."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    # steps -------------------------------------------------------------------------------------------------------

    def admit(self, row: int, num_tokens: int, num_computed: int, first_block: int, num_blocks: int) -> RowAdmit:
        """A row of random ids whose first `num_computed` tokens are in memory; it owns `num_blocks` from the start."""
        self._epochs[row] += 1
        blocks = [self._order[(first_block + n) % len(self._order)] for n in range(num_blocks)]
        ids = self._rng.choices(range(self.info.vocab_size), k=num_tokens)
        seed = self._rng.getrandbits(62)
        return RowAdmit(row, self._epochs[row], ids, num_tokens, num_computed, blocks, SAMPLING, seed)

    def plan(self, admits: Sequence[RowAdmit], lengths: dict[int, int], samples: bool, bound: int) -> StepPlan:
        """Every row computes so many tokens."""
        self._number += 1
        work = [RowWork(row, self._epochs[row], count, 0, [], samples, bound) for row, count in lengths.items()]
        return StepPlan(self._number, list(admits), work, [])

    def run(self, plans: Sequence[StepPlan]) -> tuple[list[float], list[float]]:
        """Milliseconds between the ends of neighbouring steps on the device, and of each step's calls on the host."""
        handles: deque[Any] = deque()
        ends: list[Any] = []
        host: list[float] = []
        for plan in plans:
            began = time.perf_counter()
            self.runner.forward(plan)
            handles.append(self.runner.sample(plan.step_id, None))
            host.append(1e3 * (time.perf_counter() - began))
            ends.append(self._mark())
            if len(handles) > 1:
                _read(handles.popleft())
        while handles:
            _read(handles.popleft())
        return [self._between(first, second) for first, second in pairwise(ends)], host

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        if not self.on_gpu:
            return 1e3 * float(second - first)
        second.synchronize()
        return float(first.elapsed_time(second))

    # points ------------------------------------------------------------------------------------------------------

    def decode(self, batch: int, context: int) -> dict[str, Any]:
        """Median step of `batch` rows that decode at contexts around `context`."""
        count = WARM_STEPS + STEPS
        start = max(1, context - count // 2)  # tokens before the first step
        size = self.info.block_size
        blocks_a_row = -(-(start + count + 1) // size)
        admits = [self.admit(row, start + 1, start, row * blocks_a_row, blocks_a_row) for row in range(batch)]
        lengths = dict.fromkeys(range(batch), 1)
        plans = [self.plan(admits if n == 0 else (), lengths, True, start + n + 1) for n in range(count)]
        steps, host = (times[WARM_STEPS:] for times in self.run(plans))
        mean = start + WARM_STEPS + 1 + (len(steps) + 1) / 2
        return {
            "batch": batch, "context": context, "step_ms": round(median(steps), 4), "mean_context": mean,
            "host_ms": round(median(host), 4), "blocks_shared": batch * blocks_a_row > self.info.num_blocks,
        }  # fmt: skip

    def prompt(self, length: int) -> dict[str, Any]:
        """Median time of one prompt, from its first part to its first token."""
        most, size = self.info.max_num_batched_tokens, self.info.block_size
        parts = [min(most, length - begin) for begin in range(0, length, most)]
        found, host = [], []
        for _ in range(PROMPT_RUNS + 1):
            admit = self.admit(0, length, 0, 0, -(-length // size))
            plans = [self.plan([admit] if n == 0 else (), {0: part}, n == len(parts) - 1, length)
                     for n, part in enumerate(parts)]  # fmt: skip
            if self.on_gpu:
                torch.cuda.synchronize()
            began = self._mark()
            _, calls = self.run(plans)
            found.append(self._between(began, self._mark()))
            host.append(sum(calls))
        milliseconds = median(found[1:])
        point: dict[str, Any] = {
            "batch": 1, "prompt": length, "step_ms": round(milliseconds, 3), "host_ms": round(median(host[1:]), 3),
            "tokens_per_s": round(1e3 * length / milliseconds, 1),
        }  # fmt: skip
        if self.is_fused:  # of the last part
            point |= {"path": "pieces" if self.path.piece_size else "kernels", "graph_launches": self.path.num_graphs}
        return point


def _read(handle: Any) -> None:
    result = handle.wait()
    if result.error is not None:
        raise EngineError(f"A step failed: {result.error}")


def fitting(config: EngineConfig, spec: StepSpec) -> EngineConfig:
    """Sizes that the spec needs, where the configuration leaves them open, and graphs of its batches alone."""
    longest = max((*spec.contexts, *spec.prompts)) + WARM_STEPS + STEPS + 2
    scheduler, compiling = config.scheduler, config.compile
    if scheduler.max_num_seqs is None:
        scheduler = replace(scheduler, max_num_seqs=max(spec.batches))
    if scheduler.max_model_len is None:
        scheduler = replace(scheduler, max_model_len=longest)
    if not compiling.cudagraph_capture_sizes and "cudagraph_capture_sizes" not in compiling.compilation_config:
        compiling = replace(compiling, cudagraph_capture_sizes=spec.batches)
    return replace(config, scheduler=scheduler, compile=compiling)


def run(config: EngineConfig, spec: StepSpec, on_progress: ProgressFn) -> Iterator[dict[str, Any]]:
    """One line for each point, then one for the memory of a GPU."""
    driver = Driver(config, spec, on_progress)
    gauge = Gauge(driver)
    if driver.on_gpu:
        warm_up(driver, spec)
    for context in spec.contexts:
        for batch in spec.batches:
            if batch > driver.info.max_num_seqs:
                raise StartupError(f"--batch {batch} needs as many rows, --max-num-seqs is {driver.info.max_num_seqs}.")
            yield gauge.decode_line(driver.decode(batch, context))
    for length in spec.prompts:
        yield gauge.prompt_line(driver.prompt(length))
    if driver.is_fused:
        yield driver.memory()


def warm_up(driver: Driver, spec: StepSpec) -> None:
    """The first point again and again, not measured, or it alone would be measured on a card that has just woken up."""
    began = time.monotonic()
    while time.monotonic() < began + WARM_S:
        if spec.batches:
            driver.decode(min(spec.batches[0], driver.info.max_num_seqs), spec.contexts[0])
        else:
            driver.prompt(spec.prompts[0])


class Gauge:
    """Adds to a point what it is measured against."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._bytes_per_s: float | None = None
        self._flops_per_s: float | None = None
        self._common: dict[str, Any] = {"card": "CPU", "layers": driver.shape.num_layers}
        if driver.is_fused:
            from saddle.perf import device as measuring

            with driver.path.compile_watch.paused():
                self._bytes_per_s = measuring.read_bytes_per_s(list(driver.path.model.weights.tensors()))
                self._flops_per_s = measuring.fp8_flops_per_s()
        if driver.on_gpu:
            self._common["card"] = torch.cuda.get_device_name()
        self._common["routing"] = "uniform" if driver.is_fused and driver.path.uniform_routing else "model"
        self._common["kv_cache_dtype"] = driver.path.kv.kind if driver.is_fused else "as computed"

    def decode_line(self, point: dict[str, Any]) -> dict[str, Any]:
        """A decode point with its floor and what ran."""
        batch, mean = point["batch"], point["mean_context"]
        probe = self._probe(batch, point["context"])
        shape = Shape([1] * batch, [mean] * batch, batch, probe["distinct_experts"], self._kind)
        return {"kind": "decode", **point, **self._share(shape, point["step_ms"]), **probe, **self._common}

    def prompt_line(self, point: dict[str, Any]) -> dict[str, Any]:
        """A prompt with its floor. All its tokens together touch every expert; parts read them again, but the floor
        is that of one step."""
        length = point["prompt"]
        shape = Shape([length], [length], 1, float(self._driver.shape.num_experts), self._kind)
        return {"kind": "prompt", **point, **self._share(shape, point["step_ms"]), **self._common}

    @property
    def _kind(self) -> str:
        return str(self._driver.path.kv.kind) if self._driver.is_fused else "bf16"

    def _share(self, shape: Shape, milliseconds: float) -> dict[str, Any]:
        if self._bytes_per_s is None:
            return {"floor_ms": None, "share": None}
        floor_ms = 1e3 * floor_s(step(self._driver.shape, shape), self._bytes_per_s, self._flops_per_s)
        return {
            "floor_ms": round(floor_ms, 4), "share": round(floor_ms / milliseconds, 4),
            "read_gb_per_s": round(self._bytes_per_s / 1e9, 1),
            "fp8_tflops": None if self._flops_per_s is None else round(self._flops_per_s / 1e12, 1),
        }  # fmt: skip

    def _probe(self, batch: int, context: int) -> dict[str, Any]:
        """Experts that such steps touch, launches a layer, the path: from a few steps run launch by launch."""
        driver = self._driver
        if not driver.is_fused:
            from saddle.perf.work import expected_distinct

            return {"distinct_experts": round(expected_distinct(driver.shape, batch), 2), "launches_per_layer": None,
                    "path": "torch"}  # fmt: skip
        from saddle.perf import kernels

        model, kv = driver.path.model, driver.path.kv
        counts = []
        with driver.path.compile_watch.paused():
            for seed in range(PROBES):
                inputs = kernels.decode_inputs(batch, context, kv.num_blocks, driver.shape.vocab_size, seed)
                counts += kernels.distinct_by_layer(model, inputs, kv)
            launches = kernels.count_launches(model, inputs, kv)
        path = model.path_of(batch)
        return {
            "distinct_experts": round(fmean(counts), 2), "path": path, "graph_launches": driver.path.num_graphs,
            "launches_per_layer": None if path == "persistent" else launches,
        }  # fmt: skip

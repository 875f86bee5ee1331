"""One device's work: load the model, then run plans, two launches a step.

`forward(plan)` admits rows, makes the inputs and computes logits; `sample(step_id, mask)` draws the ids and returns
them. A step that fails returns its error and leaves the other rows as they are; an error of the GPU itself ends the
process, since nothing after it can be trusted.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from saddle.config import Decision, EngineConfig
from saddle.errors import EngineError, StartupError
from saddle.model import weights as loading
from saddle.model.config import GenerationConfig, ModelConfig
from saddle.model.m2 import MiniMaxM2
from saddle.parallel.layout import ParallelLayout
from saddle.protocol import (
    DeviceInfo,
    DeviceMemory,
    ProgressFn,
    RowAdmit,
    RowPromptLogprobs,
    RowWork,
    SamplingParams,
    StepMask,
    StepPlan,
    StepResult,
)
from saddle.runner import batch as batching
from saddle.runner.rows import Rows
from saddle.runner.sampler import Sampler

logger = logging.getLogger(__name__)

KV_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
GPU_STEP_BYTES = 2 << 30
CGROUPS = (  # folder, limit, use, and what of it are pages of files that can go: a checkpoint just read is all that
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(slots=True)
class Pending:
    """A step between its two launches."""

    plan: StepPlan
    began_s: float
    batch: batching.Batch | None = None
    logits: torch.Tensor | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """Between `load` and `allocate`."""

    shape: ModelConfig
    weights: loading.ModelWeights
    device: torch.device


class Runner:
    """One device. `load` and `allocate` first, then `forward` and `sample` in turn.

    Between the two somebody plans the memory: a device knows what it has, not what the others have.

    Args:
        folder: of the checkpoint.
        num_valid_tokens: ids that the tokenizer knows; the rest of the embedding is padding. None: all are valid.
    """

    def __init__(self, config: EngineConfig, folder: Path, num_valid_tokens: int | None = None) -> None:
        self._config = config
        self._folder = folder
        self._num_valid_tokens = num_valid_tokens
        self._pending: dict[int, Pending] = {}
        self._loaded: Loaded
        self._kv_dtype: torch.dtype
        self._model: MiniMaxM2
        self._kv: torch.Tensor
        self._rows: Rows
        self._sampler: Sampler

    # start -------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        return self._config

    def load(self, on_progress: ProgressFn) -> DeviceMemory:
        """Load the weights, and tell what is left beside them.

        Raises:
            StartupError: with what would work.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decisions = [_device_decision(device)]
        if device.type == "cpu":
            decisions.append(_set_threads())
        shape = ModelConfig.load(self._folder, self._config.load.hf_overrides)
        dtype, why = loading.dtype_of(self._config.load.dtype, device)
        decisions.append(Decision("dtype", str(dtype).removeprefix("torch."), why))
        self._kv_dtype = self._choose_kv_dtype(dtype)
        weights = loading.allocate(shape, ParallelLayout(), dtype, device)
        line = self._fill(shape, weights, on_progress)
        self._loaded = Loaded(shape, weights, device)
        on_cpu = device.type == "cpu"
        return DeviceMemory(
            kind=device.type,
            total_bytes=total_memory() if on_cpu else torch.cuda.get_device_properties(device).total_memory,
            free_bytes=available_memory() if on_cpu else torch.cuda.mem_get_info(device)[0],
            weight_bytes=weights.num_bytes,
            step_bytes=0 if on_cpu else GPU_STEP_BYTES,
            bytes_per_token=shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * self._kv_dtype.itemsize,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.max_position_embeddings,
            lines=[line, *map(str, decisions)],
        )

    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None:
        """Allocate KV memory and rows as planned, and run the first steps."""
        shape, weights, device = self._loaded.shape, self._loaded.weights, self._loaded.device
        self._model = MiniMaxM2(shape, weights, info.max_model_len)
        self._kv = self._model.allocate_kv(info.num_blocks, info.block_size, self._kv_dtype)
        self._rows = Rows(info.max_num_seqs, info.max_model_len, info.block_size, shape.vocab_size, device)
        valid = min(self._num_valid_tokens or shape.vocab_size, shape.vocab_size)
        self._sampler = Sampler(self._rows, valid, GenerationConfig.load(self._folder).eos_ids)
        on_progress("warming up", 0.0, "")
        longest = min(info.max_model_len, info.num_blocks * info.block_size) - 1
        self._warm_up(min(info.max_num_batched_tokens, longest))

    def _fill(self, shape: ModelConfig, model_weights: loading.ModelWeights, on_progress: ProgressFn) -> str:
        load = self._config.load
        if load.load_format == "dummy":
            loading.dummy(model_weights, load.seed)
            return f"weights: random (--load-format dummy, seed {load.seed})"
        return loading.load(self._folder, shape, ParallelLayout(), model_weights,
                            lambda share, note: on_progress("loading weights", share, note))  # fmt: skip

    def _choose_kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        name = self._config.cache.kv_cache_dtype
        if name not in KV_DTYPES:
            raise StartupError(f"--kv-cache-dtype must be one of {', '.join(KV_DTYPES)}, got {name!r}.")
        return KV_DTYPES[name] or dtype

    def _warm_up(self, num_tokens: int) -> None:
        """Run a prompt and a decoding step through everything, so that the first request pays for nothing."""
        num_blocks = -(-(num_tokens + 1) // self._rows.block_size)
        params = SamplingParams(top_k=40, top_p=0.95, max_tokens=2, seed=0)
        admit = RowAdmit(0, 0, [0] * num_tokens, num_tokens, 0, list(range(num_blocks)), params, 0)
        for number, (admits, length) in enumerate((([admit], num_tokens), ([], 1))):
            work = RowWork(0, 0, length, 0, [], True, num_tokens + 1)
            self.forward(StepPlan(-1 - number, admits, [work], []))
            result = self.sample(-1 - number, None)
            if result.error is not None:
                raise EngineError(f"The first step failed: {result.error}")
        self._rows.epochs[0] = -1

    # steps -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """Compute a plan's logits. Failures are kept for `sample` to report."""
        pending = self._pending[plan.step_id] = Pending(plan, time.perf_counter())
        try:
            for admit in plan.admits:
                self._rows.admit(admit)
                self._sampler.admit(admit)
            if plan.work:
                pending.batch = batching.build(plan.work, self._rows)
                pending.logits = self._model.forward(pending.batch.inputs, self._kv)
        except Exception as error:
            pending.error = self._survivable(error)

    @torch.inference_mode()
    def sample(self, step_id: int, mask: StepMask | None) -> StepResult:
        """Draw the ids of a step whose `forward` was called.

        Raises:
            EngineError: the GPU failed, or there was no such step.
        """
        pending = self._pending.pop(step_id, None)
        if pending is None:
            raise EngineError(f"Step {step_id} was to be sampled, but no forward pass of it is pending.")
        result = StepResult(step_id, [], [])
        if pending.error is None and pending.batch is not None and pending.logits is not None:
            try:
                result = self._sample(pending.batch, pending.logits, step_id, mask)
            except Exception as error:
                pending.error = self._survivable(error)
        seconds = time.perf_counter() - pending.began_s
        return StepResult(step_id, result.samples, result.prompt_logprobs, pending.error, seconds)

    def _sample(
        self, batch: batching.Batch, logits: torch.Tensor, step_id: int, mask: StepMask | None
    ) -> StepResult:
        num_samples = len(batch.sampling)
        prompt_logprobs = self._score_prompts(batch, logits[num_samples:])
        samples = []
        if num_samples:
            samples = self._sampler.sample(logits[:num_samples], batch.sampling, batch.rows, batch.positions, mask)
        return StepResult(step_id, samples, prompt_logprobs)

    def _score_prompts(self, batch: batching.Batch, logits: torch.Tensor) -> list[RowPromptLogprobs]:
        found, start = [], 0
        for item, first in batch.scored:
            own = logits[start : start + item.num_tokens]
            start += item.num_tokens
            count = min(item.num_tokens, self._rows.num_prompt[item.row] - 1 - first)
            ids = self._rows.token_ids[item.row, first + 1 : first + 1 + count]
            num_top = self._rows.params[item.row].prompt_logprobs or 0
            entries = self._sampler.score_prompt(own[:count], ids, num_top)
            found.append(RowPromptLogprobs(item.row, item.epoch, first + 1, entries))
        return found

    def _survivable(self, error: Exception) -> str:
        """The message of a failed step; raises when the device itself is broken."""
        if self._rows.device.type == "cuda" and not isinstance(error, torch.cuda.OutOfMemoryError):
            try:
                torch.cuda.synchronize()
            except RuntimeError as broken:
                raise EngineError(f"The GPU failed: {broken}") from error
        logger.error("A step failed.", exc_info=error)
        return f"{type(error).__name__}: {error}"


def total_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes of main memory that are free to use now, within the limit of a container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except OSError:  # not Linux: nobody says, so half
        free = total_memory() // 2
    for folder, limit, used, reclaimable in CGROUPS:
        try:
            left = int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text())
            stat = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such controller, or "max": no limit
            continue
        free = min(free, left + int(stat.get(reclaimable, 0)))
    return max(free, 0)


def _device_decision(device: torch.device) -> Decision:
    if device.type == "cuda":
        return Decision("device", torch.cuda.get_device_name(device), "torch sees a GPU")
    return Decision("device", "CPU", f"torch {torch.__version__} sees no GPU")


def _set_threads() -> Decision:
    """One core is left to the API process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores - 1)
    torch.set_num_threads(threads)
    return Decision("threads", threads, f"{cores} cores, one of them for the API process")

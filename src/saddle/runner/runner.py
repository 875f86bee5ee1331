"""One device's work: load the model, then run plans, two launches a step.

`forward(plan)` admits rows and computes logits; `sample(step_id, mask)` draws the ids and returns a handle, whose
`wait` gives them. How steps are computed is a path, chosen once by what the device is (see `steps.StepPath`). A step
that fails returns its error and leaves the other rows as they are; an error of the GPU itself ends the process, since
nothing after it can be trusted.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saddle.config import Decision, EngineConfig
from saddle.errors import EngineError
from saddle.kernels.target import detect
from saddle.model.config import ModelConfig
from saddle.protocol import DeviceInfo, DeviceMemory, ProgressFn, StepMask, StepPlan, StepResult
from saddle.runner.steps import Outcome, StepHandle, StepPath
from saddle.runner.torch_path import TorchPath

logger = logging.getLogger(__name__)

CGROUPS = (  # folder, limit, use, and what of it are pages of files that can go: a checkpoint just read is all that
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(slots=True)
class Pending:
    """A step between its two launches."""

    plan: StepPlan
    began_s: float
    launched: Any = None
    error: str | None = None


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
        self._device: torch.device
        self.path: StepPath

    # start -------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def waits(self) -> bool:
        """Whether `forward` and `sample` wait for the device."""
        return self.path.waits

    def load(self, on_progress: ProgressFn) -> DeviceMemory:
        """Load the weights, and tell what is left beside them.

        Raises:
            StartupError: with what would work.
        """
        self._device = device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = device.type == "cpu"
        lines = [str(_device_decision(device))]
        if on_cpu:
            lines.append(str(_set_threads()))
        shape = ModelConfig.load(self._folder, self._config.load.hf_overrides)
        self.path = path = self._choose_path(shape, lines, on_progress)
        return DeviceMemory(
            kind=device.type,
            total_bytes=total_memory() if on_cpu else torch.cuda.get_device_properties(device).total_memory,
            free_bytes=available_memory() if on_cpu else torch.cuda.mem_get_info(device)[0],
            weight_bytes=path.weight_bytes,
            step_bytes=path.step_bytes,
            bytes_per_token=path.bytes_per_token,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.max_position_embeddings,
            lines=[path.lines[0], *lines, *path.lines[1:]],
        )

    def _choose_path(self, shape: ModelConfig, lines: list[str], on_progress: ProgressFn) -> StepPath:
        if self._device.type == "cuda":
            target = detect(self._device)
            if target.has_triton_path:
                from saddle.model.fused import why_not  # triton is not everywhere that torch is
                from saddle.runner.fused_path import FusedPath

                reason = why_not(shape)
                if reason is None:
                    return FusedPath(self._config, self._folder, shape, target, self._device, self._num_valid_tokens,
                                     on_progress)  # fmt: skip
                lines.append(f"{target.name}: plain torch, because {reason}.")
            else:
                lines += target.decisions()
        return TorchPath(self._config, self._folder, shape, self._device, self._num_valid_tokens, on_progress)

    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None:
        """Allocate KV memory and rows as planned, and run the first steps."""
        on_progress("warming up", 0.0, "")
        longest = min(info.max_model_len, info.num_blocks * info.block_size) - 1
        with torch.inference_mode():
            self.path.allocate(info, on_progress)
            try:
                self.path.warm_up(min(info.max_num_batched_tokens, longest), on_progress)
            except Exception as error:
                raise EngineError(f"The first step failed: {type(error).__name__}: {error}") from error

    # steps -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """Enqueue a plan's forward pass. Failures are kept for the result to report."""
        pending = self._pending[plan.step_id] = Pending(plan, time.perf_counter())
        try:
            for admit in plan.admits:
                self.path.admit(admit)
            if plan.work:
                pending.launched = self.path.forward(plan.work)
        except Exception as error:
            pending.error = self._survivable(error)

    @torch.inference_mode()
    def sample(self, step_id: int, mask: StepMask | None) -> StepHandle:
        """Enqueue the sampling of a step whose `forward` was called; the handle's `wait` gives its result.

        Raises:
            EngineError: the GPU failed, or there was no such step.
        """
        pending = self._pending.pop(step_id, None)
        if pending is None:
            raise EngineError(f"Step {step_id} was to be sampled, but no forward pass of it is pending.")
        read: Callable[[], Outcome] | None = None
        if pending.error is None and pending.launched is not None:
            try:
                read = self.path.sample(pending.launched, mask)
            except Exception as error:
                pending.error = self._survivable(error)
        seconds = time.perf_counter() - pending.began_s
        return StepHandle(step_id, functools.partial(self._finish, pending, read, seconds))

    def _finish(self, pending: Pending, read: Callable[[], Outcome] | None, seconds: float) -> StepResult:
        """Read what a step found; `seconds` is how long its two calls took."""
        outcome = Outcome([], [])
        if read is not None:
            try:
                outcome = read()
            except Exception as error:
                pending.error = self._survivable(error)
        device_s = seconds if outcome.device_s is None else outcome.device_s
        return StepResult(pending.plan.step_id, outcome.samples, outcome.prompt_logprobs, pending.error, device_s)

    def _survivable(self, error: Exception) -> str:
        """The message of a failed step; raises when the device itself is broken."""
        if self._device.type == "cuda" and not isinstance(error, torch.cuda.OutOfMemoryError):
            if isinstance(error, EngineError):
                raise error
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

"""Steps in plain torch: on CPUs, and on GPUs that the kernels do not run on. A step is done when its call returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from saddle.config import Decision, EngineConfig
from saddle.errors import StartupError
from saddle.model import weights as loading
from saddle.model.config import GenerationConfig, ModelConfig
from saddle.model.m2 import MiniMaxM2
from saddle.parallel.layout import ParallelLayout
from saddle.protocol import (
    DeviceInfo,
    ProgressFn,
    RowAdmit,
    RowPromptLogprobs,
    RowSample,
    RowWork,
    SamplingParams,
    StepMask,
)
from saddle.runner import batch as batching
from saddle.runner.rows import Rows
from saddle.runner.sampler import Sampler
from saddle.runner.steps import Outcome

KV_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
GPU_STEP_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Launched:
    """A step between its two launches."""

    batch: batching.Batch
    logits: torch.Tensor


class TorchPath:
    """See `steps.StepPath`.

    Args:
        num_valid_tokens: ids that the tokenizer knows; the rest of the embedding is padding. None: all are valid.

    Raises:
        StartupError: with what would work.
    """

    waits = True

    def __init__(
        self, config: EngineConfig, folder: Path, shape: ModelConfig, device: torch.device,
        num_valid_tokens: int | None, on_progress: ProgressFn,
    ) -> None:  # fmt: skip
        self._shape, self._device, self._folder = shape, device, folder
        self._num_valid = min(num_valid_tokens or shape.vocab_size, shape.vocab_size)
        dtype, why = loading.dtype_of(config.load.dtype, device)
        self._kv_dtype = _choose_kv_dtype(config.cache.kv_cache_dtype, dtype)
        self._weights = loading.allocate(shape, ParallelLayout(), dtype, device)
        line = self._fill(config, on_progress)
        self.lines = [line, str(Decision("dtype", str(dtype).removeprefix("torch."), why))]
        self.weight_bytes = self._weights.num_bytes
        self.step_bytes = 0 if device.type == "cpu" else GPU_STEP_BYTES
        self.bytes_per_token = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * self._kv_dtype.itemsize
        self.rows: Rows
        self._model: MiniMaxM2
        self._kv: torch.Tensor
        self._sampler: Sampler

    def _fill(self, config: EngineConfig, on_progress: ProgressFn) -> str:
        load = config.load
        if load.load_format == "dummy":
            loading.dummy(self._weights, load.seed)
            return f"weights: random (--load-format dummy, seed {load.seed})"
        return loading.load(self._folder, self._shape, ParallelLayout(), self._weights,
                            lambda share, note: on_progress("loading weights", share, note))  # fmt: skip

    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None:
        self._model = MiniMaxM2(self._shape, self._weights, info.max_model_len)
        self._kv = self._model.allocate_kv(info.num_blocks, info.block_size, self._kv_dtype)
        self.rows = Rows(info.max_num_seqs, info.max_model_len, info.block_size, info.vocab_size, self._device)
        self._sampler = Sampler(self.rows, self._num_valid, GenerationConfig.load(self._folder).eos_ids)

    def warm_up(self, num_tokens: int, on_progress: ProgressFn) -> None:
        """A prompt and a decoding step."""
        num_blocks = -(-(num_tokens + 1) // self.rows.block_size)
        params = SamplingParams(top_k=40, top_p=0.95, max_tokens=2, seed=0)
        self.admit(RowAdmit(0, 0, [0] * num_tokens, num_tokens, 0, list(range(num_blocks)), params, 0))
        for length in (num_tokens, 1):
            self.sample(self.forward([RowWork(0, 0, length, 0, [], True, num_tokens + 1)]), None)
        self.rows.epochs[0] = -1

    def admit(self, admit: RowAdmit) -> None:
        self.rows.admit(admit)
        self._sampler.admit(admit)

    def forward(self, work: list[RowWork]) -> Launched:
        batch = batching.build(work, self.rows)
        return Launched(batch, self._model.forward(batch.inputs, self._kv))

    def sample(self, launched: Launched, mask: StepMask | None) -> Callable[[], Outcome]:
        batch, logits = launched.batch, launched.logits
        num_samples = len(batch.sampling)
        prompt_logprobs = self._score_prompts(batch, logits[num_samples:])
        samples: list[RowSample] = []
        if num_samples:
            samples = self._sampler.sample(logits[:num_samples], batch.sampling, batch.rows, batch.positions, mask)
        outcome = Outcome(samples, prompt_logprobs)
        return lambda: outcome

    def _score_prompts(self, batch: batching.Batch, logits: torch.Tensor) -> list[RowPromptLogprobs]:
        found, start = [], 0
        for item, first in batch.scored:
            own = logits[start : start + item.num_tokens]
            start += item.num_tokens
            count = min(item.num_tokens, self.rows.num_prompt[item.row] - 1 - first)
            ids = self.rows.token_ids[item.row, first + 1 : first + 1 + count]
            num_top = self.rows.params[item.row].prompt_logprobs or 0
            entries = self._sampler.score_prompt(own[:count], ids, num_top)
            found.append(RowPromptLogprobs(item.row, item.epoch, first + 1, entries))
        return found


def _choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    if name not in KV_DTYPES:
        raise StartupError(f"--kv-cache-dtype must be one of {', '.join(KV_DTYPES)} here, got {name!r}.")
    return KV_DTYPES[name] or dtype

"""`saddle bench latency` and `throughput`: whole requests through the engine core in this process, without HTTP.

Prompts are random ids below 10,000, sampled at temperature 1, and every request runs to its full length. `latency`
runs one batch again and again and reports the seconds it took; `throughput` gives the engine everything at once.
Keys of the results are those of vLLM's benches of the same names.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from saddle import launch
from saddle.bench.workload import check_least, check_range_ratio
from saddle.config import EngineConfig
from saddle.engine.core import EngineCore
from saddle.errors import EngineError, StartupError
from saddle.executor.base import ProgressFn
from saddle.model.source import resolve_model
from saddle.protocol import DeviceInfo, FinishReason, Refused, SamplingParams, TokenRequest

MOST_IDS = 10_000
PERCENTAGES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySpec:
    """One batch, measured again and again."""

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    n: int = 1
    num_iters_warmup: int = 10
    num_iters: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_iters_warmup": 0}
        for name in ("input_len", "output_len", "batch_size", "n", "num_iters_warmup", "num_iters"):
            check_least(_flag(name), getattr(self, name), least.get(name, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSpec:
    """Many requests, all at once. Lengths are drawn uniformly from [len * (1 - ratio), len * (1 + ratio)]."""

    input_len: int = 1024
    output_len: int = 128
    num_prompts: int = 1000
    n: int = 1
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts", "n"):
            check_least(_flag(name), getattr(self, name), 1)
        check_least("--random-prefix-len", self.prefix_len, 0)
        check_range_ratio(self.range_ratio)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and how many tokens to generate from it."""

    ids: list[int]
    output_len: int


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


class Engine:
    """A loaded model that runs jobs to their end.

    Args:
        longest: most tokens of a prompt and its output; the context, where the configuration leaves it open.
    """

    def __init__(self, config: EngineConfig, longest: int, on_progress: ProgressFn) -> None:
        if config.scheduler.max_model_len is None:
            config = replace(config, scheduler=replace(config.scheduler, max_model_len=max(longest, 2)))
        self.model_id = config.load.model
        folder = resolve_model(config.load.model, config.load.revision, config.load.download_dir)
        self._core: EngineCore
        self.info: DeviceInfo
        self._core, self.info = launch.build_core(config, Path(folder), on_progress)
        if longest > self.info.max_model_len:
            raise StartupError(f"Prompt and output take {longest} tokens, the context is {self.info.max_model_len}.")
        self._runs = 0

    def run(self, jobs: Sequence[Job], n: int) -> tuple[float, int]:
        """Seconds from the first submit to the last token of all jobs, and how many tokens were generated.

        Raises:
            EngineError: a request was refused or failed.
        """
        self._runs += 1
        began = time.perf_counter()
        left = set()
        for number, job in enumerate(jobs):
            params = SamplingParams(ignore_eos=True, max_tokens=job.output_len)
            for choice in range(n):
                name = f"{self._runs}-{number}-{choice}"
                left.add(name)
                self._core.submit(TokenRequest(request_id=name, prompt_ids=job.ids, params=params,
                                               arrival_s=time.monotonic()))  # fmt: skip
        refused = [answer for answer in self._core.answers() if isinstance(answer, Refused)]
        if refused:
            raise EngineError(f"{len(refused)} requests were refused, the first because: {refused[0].message}")
        generated = 0
        while left:
            for delta in self._core.step():
                generated += len(delta.token_ids)
                if delta.finish_reason is FinishReason.ERROR:
                    raise EngineError(f"A request failed: {delta.error}")
                if delta.finish_reason is not None:
                    left.discard(delta.request_id)
        return time.perf_counter() - began, generated

    def close(self) -> None:
        self._core.stop()


def _random_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    most = min(MOST_IDS, vocab_size)
    return [rng.randrange(most) for _ in range(count)]


def latency(
    config: EngineConfig, spec: LatencySpec, on_progress: ProgressFn, on_iteration: Callable[[float], None]
) -> dict[str, Any]:
    """Seconds that one batch takes, over `num_iters` runs. The prefix cache is off: a run must not profit from the
    one before.

    Args:
        on_iteration: told the seconds of each measured run.
    """
    config = replace(config, cache=replace(config.cache, enable_prefix_caching=False))
    engine = Engine(config, spec.input_len + spec.output_len, on_progress)
    rng = random.Random(spec.seed)
    jobs = [Job(_random_ids(rng, spec.input_len, engine.info.vocab_size), spec.output_len)
            for _ in range(spec.batch_size)]  # fmt: skip
    seconds = []
    try:
        for iteration in range(-spec.num_iters_warmup, spec.num_iters):
            found, _ = engine.run(jobs, spec.n)
            if iteration >= 0:
                seconds.append(found)
                on_iteration(found)
    finally:
        engine.close()
    ordered = sorted(seconds)
    return {
        "model_id": engine.model_id,
        "avg_latency": fmean(seconds),
        "latencies": seconds,
        "percentiles": {str(percent): percentile(ordered, percent) for percent in PERCENTAGES},
    }


def throughput(config: EngineConfig, spec: ThroughputSpec, on_progress: ProgressFn) -> dict[str, Any]:
    """Requests and tokens a second when everything is there from the start."""
    low, high = 1 - spec.range_ratio, 1 + spec.range_ratio
    longest = spec.prefix_len + math.ceil(spec.input_len * high) + math.ceil(spec.output_len * high)
    engine = Engine(config, longest, on_progress)
    rng, vocab_size = random.Random(spec.seed), engine.info.vocab_size

    def length(mean: int) -> int:
        return rng.randint(max(1, math.floor(mean * low)), math.ceil(mean * high))

    prefix = _random_ids(rng, spec.prefix_len, vocab_size)
    jobs = [Job(prefix + _random_ids(rng, length(spec.input_len), vocab_size), length(spec.output_len))
            for _ in range(spec.num_prompts)]  # fmt: skip
    try:
        engine.run([Job([0], 2)], 1)  # what the first request pays for is not throughput
        elapsed, generated = engine.run(jobs, spec.n)
    finally:
        engine.close()
    prompts = sum(len(job.ids) for job in jobs)
    return {
        "model_id": engine.model_id,
        "elapsed_time": elapsed,
        "num_requests": len(jobs),
        "total_num_tokens": prompts + generated,
        "total_output_tokens": generated,
        "requests_per_second": len(jobs) / elapsed,
        "tokens_per_second": (prompts + generated) / elapsed,
        "output_tokens_per_second": generated / elapsed,
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the neighbours, as numpy's default."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

"""The figures of a load test, defined as `vllm bench serve` defines them so that they compare.

Seconds go in; latencies come out in milliseconds, throughputs per second of the benchmark's duration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saddle.bench.client import RequestOutput

LATENCIES = ("ttft", "tpot", "itl", "e2el", "queue")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, median, population standard deviation and chosen percentiles (linear interpolation), in ms."""

    mean: float
    median: float
    std: float
    percentiles: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Distribution:
        values = np.asarray(seconds if len(seconds) else [0.0], dtype=np.float64) * 1000.0
        return cls(
            mean=float(values.mean()), median=float(np.median(values)), std=float(values.std()),
            percentiles=tuple((percent, float(np.percentile(values, percent))) for percent in percentiles),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """All figures of one run.

    output_lens   tokens of each request in order, 0 for a failed one
    request_goodput   requests a second that met every objective; None when there is none
    max_output_tokens_per_s   most chunks in one second since the first start
    max_concurrent_requests   most requests that were alive in one such second
    latencies   distributions by name: ttft, tpot, itl, e2el, queue
    """

    completed: int
    failed: int
    duration: float
    total_input: int
    total_output: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    latencies: Mapping[str, Distribution]
    output_lens: tuple[int, ...]


def output_len(output: RequestOutput) -> int:
    """Tokens of a successful request: the server's count, else the counted chunks."""
    return output.output_tokens or len(output.itl) + 1


def time_per_output_token(output: RequestOutput) -> float:
    """Seconds a token after the first one; 0 for an answer of one token."""
    count = output_len(output)
    return (output.latency - output.ttft) / (count - 1) if count > 1 else 0.0


def calculate(
    outputs: Sequence[RequestOutput], duration: float, percentiles: Sequence[float],
    goodput: Mapping[str, float] | None = None,
) -> Metrics:  # fmt: skip
    """Reduce the outputs of a run.

    Args:
        outputs: one entry a request, failed ones included.
        duration: seconds from the first dispatch to the last response.
        percentiles: which ones, 0 to 100.
        goodput: objectives in milliseconds by name (ttft, tpot, e2el).
    """
    done = [output for output in outputs if output.success]
    lens = tuple(output_len(output) if output.success else 0 for output in outputs)
    total_input, total_output = sum(output.prompt_tokens for output in done), sum(lens)
    samples = {
        "ttft": [output.ttft for output in done],
        "tpot": [time_per_output_token(output) for output in done if output_len(output) > 1],
        "itl": [gap for output in done for gap in output.itl],
        "e2el": [output.latency for output in done],
        "queue": [output.queued for output in done],
    }
    tokens, alive = per_second(done)
    return Metrics(
        completed=len(done), failed=len(outputs) - len(done), duration=duration,
        total_input=total_input, total_output=total_output,
        request_throughput=len(done) / duration,
        request_goodput=sum(meets(output, goodput) for output in done) / duration if goodput else None,
        output_throughput=total_output / duration,
        total_token_throughput=(total_input + total_output) / duration,
        max_output_tokens_per_s=float(max(tokens, default=0)), max_concurrent_requests=max(alive, default=0),
        latencies={name: Distribution.of(values, percentiles) for name, values in samples.items()},
        output_lens=lens,
    )  # fmt: skip


def meets(output: RequestOutput, goodput: Mapping[str, float]) -> bool:
    """Whether a successful request meets every objective (milliseconds by name)."""
    measured = {"ttft": output.ttft, "tpot": time_per_output_token(output), "e2el": output.latency}
    return all(measured[name] * 1000.0 <= limit for name, limit in goodput.items())


def per_second(done: Sequence[RequestOutput]) -> tuple[list[int], list[int]]:
    """Chunks that arrived, and requests alive, in each second since the first start.

    A request counts in every second that it touches, so two that follow each other within one second both do.
    """
    if not done:
        return [], []
    first = min(output.start for output in done)
    seconds = math.ceil(max(output.start + output.latency for output in done) - first) + 1
    tokens, alive = [0] * seconds, [0] * seconds
    for output in done:
        moment = output.start + output.ttft - first
        tokens[min(int(moment), seconds - 1)] += 1
        for gap in output.itl:
            moment += gap
            tokens[min(int(moment), seconds - 1)] += 1
        begin, end = int(output.start - first), int(output.start + output.latency - first)
        for second in range(begin, end + 1):
            alive[second] += 1
    return tokens, alive

"""A run as the table and the JSON file that `vllm bench serve` writes, so that scripts made for it work.

In the JSON, throughputs are per second, names that end in `_ms` milliseconds, all other times seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from saddle.bench.client import RequestOutput
from saddle.bench.metrics import LATENCIES, Metrics

TITLES = {
    "ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)", "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency", "queue": "Client Queue Time",
}  # fmt: skip
LABELS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL", "queue": "Queue"}
WIDTH = 50


def table(
    metrics: Metrics, selected: Sequence[str], request_rate: float, max_concurrency: int | None
) -> list[str]:
    """The lines of the result table; latency blocks only for the `selected` names."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]

    def row(label: str, value: float) -> None:
        lines.append(f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}")

    row("Successful requests:", metrics.completed)
    row("Failed requests:", metrics.failed)
    if max_concurrency is not None:
        row("Maximum request concurrency:", max_concurrency)
    if request_rate != float("inf"):
        row("Request rate configured (RPS):", float(request_rate))
    row("Benchmark duration (s):", metrics.duration)
    row("Total input tokens:", metrics.total_input)
    row("Total generated tokens:", metrics.total_output)
    row("Request throughput (req/s):", metrics.request_throughput)
    if metrics.request_goodput is not None:
        row("Request goodput (req/s):", metrics.request_goodput)
    row("Output token throughput (tok/s):", metrics.output_throughput)
    row("Peak output token throughput (tok/s):", metrics.max_output_tokens_per_s)
    row("Peak concurrent requests:", float(metrics.max_concurrent_requests))
    row("Total token throughput (tok/s):", metrics.total_token_throughput)
    for name in LATENCIES:
        if name in selected:
            found = metrics.latencies[name]
            lines.append(f"{TITLES[name]:-^{WIDTH}}")
            row(f"Mean {LABELS[name]} (ms):", found.mean)
            row(f"Median {LABELS[name]} (ms):", found.median)
            for percent, value in found.percentiles:
                row(f"P{number(percent)} {LABELS[name]} (ms):", value)
    lines.append("=" * WIDTH)
    return lines


def number(value: float) -> str:
    """99.0 as "99", 99.9 as "99.9"."""
    return str(int(value)) if value == int(value) else str(value)


def result(
    metrics: Metrics, outputs: Sequence[RequestOutput], head: Mapping[str, Any], load: Mapping[str, Any],
    detailed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The JSON of a run.

    Args:
        head: what was measured (date, backend, model, metadata), first in the result.
        load: how it was loaded (request_rate, burstiness, max_concurrency, ramp-up).
        detailed: add one entry a request: lengths, times, texts, errors.
    """
    found: dict[str, Any] = {
        **head, **load,
        "duration": metrics.duration, "completed": metrics.completed, "failed": metrics.failed,
        "total_input_tokens": metrics.total_input, "total_output_tokens": metrics.total_output,
        "request_throughput": metrics.request_throughput, "request_goodput": metrics.request_goodput,
        "output_throughput": metrics.output_throughput, "total_token_throughput": metrics.total_token_throughput,
        "max_output_tokens_per_s": metrics.max_output_tokens_per_s,
        "max_concurrent_requests": metrics.max_concurrent_requests,
        "rtfx": 0.0,  # a figure of audio models, kept for scripts that read the key
        "latencies": [output.latency for output in outputs], "queue_times": [output.queued for output in outputs],
    }  # fmt: skip
    for name in LATENCIES:
        distribution = metrics.latencies[name]
        found[f"mean_{name}_ms"] = distribution.mean
        found[f"median_{name}_ms"] = distribution.median
        found[f"std_{name}_ms"] = distribution.std
        for percent, value in distribution.percentiles:
            found[f"p{number(percent)}_{name}_ms"] = value
    if detailed:
        found.update(
            input_lens=[output.prompt_tokens for output in outputs], output_lens=list(metrics.output_lens),
            ttfts=[output.ttft for output in outputs], itls=[output.itl for output in outputs],
            start_times=[output.start for output in outputs],
            generated_texts=[output.text for output in outputs], errors=[output.error for output in outputs],
        )  # fmt: skip
    return found


def file_name(label: str, request_rate: float, max_concurrency: int | None, model: str, when: datetime) -> str:
    """The default name of the JSON file."""
    rate = "inf" if request_rate == float("inf") else str(request_rate)
    concurrency = "" if max_concurrency is None else f"-concurrency{max_concurrency}"
    return f"{label}-{rate}qps{concurrency}-{model.rstrip('/').split('/')[-1]}-{when:%Y%m%d-%H%M%S}.json"


def save(found: Mapping[str, Any], path: Path, append: bool = False) -> None:
    """Write one JSON object a line, after what the file holds when `append`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    print(f"Result saved to {path}", file=sys.stderr)

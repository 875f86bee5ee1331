"""What the server counts, exposed in Prometheus' text format.

Names, labels and buckets are those of vLLM with the prefix `saddle:`, so that its dashboards work after a change of
prefix, or unchanged with `vllm_names`. Observations on the per-token path are a bisection and two additions; the
families are built when somebody scrapes. Counters of the engine are not copied here step by step: the latest
`EngineStats` is read at scrape time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from saddle.protocol import EngineReady, EngineStats, FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ["model_name", "engine"]

TTFT_S = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_S = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY_S = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)


def token_bounds(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, ... up to `longest` tokens."""
    bounds: list[float] = []
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > longest:
                return tuple(bounds) or (1,)
            bounds.append(step * scale)
        scale *= 10


class Histogram:
    """Counts of observations by upper bound; the last count is above all bounds."""

    __slots__ = ("_bounds", "_counts", "_sum", "help", "name")

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name, self.help = name, help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, prefix: str, labels: Sequence[str]) -> Metric:
        running, buckets = 0, []
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self._counts, strict=True):
            running += count
            buckets.append((bound, running))
        family = HistogramMetricFamily(prefix + self.name, self.help, labels=LABELS)
        family.add_metric(labels, buckets, self._sum)
        return family


class Metrics:
    """All families of one server. Times are seconds, sizes are tokens.

    Args:
        model_name: label of every sample.
        max_model_len: upper end of the token histograms.
        vllm_names: expose every family a second time with the prefix `vllm:`.
    """

    def __init__(self, model_name: str, max_model_len: int = 196_608, vllm_names: bool = False) -> None:
        self._labels = [model_name, "0"]
        self._prefixes = ("saddle:", "vllm:") if vllm_names else ("saddle:",)
        self._stats: Callable[[], EngineStats] = EngineStats
        self._ready: Callable[[], EngineReady | None] = lambda: None
        self.num_in_flight = 0
        self.num_responses = self.num_response_bytes = 0  # what the responses API keeps
        self.finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})
        self.rejected: Counter[str] = Counter()
        self.num_cached_tokens = 0
        sizes = token_bounds(max_model_len)
        self.ttft = Histogram("time_to_first_token_seconds", "Time to first token.", TTFT_S)
        self.itl = Histogram("inter_token_latency_seconds", "Time between tokens.", TOKEN_S)
        self.tpot = Histogram("request_time_per_output_token_seconds", "Mean time per token of a request.", TOKEN_S)
        self.e2e = Histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_S)
        self.queue = Histogram("request_queue_time_seconds", "Time waiting for a row.", LATENCY_S)
        self.inference = Histogram("request_inference_time_seconds", "First schedule to last token.", LATENCY_S)
        self.prefill = Histogram("request_prefill_time_seconds", "First schedule to first token.", LATENCY_S)
        self.decode = Histogram("request_decode_time_seconds", "First to last token.", LATENCY_S)
        self.prompt = Histogram("request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self.computed = Histogram("request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", sizes)
        self.generation = Histogram("request_generation_tokens", "Generated tokens of a request.", sizes)
        self.longest = Histogram("request_max_num_generation_tokens", "Longest choice of a request.", sizes)
        self.params_n = Histogram("request_params_n", "The parameter n.", CHOICES)
        self.params_max_tokens = Histogram("request_params_max_tokens", "The parameter max_tokens.", sizes)
        self.step_tokens = Histogram("iteration_tokens_total", "Tokens of an engine step.", STEP_TOKENS)
        self._histograms = [value for value in vars(self).values() if isinstance(value, Histogram)]
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def bind(self, stats: Callable[[], EngineStats], ready: Callable[[], EngineReady | None]) -> None:
        """Where the engine's counters are read from at scrape time."""
        self._stats, self._ready = stats, ready

    def expose(self) -> bytes:
        """The page of `GET /metrics`."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry: every family, once per prefix."""
        stats, ready = self._stats(), self._ready()
        for prefix in self._prefixes:
            yield from self._gauges(prefix, stats, ready)
            yield from self._counters(prefix, stats)
            for histogram in self._histograms:
                yield histogram.family(prefix, self._labels)

    def _gauges(self, prefix: str, stats: EngineStats, ready: EngineReady | None) -> Iterator[Metric]:
        used = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
        for name, help, value in (
            ("num_requests_running", "Requests that hold a row.", stats.num_running),
            ("num_requests_waiting", "Requests that wait for a row.", stats.num_waiting),
            ("num_requests_in_flight", "Requests that the HTTP side is answering.", self.num_in_flight),
            ("responses_stored", "Responses that can be read again or continued.", self.num_responses),
            ("responses_stored_bytes", "Memory that they take.", self.num_response_bytes),
            ("kv_cache_usage_perc", "Share of KV blocks that running requests hold, 0 to 1.",
             used / stats.num_blocks if stats.num_blocks else 0.0),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(prefix + name, help, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        waiting = GaugeMetricFamily(prefix + "num_requests_waiting_by_reason", "Waiting requests.",
                                    labels=[*LABELS, "reason"])  # fmt: skip
        waiting.add_metric([*self._labels, "capacity"], stats.num_waiting)
        yield waiting
        blocks = GaugeMetricFamily(prefix + "kv_cache_blocks", "KV blocks by state.", labels=[*LABELS, "state"])
        for state, count in (("total", stats.num_blocks), ("free", stats.num_free_blocks),
                             ("cached", stats.num_cached_blocks), ("used", used)):  # fmt: skip
            blocks.add_metric([*self._labels, state], count)
        yield blocks
        if ready is not None:
            info = InfoMetricFamily(prefix + "cache_config", "The KV cache.", labels=LABELS)
            info.add_metric(self._labels, {"block_size": str(ready.block_size), "num_blocks": str(ready.num_blocks),
                                           "max_model_len": str(ready.max_model_len)})  # fmt: skip
            yield info

    def _counters(self, prefix: str, stats: EngineStats) -> Iterator[Metric]:
        for name, help, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.num_cache_hits),
            ("prompt_tokens", "Prompt tokens of admitted requests.", stats.num_prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens of finished requests that came from the cache.",
             self.num_cached_tokens),
            ("generation_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("num_preemptions", "Requests that gave up their row.", stats.num_preemptions),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("engine_failed_steps", "Steps that failed.", stats.num_failed_steps),
            ("engine_host_seconds", "Time of the engine outside the device.", stats.host_s),
            ("engine_device_seconds", "Time of the device.", stats.device_s),
        ):  # fmt: skip
            counter = CounterMetricFamily(prefix + name, help, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        for name, label, help, counts in (
            ("request_success", "finished_reason", "Requests by the reason that ended them.", self.finished),
            ("admission_rejections", "reason", "Requests that were not admitted.", self.rejected),
        ):
            counter = CounterMetricFamily(prefix + name, help, labels=[*LABELS, label])
            for key, value in sorted(counts.items()):
                counter.add_metric([*self._labels, key], value)
            yield counter

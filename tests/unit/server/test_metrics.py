"""The arithmetic of the histograms and the two sets of names."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from saddle.metrics import Histogram, Metrics, token_bounds
from saddle.protocol import EngineReady, EngineStats


def names(page: bytes) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(page.decode()) for sample in family.samples}


def test_buckets_hold_their_upper_bound() -> None:
    histogram = Histogram("h", "help", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    (family,) = [histogram.family("p:", ["m", "0"])]
    found = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert found == {"1.0": 2, "2.0": 7, "+Inf": 8}
    assert [s.value for s in family.samples if s.name.endswith("_sum")] == [13.5]


@pytest.mark.parametrize(
    ("longest", "last", "count"), [(1, 1, 1), (10, 10, 4), (2048, 2000, 11), (196_608, 100_000, 16)]
)
def test_token_bounds(longest: int, last: int, count: int) -> None:
    bounds = token_bounds(longest)
    assert (bounds[0], bounds[-1], len(bounds)) == (1, last, count)


def test_vllm_names_are_the_same_families_again() -> None:
    plain, both = Metrics("m"), Metrics("m", vllm_names=True)
    ready = EngineReady(512, 16, 64, 100)
    for metrics in (plain, both):
        metrics.bind(EngineStats, lambda: ready)
    ours = {name for name in names(plain.expose()) if ":" in name}
    assert all(name.startswith("saddle:") for name in ours)
    theirs = {name for name in names(both.expose()) if name.startswith("vllm:")}
    assert {name.replace("vllm:", "saddle:") for name in theirs} == ours


def test_the_names_of_dashboards_are_there() -> None:
    found = names(Metrics("m", vllm_names=True).expose())
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
        "request_success_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket", "request_inference_time_seconds_bucket",
        "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket", "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket", "request_max_num_generation_tokens_bucket", "request_params_n_bucket",
        "request_params_max_tokens_bucket", "iteration_tokens_total_bucket",
    ):  # fmt: skip
        assert f"vllm:{name}" in found, name

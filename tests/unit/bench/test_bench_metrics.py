"""Arithmetic of the figures and the exact lines and keys of the report, against values computed by hand."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from saddle.bench.client import RequestOutput
from saddle.bench.metrics import Distribution, calculate, per_second, time_per_output_token
from saddle.bench.report import file_name, number, result, save, table

# Two requests that succeed and one that fails. By hand:
#   A: starts 100.0, ttft 0.5, gaps 0.3 0.4, latency 1.2, 3 tokens: tpot 0.7 / 2 = 0.35; chunks at +0.5 +0.8 +1.2
#   B: starts 100.5, ttft 1.0, gap 0.6,      latency 1.6, 5 tokens: tpot 0.6 / 4 = 0.15; chunks at +1.5 +2.1
A = RequestOutput(prompt_tokens=10, success=True, output_tokens=3, arrival=99.9, start=100.0, ttft=0.5, latency=1.2,
                  itl=[0.3, 0.4], text="abc")  # fmt: skip
B = RequestOutput(prompt_tokens=20, success=True, output_tokens=5, arrival=100.0, start=100.5, ttft=1.0, latency=1.6,
                  itl=[0.6], text="de")  # fmt: skip
C = RequestOutput(prompt_tokens=1000, arrival=100.0, start=100.0, error="HTTP 500: broken")


def test_figures_by_hand() -> None:
    metrics = calculate([A, B, C], duration=4.0, percentiles=(50, 99))
    assert (metrics.completed, metrics.failed) == (2, 1)
    assert (metrics.total_input, metrics.total_output) == (30, 8)
    assert metrics.request_throughput == 0.5
    assert metrics.output_throughput == 2.0
    assert metrics.total_token_throughput == 9.5
    assert metrics.request_goodput is None
    assert metrics.output_lens == (3, 5, 0)
    ttft, tpot, itl, e2el, queue = (metrics.latencies[name] for name in ("ttft", "tpot", "itl", "e2el", "queue"))
    assert (ttft.mean, ttft.median, ttft.std) == pytest.approx((750, 750, 250))
    assert dict(ttft.percentiles) == pytest.approx({50: 750, 99: 995})  # 500 + 0.99 * 500
    assert (tpot.mean, tpot.std) == pytest.approx((250, 100))
    assert itl.mean == pytest.approx(1300 / 3)  # gaps pooled over requests
    assert itl.median == pytest.approx(400)
    assert e2el.mean == pytest.approx(1400)
    assert queue.mean == pytest.approx(300)


def test_seconds_of_chunks_and_requests() -> None:
    # chunks at 0.5 0.8 1.2 (A), 1.5 2.1 (B); A touches seconds 0 and 1, B (0.5 to 2.1) seconds 0, 1 and 2
    assert per_second([A, B]) == ([2, 2, 1, 0], [2, 2, 1, 0])
    assert per_second([]) == ([], [])
    metrics = calculate([A, B], duration=4.0, percentiles=(99,))
    assert (metrics.max_output_tokens_per_s, metrics.max_concurrent_requests) == (2.0, 2)


def test_server_without_usage_counts_chunks() -> None:
    output = RequestOutput(prompt_tokens=1, success=True, start=0.0, ttft=0.1, latency=0.5, itl=[0.2, 0.2])
    assert calculate([output], 1.0, ()).total_output == 3
    assert time_per_output_token(output) == pytest.approx(0.2)


def test_one_token_answers_have_no_tpot() -> None:
    one = RequestOutput(prompt_tokens=1, success=True, output_tokens=1, ttft=0.1, latency=0.1)
    assert calculate([one, A], 1.0, ()).latencies["tpot"].mean == pytest.approx(350)
    assert calculate([one], 1.0, (), {"tpot": 0.0}).request_goodput == 1.0  # its tpot is 0


@pytest.mark.parametrize(("goodput", "good"), [
    ({"ttft": 500.0}, 1), ({"ttft": 1000.0}, 2), ({"ttft": 1000.0, "tpot": 200.0}, 1), ({"e2el": 1199.0}, 0),
])  # fmt: skip
def test_goodput(goodput: dict[str, float], good: int) -> None:
    assert calculate([A, B, C], 4.0, (), goodput).request_goodput == good / 4.0


def test_all_failed() -> None:
    metrics = calculate([C], 2.0, (99,))
    assert (metrics.completed, metrics.failed, metrics.output_throughput) == (0, 1, 0.0)
    assert metrics.latencies["ttft"] == Distribution(0.0, 0.0, 0.0, ((99, 0.0),))


TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     2
Failed requests:                         1
Maximum request concurrency:             8
Request rate configured (RPS):           3.00
Benchmark duration (s):                  4.00
Total input tokens:                      30
Total generated tokens:                  8
Request throughput (req/s):              0.50
Request goodput (req/s):                 0.25
Output token throughput (tok/s):         2.00
Peak output token throughput (tok/s):    2.00
Peak concurrent requests:                2.00
Total token throughput (tok/s):          9.50
---------------Time to First Token----------------
Mean TTFT (ms):                          750.00
Median TTFT (ms):                        750.00
P99 TTFT (ms):                           995.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          250.00
Median TPOT (ms):                        250.00
P99 TPOT (ms):                           348.00
---------------Inter-token Latency----------------
Mean ITL (ms):                           433.33
Median ITL (ms):                         400.00
P99 ITL (ms):                            596.00
----------------End-to-end Latency----------------
Mean E2EL (ms):                          1400.00
Median E2EL (ms):                        1400.00
P99 E2EL (ms):                           1596.00
=================================================="""


def test_table_lines() -> None:
    metrics = calculate([A, B, C], 4.0, (99,), {"ttft": 500.0})
    lines = table(metrics, ("e2el", "itl", "ttft", "tpot"), 3, 8)
    assert [line.rstrip() for line in lines] == TABLE.split("\n")
    assert all(len(line) == 51 for line in lines if not line.startswith(("=", "-")))  # 40 + 1 + 10, as the guide's
    short = table(calculate([A], 4.0, (99,)), ("ttft",), float("inf"), None)
    text = "\n".join(short)
    assert "concurrency:" not in text
    assert "RPS" not in text
    assert "goodput" not in text
    assert "TPOT" not in text
    assert "P99.9 ITL (ms):" in "\n".join(table(calculate([A], 1.0, (99.9,)), ("itl",), float("inf"), None))


FIGURES = (
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests", "rtfx", "latencies", "queue_times",
    *(f"{form}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el", "queue")
      for form in ("mean", "median", "std", "p99")),
)  # fmt: skip


def test_result_keys_and_file(tmp_path: Path) -> None:
    metrics = calculate([A, B, C], 4.0, (99,))
    short = result(metrics, [A, B, C], {"date": "x", "backend": "openai"}, {"request_rate": "inf"})
    assert list(short) == ["date", "backend", "request_rate", *FIGURES]
    assert short["p99_ttft_ms"] == pytest.approx(995)
    assert short["latencies"] == [1.2, 1.6, 0.0]
    full = result(metrics, [A, B, C], {}, {}, detailed=True)
    assert full["errors"] == ["", "", "HTTP 500: broken"]
    assert full["output_lens"] == [3, 5, 0]
    assert full["generated_texts"] == ["abc", "de", ""]
    assert set(full) - set(short) == {
        "input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors",
    }  # fmt: skip
    path = tmp_path / "new" / "r.json"
    save(short, path)
    save(full, path, append=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [short, full]
    save(short, path)
    assert json.loads(path.read_text()) == short


def test_file_name() -> None:
    when = datetime(2026, 1, 2, 3, 4, 5)
    assert file_name("openai", float("inf"), None, "a/M2", when) == "openai-infqps-M2-20260102-030405.json"
    assert file_name("x", 2.0, 4, "/m/M2/", when) == "x-2.0qps-concurrency4-M2-20260102-030405.json"
    assert (number(99.0), number(99.9)) == ("99", "99.9")

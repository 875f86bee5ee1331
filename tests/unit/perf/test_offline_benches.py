"""`saddle bench latency` and `throughput`: vLLM's flags in, its keys out, real requests in between."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from saddle.cli.main import main
from saddle.perf import offline
from tests.support.checkpoint import SMALL, write_random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), SMALL)


def bench(folder: Path, tmp_path: Path, *argv: str) -> Any:
    out = tmp_path / "found.json"
    assert main(["bench", argv[0], "--model", str(folder), *argv[1:], "--output-json", str(out)]) == 0
    return json.loads(out.read_text())


def test_latency(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["latency", "--input-len", "20", "--output-len", "3", "--batch-size", "2", "--n", "2", "--num-iters", "3",
            "--num-iters-warmup", "1", "--disable-detokenize"]  # fmt: skip
    found = bench(folder, tmp_path, *argv)
    assert set(found) == {"model_id", "avg_latency", "latencies", "percentiles"}
    assert len(found["latencies"]) == 3 and min(found["latencies"]) > 0
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == sorted(found["latencies"])[1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Avg latency: {found['avg_latency']} seconds"
    assert lines[1] == f"10% percentile latency: {found['percentiles']['10']} seconds"


def test_throughput(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["throughput", "--num-prompts", "5", "--input-len", "30", "--random-output-len", "4",
            "--random-prefix-len", "10", "--n", "2"]  # fmt: skip
    found = bench(folder, tmp_path, *argv)
    assert (found["num_requests"], found["total_output_tokens"]) == (5, 5 * 2 * 4)
    assert found["total_num_tokens"] == 5 * 40 + 40
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"])
    assert found["tokens_per_second"] == pytest.approx(240 / found["elapsed_time"])
    assert " total tokens/s, " in capsys.readouterr().out


def test_lengths_scatter(folder: Path, tmp_path: Path) -> None:
    argv = ["throughput", "--num-prompts", "8", "--random-input-len", "20", "--random-output-len", "4",
            "--random-range-ratio", "0.5"]  # fmt: skip
    found = bench(folder, tmp_path, *argv)
    assert 8 * 2 <= found["total_output_tokens"] <= 8 * 6
    assert 8 * 10 <= found["total_num_tokens"] - found["total_output_tokens"] <= 8 * 30
    again = bench(folder, tmp_path, *argv)
    other = bench(folder, tmp_path, *argv, "--seed", "1")
    assert again["total_num_tokens"] == found["total_num_tokens"] != other["total_num_tokens"]


@pytest.mark.parametrize(("argv", "message"), [
    (["latency", "--batch-size", "0"], "--batch-size must be 1 or more"),
    (["throughput", "--random-range-ratio", "1"], "--random-range-ratio must be at least 0 and below 1"),
    (["latency", "--input-len", "40", "--max-model-len", "64"], "168 tokens, the context is 64"),
])  # fmt: skip
def test_wrong_flags(folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["bench", argv[0], "--model", str(folder), *argv[1:]]) == 1
    assert message in capsys.readouterr().err


def test_flags_of_the_engine_reach_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("saddle.log.setup", lambda level: None)
    monkeypatch.setattr(offline, "latency", lambda config, *rest: seen.append(config) or {
        "avg_latency": 1.0, "percentiles": {}})  # fmt: skip
    with caplog.at_level(logging.INFO, "saddle"):
        bench(folder, tmp_path, "latency", "--max-num-seqs", "7", "--enforce-eager", "--tensor-parallel-size", "1",
              "--trust-remote-code")  # fmt: skip
    assert seen[0].scheduler.max_num_seqs == 7 and seen[0].compile.enforce_eager
    assert any(record.getMessage().startswith("--trust-remote-code has no effect") for record in caplog.records)


def test_percentiles_interpolate() -> None:
    assert [offline.percentile([1.0, 2.0, 4.0], percent) for percent in (0, 25, 50, 75, 100)] == [1, 1.5, 2, 3, 4]
    assert offline.percentile([3.0], 99) == 3.0

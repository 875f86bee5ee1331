"""The whole load test from the command line against a scripted server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saddle.bench.serve import BenchSpec, run
from saddle.bench.workload import RandomSpec
from saddle.cli import bench
from saddle.cli.flags import FlagParser
from saddle.errors import StartupError


def given(*argv: str) -> dict[str, Any]:
    parser = FlagParser(prog="saddle")
    bench.add_parser(parser.add_subparsers(dest="command"))
    return vars(parser.parse_args(["bench", "serve", *argv]))


def answer(body: dict[str, Any]) -> list[Any]:
    tokens = body["max_tokens"]
    chunk = {"choices": [{"index": 0, "text": "x"}]}
    return [0.02, *[chunk] * tokens, {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": tokens}}]


async def test_concurrency_warmups_and_bodies(scripted: Callable[..., Any]) -> None:
    server = await scripted(answer)
    spec = BenchSpec(
        base_url=server.url, api="completions", endpoint="/v1/completions", max_concurrency=3, num_warmups=2,
        dataset=RandomSpec(num_prompts=12, input_len=8, output_len=4), headers={"Authorization": "Bearer k"},
        sampling={"ignore_eos": True, "temperature": 0.5},
    )  # fmt: skip
    seen = []
    done = await run(spec, lambda: seen.append(1))
    assert len(server.bodies) == 14
    assert server.most_at_once == 3
    assert len(seen) == 12
    assert done.model == "served"
    assert all(output.success and output.output_tokens == 4 for output in done.outputs)
    assert max(output.queued for output in done.outputs) > 0.02 > min(output.queued for output in done.outputs)
    assert server.bodies[-1]["model"] == "served"
    assert server.bodies[-1]["temperature"] == 0.5
    assert server.bodies[-1]["ignore_eos"] is True
    assert server.headers[-1]["authorization"] == "Bearer k"
    assert {headers["x-request-id"] for headers in server.headers[2:]} == {f"bench-{i}" for i in range(12)}
    assert 4 * 0.02 <= done.duration < 2


async def test_requests_wait_for_their_time(scripted: Callable[..., Any]) -> None:
    server = await scripted(answer)
    spec = BenchSpec(
        base_url=server.url, api="completions", endpoint="/v1/completions", request_rate=20.0, burstiness=50.0,
        dataset=RandomSpec(num_prompts=6, input_len=4, output_len=1),
    )  # fmt: skip
    done = await run(spec)
    starts = [output.start for output in done.outputs]
    assert starts == sorted(starts)
    assert 0.2 < starts[-1] - starts[0] < 0.35  # six requests at 20 a second, the first after about 1/20
    assert done.duration >= 0.3


async def test_command_counts_failures_and_saves(
    scripted: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def sometimes(body: dict[str, Any]) -> list[Any]:
        calls.append(1)
        return [500] if len(calls) % 4 == 0 else answer(body)

    server = await scripted(sometimes)
    argv = ["--base-url", server.url, "--dataset-name", "random", "--random-input", "8", "--random-output", "3",
            "--num-prompt", "8", "--max-concurrency", "2", "--save-result", "--result-dir", str(tmp_path),
            "--metadata", "card=none", "--percentile-metrics", "ttft,e2el", "--metric-percentile", "50,99"]  # fmt: skip
    code = await asyncio.to_thread(bench.run, argparse_namespace(*argv))
    assert code == 0
    shown = capsys.readouterr()
    assert "Successful requests:                     6 " in shown.out
    assert "Failed requests:                         2 " in shown.out
    assert "Total input tokens:                      66 " in shown.out  # 6 times the 11 of the server's usage
    assert "Total generated tokens:                  18 " in shown.out
    assert "P50 E2EL (ms):" in shown.out
    assert "TPOT" not in shown.out
    assert "2 failed: HTTP 500" in shown.err
    (file,) = list(tmp_path.glob("*"))  # noqa: ASYNC240
    saved = json.loads(file.read_text())
    assert file.name.startswith("openai-infqps-concurrency2-served-")
    assert (saved["completed"], saved["failed"], saved["card"], saved["request_rate"]) == (6, 2, "none", "inf")
    assert (saved["tokenizer_id"], saved["max_concurrency"]) == ("server", 2)
    assert saved["p99_tpot_ms"] >= saved["median_tpot_ms"] > 0


def argparse_namespace(*argv: str) -> Any:
    import argparse

    return argparse.Namespace(**given(*argv))


async def test_all_failing_exits_with_1(scripted: Callable[..., Any]) -> None:
    server = await scripted(lambda _: [500])
    args = argparse_namespace("--base-url", server.url, "--num-prompts", "2", "--random-input-len", "4")
    assert await asyncio.to_thread(bench.run, args) == 1


async def test_no_server_is_a_startup_error() -> None:
    spec = BenchSpec(base_url="http://127.0.0.1:9", api="completions", endpoint="/v1/completions",
                     dataset=RandomSpec())  # fmt: skip
    with pytest.raises(StartupError, match=r"127\.0\.0\.1:9"):
        await run(spec)


async def test_ready_check_waits(scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saddle.bench.serve.READY_POLL_S", 0.01)
    calls: list[int] = []

    def loading(body: dict[str, Any]) -> list[Any]:
        calls.append(1)
        return [503] if len(calls) < 4 else answer(body)

    server = await scripted(loading)
    spec = BenchSpec(base_url=server.url, api="completions", endpoint="/v1/completions", ready_timeout_s=5.0,
                     dataset=RandomSpec(num_prompts=2, input_len=4, output_len=2))  # fmt: skip
    assert all(output.success for output in (await run(spec)).outputs)
    assert len(calls) == 6  # three refusals, the ready one, two measured


def test_flags_become_the_spec(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    spec = bench.to_spec(
        given("--backend", "openai-chat", "--host", "h", "--port", "9", "--model", str(tmp_path), "--served-model-name",
              "m", "--request_rate", "2.5", "--burstiness", "2", "--max-conc", "4", "--num-warmups", "1", "--input-len",
              "10", "--output-len", "5", "--random-output-len", "6", "--seed", "7", "--temperature", "0",
              "--top-k", "3", "--extra-body.min_tokens", "2", "--header", "a=b", "c = d",
              "--random-range-ratio", "0.5"),
        ("key", "k2"),
    )  # fmt: skip
    assert (spec.base_url, spec.endpoint, spec.api) == ("http://h:9", "/v1/chat/completions", "chat")
    assert (spec.model, spec.tokenizer) == ("m", str(tmp_path))
    assert (spec.request_rate, spec.burstiness, spec.max_concurrency, spec.num_warmups) == (2.5, 2.0, 4, 1)
    assert spec.dataset == RandomSpec(input_len=10, output_len=6, seed=7, range_ratio=0.5)
    assert spec.sampling == {"ignore_eos": True, "temperature": 0.0, "top_k": 3, "min_tokens": 2}
    assert spec.headers == {"Authorization": "Bearer key", "a": "b", "c": "d"}
    assert "ignore_eos" not in bench.to_spec(given("--no-ignore-eos")).sampling


@pytest.mark.parametrize(("argv", "message"), [
    (["--backend", "openai-chat", "--endpoint", "/v1/completions"], "does not fit"),
    (["--endpoint", "/v1/chat/completions"], "does not fit"),
    (["--request-rate", "0"], "--request-rate"),
    (["--max-concurrency", "0"], "--max-concurrency"),
    (["--num-warmups", "-1"], "--num-warmups"),
    (["--header", "nothing"], "--header"),
    (["--extra-body", "[1]"], "--extra-body"),
    (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
    (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "2", "--request-rate", "3"],
     "no --request-rate"),
    (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "-1", "--ramp-up-end-rps", "2"], "above 0"),
])  # fmt: skip
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        bench.to_spec(given(*argv))


@pytest.mark.parametrize(("argv", "message"), [
    (["--percentile-metrics", "ttft,speed"], "--percentile-metrics"),
    (["--metric-percentiles", "99,x"], "--metric-percentiles"),
    (["--metric-percentiles", "101"], "--metric-percentiles"),
    (["--goodput", "itl:5"], "--goodput"),
    (["--goodput", "ttft:fast"], "--goodput"),
])  # fmt: skip
def test_bad_report_flags(argv: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        bench._shown(given(*argv))


def test_guide_command() -> None:
    """The benchmark command of vLLM's M2 guide, abbreviations included."""
    guide = (
        "--backend vllm --model MiniMaxAI/MiniMax-M2 --endpoint /v1/completions --dataset-name random "
        "--random-input 2048 --random-output 1024 --max-concurrency 10 --num-prompt 100 --trust-remote-code"
    )
    spec = bench.to_spec(given(*guide.split()))
    assert (spec.model, spec.tokenizer, spec.api) == ("MiniMaxAI/MiniMax-M2", None, "completions")
    assert spec.dataset == RandomSpec(num_prompts=100, input_len=2048, output_len=1024)
    assert spec.max_concurrency == 10


def test_ramp() -> None:
    argv = ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "5"]
    assert bench.to_spec(given(*argv)).ramp == ("linear", 1.0, 5.0)
    assert bench._shown(given("--goodput", "ttft:200", "tpot:50"))[2] == {"ttft": 200.0, "tpot": 50.0}

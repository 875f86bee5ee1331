"""`saddle bench`: here `serve`, with the flags, the table and the result file of `vllm bench serve`; the benches that
run the engine in this process are in `bench_device`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saddle import env, log
from saddle.cli import bench_device
from saddle.cli.flags import Flag, FlagParser
from saddle.errors import StartupError

if TYPE_CHECKING:
    from saddle.bench.serve import BenchRun, BenchSpec

logger = logging.getLogger(__name__)

SERVER, DATASET, LOAD, SAMPLING, RESULT = "Server", "Dataset", "Load", "Sampling", "Result"
BACKENDS = {"saddle": "completions", "vllm": "completions", "openai": "completions", "openai-chat": "chat"}
METRICS = ("ttft", "tpot", "itl", "e2el", "queue")
SAMPLING_FIELDS = {
    "temperature": "float", "top_p": "float", "top_k": "int", "min_p": "float", "frequency_penalty": "float",
    "presence_penalty": "float", "repetition_penalty": "float", "logprobs": "int",
}  # fmt: skip

FLAGS: tuple[Flag, ...] = (
    Flag(names="--backend --endpoint-type", group=SERVER, choices=tuple(BACKENDS),
         help="openai (default), saddle and vllm send completions, openai-chat sends chats"),
    Flag(names="--base-url", group=SERVER, metavar="URL", help="instead of --host and --port"),
    Flag(names="--host", group=SERVER, help="default 127.0.0.1"),
    Flag(names="--port", kind="int", group=SERVER, help="default 8000"),
    Flag(names="--endpoint", group=SERVER, metavar="PATH", help="default /v1/completions or /v1/chat/completions"),
    Flag(names="--model", group=SERVER, help="name in requests, also its tokenizer's folder; default: ask the server"),
    Flag(names="--served-model-name", group=SERVER, metavar="NAME", help="name in requests, if --model is a folder"),
    Flag(names="--tokenizer", group=SERVER, metavar="FOLDER",
         help="folder with tokenizer.json; default: the model's, else the server's /tokenize"),
    Flag(names="--header", kind="words", group=SERVER, metavar="NAME=VALUE", help="further HTTP headers"),
    Flag(names="--insecure", kind="bool", group=SERVER, help="do not verify the TLS certificate"),
    Flag(names="--ready-check-timeout-sec", kind="float", group=SERVER,
         help="wait so long for the server to answer a first prompt; default 0: do not ask"),
    Flag(names="--request-id-prefix", group=SERVER, metavar="TEXT", help="first part of x-request-id"),
    Flag(names="--trust-remote-code", kind="bool", group="vLLM", reason="the tokenizer is read from tokenizer.json"),
    Flag(names="--tokenizer-mode", group="vLLM", reason="the tokenizer is read from tokenizer.json"),
    Flag(names="--dataset-name", group=DATASET, choices=("random",), help="random"),
    Flag(names="--num-prompts", kind="int", group=DATASET, help="default 1000"),
    Flag(names="--random-input-len", kind="int", group=DATASET, help="tokens a prompt; default 1024"),
    Flag(names="--random-output-len", kind="int", group=DATASET, help="tokens to generate; default 128"),
    Flag(names="--random-range-ratio", kind="float", group=DATASET,
         help="lengths are drawn from len * (1 - ratio) to len * (1 + ratio); default 0"),
    Flag(names="--random-prefix-len", kind="int", group=DATASET, help="tokens that all prompts share first; default 0"),
    Flag(names="--input-len", kind="int", group=DATASET, help="as --random-input-len"),
    Flag(names="--output-len", kind="int", group=DATASET, help="as --random-output-len"),
    Flag(names="--seed", kind="int", group=DATASET, help="default 0"),
    Flag(names="--request-rate", kind="float", group=LOAD, help="requests a second; default inf: all at once"),
    Flag(names="--burstiness", kind="float", group=LOAD, help="1 (default) is a Poisson process, more is more even"),
    Flag(names="--max-concurrency", kind="int", group=LOAD, help="requests under way at most; default: no limit"),
    Flag(names="--num-warmups", kind="int", group=LOAD, help="requests before the measured ones; default 0"),
    Flag(names="--ramp-up-strategy", group=LOAD, choices=("linear", "exponential"), help="change the rate in the run"),
    Flag(names="--ramp-up-start-rps", kind="float", group=LOAD, help="first rate"),
    Flag(names="--ramp-up-end-rps", kind="float", group=LOAD, help="last rate"),
    Flag(names="--ignore-eos", kind="bool", group=SAMPLING, help="generate to the full length; default with random"),
    *(Flag(names="--" + name.replace("_", "-"), kind=kind, group=SAMPLING,  # type: ignore[arg-type]
           help="field of the requests; default: the server's") for name, kind in SAMPLING_FIELDS.items()),
    Flag(names="--extra-body", kind="json", group=SAMPLING, help="further fields of the requests"),
    Flag(names="--percentile-metrics", group=RESULT, metavar="NAMES",
         help="latencies in the table, of ttft,tpot,itl,e2el,queue; default ttft,tpot,itl"),
    Flag(names="--metric-percentiles", group=RESULT, metavar="NUMBERS", help="such as 50,99.9; default 99"),
    Flag(names="--goodput", kind="words", group=RESULT, metavar="NAME:MS",
         help="objectives that count as good, of ttft, tpot, e2el, such as ttft:200 tpot:50"),
    Flag(names="--save-result", kind="bool", group=RESULT, help="write a JSON file"),
    Flag(names="--save-detailed", kind="bool", group=RESULT, help="with one entry a request"),
    Flag(names="--append-result", kind="bool", group=RESULT, help="append to the file"),
    Flag(names="--result-dir", group=RESULT, metavar="FOLDER", help="where it is written"),
    Flag(names="--result-filename", group=RESULT, metavar="FILE", help="its name"),
    Flag(names="--metadata", kind="words", group=RESULT, metavar="KEY=VALUE", help="further keys of the file"),
    Flag(names="--label", group=RESULT, help="first part of the file's name; default: the backend"),
    Flag(names="--disable-tqdm", kind="bool", group=RESULT, help="no progress bar"),
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Register `bench` and its benchmarks with the main parser's subparsers."""
    bench: FlagParser = subparsers.add_parser("bench", help="measure a server, or the engine in this process")
    benchmarks = bench.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    bench_device.add_parsers(benchmarks)
    serve: FlagParser = benchmarks.add_parser(
        "serve", help="load a running server and report latencies and throughput",
        description="Load a running server and report latencies and throughput.",
        usage="saddle bench serve [flags]",
    )  # fmt: skip
    serve.add_flags(FLAGS)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 when at least one request succeeded.

    Raises:
        StartupError: a flag is wrong, or the server cannot be used.
    """
    if args.benchmark != "serve":
        return bench_device.run(args)
    log.setup(env.log_level())
    given = vars(args)
    for flag in FLAGS:
        if flag.reason and flag.dest in given:
            logger.info("%s has no effect: %s.", flag.long, flag.reason)
    spec, shown = to_spec(given, env.api_keys()), _shown(given)
    done = _measure(spec, given)
    _report(done, spec, given, *shown)
    return 0 if any(output.success for output in done.outputs) else 1


def to_spec(given: Mapping[str, Any], api_keys: tuple[str, ...] = ()) -> BenchSpec:
    """The load test that the flags describe; `given` holds the flags that were given, by destination."""
    from saddle.bench.serve import BenchSpec
    from saddle.bench.workload import RandomSpec

    api = BACKENDS[given.get("backend", "openai")]
    endpoint = given.get("endpoint", "/v1/chat/completions" if api == "chat" else "/v1/completions")
    if (api == "chat") != endpoint.rstrip("/").endswith("chat/completions"):
        raise StartupError(f"--endpoint {endpoint} does not fit --backend {given.get('backend', 'openai')}.")
    dataset = {
        "num_prompts": given.get("num_prompts"), "seed": given.get("seed"),
        "input_len": given.get("random_input_len", given.get("input_len")),
        "output_len": given.get("random_output_len", given.get("output_len")),
        "range_ratio": given.get("random_range_ratio"), "prefix_len": given.get("random_prefix_len"),
    }  # fmt: skip
    renamed = {
        "request_rate": "request_rate", "burstiness": "burstiness", "max_concurrency": "max_concurrency",
        "num_warmups": "num_warmups", "ready_timeout_s": "ready_check_timeout_sec", "insecure": "insecure",
        "request_id_prefix": "request_id_prefix",
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
    extra = given.get("extra_body", {})
    if not isinstance(extra, dict):
        raise StartupError(f"--extra-body must be a JSON object, got {extra!r}.")
    sampling = {"ignore_eos": True} if given.get("ignore_eos", True) else {}
    sampling |= {name: given[name] for name in SAMPLING_FIELDS if name in given}
    address = f"http://{given.get('host', '127.0.0.1')}:{given.get('port', 8000)}"
    return BenchSpec(
        base_url=given.get("base_url", address).rstrip("/"), api=api, endpoint=endpoint,  # type: ignore[arg-type]
        dataset=RandomSpec(**{name: value for name, value in dataset.items() if value is not None}),
        model=given.get("served_model_name", given.get("model")),
        tokenizer=given.get("tokenizer") or _folder(given.get("model")), ramp=_ramp(given),
        headers=headers | dict(_pair(text, "=", "--header") for text in given.get("header", ())),
        sampling=sampling | extra,
        **{name: given[flag] for name, flag in renamed.items() if flag in given},
    )  # fmt: skip


def _folder(model: str | None) -> str | None:
    return model if model and (Path(model) / "tokenizer.json").is_file() else None


def _ramp(given: Mapping[str, Any]) -> Any:
    strategy, first, last = (given.get(f"ramp_up_{name}") for name in ("strategy", "start_rps", "end_rps"))
    if strategy is first is last is None:
        return None
    if not (strategy and first and last and first > 0 and last > 0) or "request_rate" in given:
        raise StartupError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps above 0 and "
                           "no --request-rate.")  # fmt: skip
    return strategy, first, last


def _pair(text: str, separator: str, flag: str) -> tuple[str, str]:
    name, found, value = text.partition(separator)
    if not found:
        raise StartupError(f"{flag} must be name{separator}value, got {text!r}.")
    return name.strip(), value.strip()


def _shown(given: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...], dict[str, float]]:
    """Latencies to print, percentiles, and objectives."""
    names = tuple(name.strip() for name in given.get("percentile_metrics", "ttft,tpot,itl").split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise StartupError(f"--percentile-metrics must be of {', '.join(METRICS)}, got {name!r}.")
    try:
        percentiles = tuple(float(text) for text in given.get("metric_percentiles", "99").split(","))
    except ValueError:
        percentiles = (math.nan,)
    if not all(0 <= percent <= 100 for percent in percentiles):
        raise StartupError(f"--metric-percentiles must be numbers of 0 to 100, got {given['metric_percentiles']!r}.")
    goodput = {}
    for text in given.get("goodput", ()):
        name, value = _pair(text, ":", "--goodput")
        try:
            goodput[name] = float(value)
        except ValueError:
            goodput[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not goodput[name] >= 0:
            raise StartupError(f"--goodput must be ttft, tpot or e2el with milliseconds, got {text!r}.")
    return names, percentiles, goodput


def _measure(spec: BenchSpec, given: Mapping[str, Any]) -> BenchRun:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from saddle.bench.serve import run as run_bench

    console = Console(stderr=True)
    bar = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(),
                   console=console, refresh_per_second=2, transient=True)  # fmt: skip
    quiet = given.get("disable_tqdm", False) or not console.is_terminal
    task = bar.add_task("requests", total=spec.dataset.num_prompts)
    with nullcontext() if quiet else bar:
        work = run_bench(spec, (lambda: None) if quiet else lambda: bar.advance(task))
        if sys.platform == "win32":
            return asyncio.run(work)
        import uvloop

        return uvloop.run(work)


def _report(done: BenchRun, spec: BenchSpec, given: Mapping[str, Any], names: tuple[str, ...],
            percentiles: tuple[float, ...], goodput: dict[str, float]) -> None:  # fmt: skip
    from saddle.bench import metrics, report

    found = metrics.calculate(done.outputs, done.duration, percentiles, goodput)
    print("\n".join(report.table(found, names, spec.request_rate, spec.max_concurrency)))
    errors = Counter(output.error for output in done.outputs if not output.success)
    for text, count in errors.most_common(3):
        print(f"{count} failed: {text}", file=sys.stderr)
    if not any(given.get(name) for name in ("save_result", "append_result", "save_detailed")):
        return
    when, backend = datetime.now(), given.get("backend", "openai")
    label = given.get("label")
    head = {
        "date": f"{when:%Y%m%d-%H%M%S}", "endpoint_type": backend, "backend": backend, "label": label,
        "model_id": done.model, "tokenizer_id": done.tokenizer, "num_prompts": spec.dataset.num_prompts,
        **dict(_pair(text, "=", "--metadata") for text in given.get("metadata", ())),
    }  # fmt: skip
    load: dict[str, Any] = {
        "request_rate": "inf" if spec.request_rate == math.inf else spec.request_rate,
        "burstiness": spec.burstiness, "max_concurrency": spec.max_concurrency,
    }  # fmt: skip
    if spec.ramp:
        load |= dict(zip(("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"), spec.ramp, strict=True))
    name = given.get("result_filename") or report.file_name(
        label or backend, spec.request_rate, spec.max_concurrency, done.model, when)  # fmt: skip
    document = report.result(found, done.outputs, head, load, given.get("save_detailed", False))
    report.save(document, Path(given.get("result_dir", ".")) / name, given.get("append_result", False))

"""`saddle bench step|kernels|latency|throughput`: benches in this process, without a server.

Flags of the engine are those of `saddle serve`; those of latency and throughput are vLLM's.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saddle import env, log
from saddle.cli import serve
from saddle.cli.flags import Flag, FlagParser, size
from saddle.config import EngineConfig
from saddle.errors import StartupError

logger = logging.getLogger(__name__)

BENCH, VLLM = "Bench", "vLLM"
ENGINE_SECTIONS = ("load", "cache", "scheduler", "compile")
COUNTS = {
    "input_len": "tokens a prompt; default 32",
    "output_len": "tokens to generate; default 128",
    "batch_size": "requests at once; default 8",
    "num_iters_warmup": "runs that are not measured; default 10",
    "num_iters": "runs; default 30",
}


def _engine_flags() -> tuple[Flag, ...]:
    """The flags of `saddle serve` that configure the engine, and those without an effect on anything."""
    found = []
    for flag in serve.FLAGS:
        targets = {target.split(".")[0] for target in flag.to}
        if targets <= set(ENGINE_SECTIONS) and flag.long != "--max-num-queued-reqs":
            found.append(flag)
    return tuple(found)


def _size(name: str, text: str) -> Flag:
    return Flag(names="--" + name.replace("_", "-"), kind="int", group=BENCH, help=text)


OUTPUT = Flag(names="--output-json", group=BENCH, metavar="FILE", help="write the result there")
LATENCY: tuple[Flag, ...] = (
    *(_size(name, text) for name, text in COUNTS.items()),
    _size("n", "answers to each prompt; default 1"),
    OUTPUT,
    Flag(names="--disable-detokenize", kind="bool", group=VLLM, reason="nothing is detokenised here"),
)
THROUGHPUT: tuple[Flag, ...] = (
    Flag(names="--dataset-name", group=BENCH, choices=("random",), help="random"),
    _size("num_prompts", "default 1000"),
    Flag(names="--random-input-len --input-len", kind="int", group=BENCH, help="tokens a prompt; default 1024"),
    Flag(names="--random-output-len --output-len", kind="int", group=BENCH, help="tokens to generate; default 128"),
    Flag(names="--random-range-ratio", kind="float", group=BENCH,
         help="lengths are drawn from len * (1 - ratio) to len * (1 + ratio); default 0"),
    Flag(names="--random-prefix-len", kind="int", group=BENCH, help="tokens that all prompts share first; default 0"),
    _size("n", "answers to each prompt; default 1"),
    OUTPUT,
    Flag(names="--backend", group=VLLM, reason="the engine is Saddle's"),
    Flag(names="--disable-detokenize", kind="bool", group=VLLM, reason="nothing is detokenised here"),
)  # fmt: skip


def numbers(text: str) -> tuple[int, ...]:
    """Counts separated by commas, such as 1,2,4,8 or 2k,32k."""
    found = tuple(size(part) for part in text.split(",") if part.strip())
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be counts of 1 or more, separated by commas, got {text!r}")
    return found


STEP: tuple[Flag, ...] = (
    Flag(names="--batch", group=BENCH, parse=numbers, metavar="ROWS", help="default 1,2,4,8,16,32,64,128"),
    Flag(names="--context", group=BENCH, parse=numbers, metavar="TOKENS", help="tokens before the step; default 2048"),
    Flag(names="--prefill", group=BENCH, parse=numbers, metavar="TOKENS", help="lengths of prompts to time as well"),
    Flag(names="--routing", group=BENCH, choices=("uniform", "model"),
         help="uniform spreads tokens evenly over the experts by a hash; default with --load-format dummy"),
    Flag(names="--json", kind="bool", group=BENCH, help="one JSON object a line instead of a table"),
)  # fmt: skip


def add_parsers(benchmarks: Any) -> None:
    """Register the benches beside `serve`."""
    for name, flags, text in (
        ("step", STEP, "time whole steps against what the card's memory allows"),
        ("kernels", STEP, "time every kernel of a step against its own floor"),
        ("latency", LATENCY, "time one batch of requests, in this process"),
        ("throughput", THROUGHPUT, "requests and tokens a second of a full engine, in this process"),
    ):
        parser: FlagParser = benchmarks.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                                   usage=f"saddle bench {name} [flags]",
                                                   positional="MODEL_TAG")  # fmt: skip
        own = {flag.long for flag in flags}
        parser.add_flags((*flags, *(flag for flag in _engine_flags() if flag.long not in own)))


def run(args: argparse.Namespace) -> int:
    """Run the bench `args.benchmark`.

    Raises:
        StartupError: a flag is wrong, or the model cannot start.
    """
    log.setup(env.log_level())
    given = vars(args)
    engine = config(given)
    benches = {"step": _steps, "kernels": _steps, "latency": _latency, "throughput": _throughput}
    return benches[args.benchmark](engine, given)


def config(given: Mapping[str, Any]) -> EngineConfig:
    """The engine's configuration from the flags that `saddle serve` has too; flags without an effect are logged."""
    known = {flag.dest for flag in _engine_flags()} | {"model_tag"}
    engine, _, notes = serve.configs({name: value for name, value in given.items() if name in known})
    own = {flag.dest: flag for flag in (*LATENCY, *THROUGHPUT) if flag.reason}
    for note in notes + [f"{own[name].long} has no effect: {own[name].reason}." for name in given if name in own]:
        logger.info(note)
    return engine


def progress(phase: str, share: float, note: str) -> None:
    """Say how far loading is, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{phase} {share:4.0%} {note:24}", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)


def write(found: Any, path: str | None) -> None:
    """One JSON document to a file, if one was asked for."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(found, indent=4) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"--output-json {path}: {error.strerror or error}.") from None


def _steps(engine: EngineConfig, given: Mapping[str, Any]) -> int:
    """`step` and `kernels`: a line for each point, as soon as it is there."""
    dummy = engine.load.load_format == "dummy"
    routing = given.get("routing", "uniform" if dummy else "model")
    renamed = {"batches": "batch", "contexts": "context", "prompts": "prefill"}
    points = {name: given[flag] for name, flag in renamed.items() if flag in given}
    lines: Iterator[dict[str, Any]]
    if given["benchmark"] == "step":
        from saddle.perf.step import StepSpec
        from saddle.perf.step import run as run_steps

        lines = run_steps(engine, StepSpec(uniform=routing == "uniform", **points), progress)
    else:
        from saddle.perf.kernels import KernelSpec
        from saddle.perf.kernels import run as run_kernels

        lines = run_kernels(engine, KernelSpec(uniform=routing == "uniform", **points))
    names: list[str] = []
    for line in lines:
        if given.get("json", False):
            print(json.dumps(line), flush=True)
            continue
        shown = {name: value for name, value in line.items() if not isinstance(value, (dict, list))}
        if list(shown) != names:
            names = list(shown)
            print("  ".join(f"{name:>12}" for name in names))
        print("  ".join(f"{_short(value):>12}" for value in shown.values()), flush=True)
    return 0


def _short(value: Any) -> str:
    """A value within twelve characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**9:
        return f"{value:.3e}"
    return str(value)[:12]


def _latency(engine: EngineConfig, given: Mapping[str, Any]) -> int:
    from saddle.perf import offline

    names = (*COUNTS, "n", "seed")
    spec = offline.LatencySpec(**{name: given[name] for name in names if name in given})

    def say(seconds: float) -> None:
        logger.info("one run took %.4f s", seconds)

    found = offline.latency(engine, spec, progress, say)
    print(f"Avg latency: {found['avg_latency']} seconds")
    for percent, value in found["percentiles"].items():
        print(f"{percent}% percentile latency: {value} seconds")
    write(found, given.get("output_json"))
    return 0


def _throughput(engine: EngineConfig, given: Mapping[str, Any]) -> int:
    from saddle.perf import offline

    renamed = {
        "input_len": "random_input_len", "output_len": "random_output_len", "range_ratio": "random_range_ratio",
        "prefix_len": "random_prefix_len", "num_prompts": "num_prompts", "n": "n", "seed": "seed",
    }  # fmt: skip
    spec = offline.ThroughputSpec(**{name: given[flag] for name, flag in renamed.items() if flag in given})
    found = offline.throughput(engine, spec, progress)
    requests, tokens, outputs = (found[f"{name}_per_second"] for name in ("requests", "tokens", "output_tokens"))
    print(f"Throughput: {requests:.2f} requests/s, {tokens:.2f} total tokens/s, {outputs:.2f} output tokens/s")
    write(found, given.get("output_json"))
    return 0

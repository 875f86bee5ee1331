"""`saddle bench step|kernels|latency|throughput`: benches in this process, without a server.

Flags of the engine are those of `saddle serve`; those of latency and throughput are vLLM's.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saddle import env, log
from saddle.cli import serve
from saddle.cli.flags import Flag, FlagParser
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


def add_parsers(benchmarks: Any) -> None:
    """Register the benches beside `serve`."""
    for name, flags, text in (
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
    return {"latency": _latency, "throughput": _throughput}[args.benchmark](engine, given)


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

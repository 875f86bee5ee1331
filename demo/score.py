"""Score the demo: with the training model on a GPU, or over HTTP against a server.

    python -m demo.score --run RUN --cases 1000                       fp32 and FP8 weights, greedy and sampled
    python -m demo.score --url http://127.0.0.1:8000/v1 --cases 100   the server's own sampling, and greedy

Writes one JSON object with the share of exact cases and its standard error for each task.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo.cases import HAS_TASK, TASKS, Case, Reply, cases, read

MOST_TOKENS = 700
BATCH = 256
SAMPLED = 0.2
TOKENIZER = Path("src/saddle/demo_model/tokenizer.json")
Score = dict[str, Any]


def tally(results: dict[str, list[tuple[Case, Reply]]]) -> Score:
    """Share of exact replies a task, its standard error, and the share of false refusals."""
    found: Score = {}
    for task, pairs in results.items():
        right = sum(case.check(reply) for case, reply in pairs)
        share = right / len(pairs)
        found[task] = {"exact": round(share, 4), "standard_error": round((share * (1 - share) / len(pairs)) ** 0.5, 4),
                       "cases": len(pairs)}  # fmt: skip
    having = [reply for task in HAS_TASK if task in results for _, reply in results[task]]
    if having:
        found["false_refusals"] = round(sum(reply.declines for reply in having) / len(having), 4)
    return found


def misses(results: dict[str, list[tuple[Case, Reply]]], most: int) -> Iterator[str]:
    for task, pairs in results.items():
        wrong = [(case, reply) for case, reply in pairs if not case.check(reply)]
        for case, reply in wrong[:most]:
            yield f"{task}: {case.messages[-1]['content'][:200]!r} -> {reply.content[-200:]!r} {reply.calls}"


# ---------------------------------------------------------------------------------------------------------------
# the training model


def score_run(run: Path, count: int, tokenizer_file: Path, show: int) -> Score:
    """Two settings at once, a process each: on a GPU a step of so small a model is all launches."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    settings = [(weights, temperature) for weights in ("fp32", "fp8") for temperature in (0.0, SAMPLED)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_score_setting, run, count, tokenizer_file, show, *setting) for setting in settings]
        return dict(job.result() for job in jobs)


def _score_setting(
    run: Path, count: int, tokenizer_file: Path, show: int, weights: str, temperature: float
) -> tuple[str, Score]:
    import tokenizers
    import torch

    from demo.model import Model, dequantise, quantise

    began = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(2)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    model = Model()
    model.load_state_dict(torch.load(run / "model.pt", map_location="cpu"))
    model.to(device).eval()
    if weights == "fp8":
        with torch.no_grad():
            for weight in model.quantised():
                weight.copy_(dequantise(*quantise(weight)))
    results = {task: _answer(model, tokenizer, cases(task, count), temperature) for task in TASKS}
    name = f"{weights} " + ("greedy" if temperature == 0 else f"temperature {temperature}")
    score = tally(results)
    print(f"{name}: {json.dumps(score)} ({time.time() - began:.0f} s)", flush=True)
    if temperature == 0:
        for line in misses(results, show):
            print("  " + line, flush=True)
    return name, score


def _answer(model: Any, tokenizer: Any, asked: list[Case], temperature: float) -> list[tuple[Case, Reply]]:
    import torch

    from demo.generate import generate

    eos = tokenizer.token_to_id("[e~[")
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        prompts = [tokenizer.encode(asked[i].prompt, add_special_tokens=False).ids for i in part]
        for i, ids in zip(part, generate(model, prompts, eos, MOST_TOKENS, temperature, torch.float32), strict=True):
            replies[i] = read(tokenizer.decode(ids, skip_special_tokens=False))
    return [(case, replies[i]) for i, case in enumerate(asked)]


# ---------------------------------------------------------------------------------------------------------------
# a server


async def score_server(url: str, count: int, at_once: int, tasks: list[str], show: int) -> Score:
    """Greedy, then with the server's default sampling."""
    import aiohttp

    found: Score = {}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        gate = asyncio.Semaphore(at_once)
        for name, extra in (("greedy", {"temperature": 0}), ("server default", {})):
            results = {}
            for task in tasks:
                asked = cases(task, count)
                replies = await asyncio.gather(*(_ask(session, gate, url, case, extra) for case in asked))
                results[task] = list(zip(asked, replies, strict=True))
                print(f"{name}, {task}: {json.dumps(tally({task: results[task]})[task])}", file=sys.stderr, flush=True)
            found[name] = tally(results)
            for line in misses(results, show):
                print("  " + line, file=sys.stderr)
    return found


async def _ask(session: Any, gate: asyncio.Semaphore, url: str, case: Case, extra: dict[str, Any]) -> Reply:
    body = {"messages": _wire(case.messages), "max_tokens": MOST_TOKENS, **extra}
    if case.tools:
        body["tools"] = case.tools
    async with gate, session.post(f"{url}/chat/completions", json=body) as answer:
        answer.raise_for_status()
        message = (await answer.json())["choices"][0]["message"]
    calls = [(c["function"]["name"], _object(c["function"]["arguments"])) for c in message.get("tool_calls") or ()]
    return Reply(message.get("content") or "", calls)


def _object(text: str) -> dict[str, Any]:
    """Arguments; a call that was cut off has none."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _wire(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with arguments as JSON text, as clients send them."""
    found = json.loads(json.dumps(messages))
    for message in found:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--show", type=int, default=0, help="print so many wrong replies a task")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.run is not None:
        found = score_run(args.run, args.cases, args.tokenizer, args.show)
    elif args.url:
        found = asyncio.run(score_server(args.url.rstrip("/"), args.cases, args.concurrency, args.tasks, args.show))
    else:
        parser.error("give --run or --url")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

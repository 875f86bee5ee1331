"""A soak: mixed traffic with rude clients against a real server, and what the server holds while it lasts.

    python -m tests.soak.soak --minutes 30 --out soak.jsonl

Clients stream, wait for whole answers, leave in the middle, send what is wrong, or are killed (SIGKILL).
The model is scripted, everything above it is real. Each line of the output is one look at the server: memory and open
files of both processes, blocks, requests. It ends with a verdict: memory that still grows over the second half, files
or blocks that do not come back, or a server error make it fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from saddle.parsing.tokenizer import Tokenizer
from tests.serve.processes import ServerProcess
from tests.support.tokenizer import build_tokenizer

SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOL = {"name": "look", "description": "Look.", "parameters": SCHEMA}
KILLED = """
import json, sys, urllib.request
messages = [{"role": "user", "content": "count 400"}]
body = json.dumps({"model": "scripted", "stream": True, "messages": messages}).encode()
request = urllib.request.Request(sys.argv[1] + "/v1/chat/completions", body, {"content-type": "application/json"})
with urllib.request.urlopen(request) as reply:
    for line in reply: pass
"""
WRONG: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", {"model": "scripted"}), ("/v1/chat/completions", {"model": "other", "messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 200_000}]}),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}), ("/v1/completions", {"prompt": 5}),
    ("/v1/completions", {"prompt": "x", "temperature": 9}), ("/v1/messages", {"max_tokens": 5}),
    ("/v1/messages", {"max_tokens": 0, "messages": [{"role": "user", "content": "x"}]}),
    ("/v1/responses", {"input": 7}), ("/v1/responses", {"input": "x", "previous_response_id": "resp_none"}),
)  # fmt: skip
CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"


class Soak:
    """Traffic against one server, counted by kind and outcome."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server, self.r, self.counts = server, random.Random(seed), Counter[str]()
        self.http: aiohttp.ClientSession

    def text(self) -> str:
        r = self.r
        return r.choice((f"count {r.randint(1, 120)}", f"call look {json.dumps({'at': 'x' * r.randint(1, 60)})}",
                         "say " + "word " * r.randint(1, 300), f"say {r.randint(0, 9)}"))  # fmt: skip

    def body(self, path: str, stream: bool) -> dict[str, Any]:
        text = self.text()
        if path == COMPLETIONS:
            return {"model": "scripted", "prompt": text, "max_tokens": 40, "stream": stream}
        if path == RESPONSES:
            return {"model": "scripted", "input": text, "stream": stream, "tools": [{"type": "function", **TOOL}]}
        messages = [{"role": "user", "content": text}]
        if path == MESSAGES:
            tool = {"name": "look", "description": "Look.", "input_schema": SCHEMA}
            return {"model": "scripted", "messages": messages, "max_tokens": 400, "stream": stream, "tools": [tool]}
        tools = [{"type": "function", "function": TOOL}]
        return {"model": "scripted", "messages": messages, "stream": stream, "tools": tools}

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self.r.choices(("stream", "whole", "leave", "wrong", "kill"), (40, 30, 15, 14, 1))[0]
            try:
                await getattr(self, kind)()
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                self.counts[f"{kind}: {type(error).__name__}"] += 1
            await asyncio.sleep(self.r.random() * 0.05)

    async def stream(self) -> None:
        path = self.r.choice((CHAT, COMPLETIONS, MESSAGES, RESPONSES))
        async with self.http.post(path, json=self.body(path, True)) as reply:
            raw = await reply.read()
            ends = {MESSAGES: b"message_stop", RESPONSES: b"response.completed"}
            how = "" if ends.get(path, b"[DONE]") in raw else " without an end"
            self.counts[f"stream {path} {reply.status}{how}"] += 1

    async def whole(self) -> None:
        path = self.r.choice((CHAT, COMPLETIONS, MESSAGES, RESPONSES))
        async with self.http.post(path, json=self.body(path, False)) as reply:
            found = await reply.json()
            self.counts[f"whole {path} {reply.status}"] += 1
        if path == RESPONSES and reply.status == 200 and self.r.random() < 0.5:
            async with self.http.delete(f"{path}/{found['id']}") as reply:
                self.counts[f"delete {reply.status}"] += 1

    async def leave(self) -> None:
        path = self.r.choice((CHAT, MESSAGES, RESPONSES))
        reply = await self.http.post(path, json=self.body(path, True))
        await reply.content.readany()
        reply.close()
        self.counts[f"leave {path} {reply.status}"] += 1

    async def wrong(self) -> None:
        path, body = self.r.choice(WRONG)
        async with self.http.post(path, json=body) as reply:
            await reply.read()
            self.counts[f"wrong {reply.status}"] += 1

    async def kill(self) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, self.server.base)
        await asyncio.sleep(0.1 + self.r.random() * 0.3)
        if process.returncode is None:
            process.kill()
        await process.wait()
        self.counts["kill"] += 1

    def look(self, began: float) -> dict[str, Any]:
        """What the server holds now."""
        api, engine = psutil.Process(self.server.process.pid), self.server.engine()
        metrics = self.server.metrics()
        names = ("kv_cache_blocks{free}", "kv_cache_blocks{cached}", "num_requests_running", "num_requests_waiting")
        return {
            "at_s": round(time.monotonic() - began), "api_mib": round(api.memory_info().rss / 2**20, 1),
            "engine_mib": round(engine.memory_info().rss / 2**20, 1), "api_files": api.num_fds(),
            "engine_files": engine.num_fds(), "requests": sum(self.counts.values()),
            **{name: metrics[name] for name in names},
        }  # fmt: skip

    async def run(self, minutes: float, clients: int, out: Path) -> list[dict[str, Any]]:
        began, looks = time.monotonic(), []
        until = began + 60 * minutes
        timeout, connector = aiohttp.ClientTimeout(total=120), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.server.base, timeout=timeout, connector=connector) as self.http:
            work = [asyncio.create_task(self.client(until)) for _ in range(clients)]
            with out.open("w") as lines:
                while time.monotonic() < until:
                    await asyncio.sleep(min(20.0, until - time.monotonic()))
                    looks.append(await asyncio.to_thread(self.look, began))
                    print(json.dumps(looks[-1]), file=lines, flush=True)
            await asyncio.gather(*work)
        return looks


def faults(looks: list[dict[str, Any]], counts: Counter[str], idle: dict[str, float]) -> list[str]:
    """What is wrong after a soak. Memory may fill caches in the first half."""
    bad = (" 5", "Error", "without")
    found = [f"{name}: {count}" for name, count in counts.items() if any(part in name for part in bad)]
    half = looks[len(looks) // 2 :]
    for name in ("api_mib", "engine_mib"):
        parts = max(1, len(half) // 3)
        first, last = (statistics.median(look[name] for look in part) for part in (half[:parts], half[-parts:]))
        if last > first * 1.02 + 4:
            found.append(f"{name} grows in the second half: {first} to {last}")
    if idle["kv_cache_blocks{free}"] + idle["kv_cache_blocks{cached}"] != idle["kv_cache_blocks{total}"]:
        found.append(f"blocks are missing: {idle}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"))
    args = parser.parse_args()
    folder = build_tokenizer(Path(tempfile.mkdtemp()))
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": Tokenizer.load(folder).eos_id}))
    # Bounds that half an hour fills, so that the second half shows whether they hold.
    server = ServerProcess([str(folder), "--blocks", "3000", "--max-model-len", "8192", "--step-s", "0.001", "--fast",
                            "--kept-mib", "4"], ("-m", "tests.serve.device"))  # fmt: skip
    try:
        soak = Soak(server, args.seed)
        before = soak.look(time.monotonic())
        looks = asyncio.run(soak.run(args.minutes, args.clients, args.out))
        idle = server.wait_idle(60)
        after = soak.look(time.monotonic())
        found = faults(looks, soak.counts, idle)
        for name in ("api_files", "engine_files"):
            if after[name] > before[name] + 4:
                found.append(f"{name}: {before[name]} before, {after[name]} after")
        counts = dict(sorted(soak.counts.items()))
        print(json.dumps({"before": before, "after": after, "counts": counts, "faults": found}, indent=1))
        return 1 if found else 0
    except (OSError, ValueError):
        print(f"the server:\n{server.log()[-4000:]}", file=sys.stderr)
        raise
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())

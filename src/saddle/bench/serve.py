"""A load test of a running server: makes the prompts, sends them on time, reduces what came back.

Nothing of the engine is imported: the server may be any that speaks the OpenAI API.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np

from saddle.bench import client, workload
from saddle.bench.client import Api, RequestOutput
from saddle.errors import StartupError

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 6 * 3600
READY_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """One load test.

    base_url         such as http://127.0.0.1:8000
    endpoint         path of the API
    model            name in the requests; None asks the server
    tokenizer        folder with tokenizer.json, or the file; None looks where the model may be
    request_rate     requests a second; infinite sends all at once
    max_concurrency  requests under way at most
    sampling         fields of the request body that override or extend the standard ones
    """

    base_url: str
    api: Api
    endpoint: str
    dataset: workload.RandomSpec
    model: str | None = None
    tokenizer: str | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp: tuple[workload.Ramp, float, float] | None = None
    max_concurrency: int | None = None
    num_warmups: int = 0
    ready_timeout_s: float = 0.0
    insecure: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    request_id_prefix: str = "bench-"
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for flag, value in (("--request-rate", self.request_rate), ("--burstiness", self.burstiness)):
            if not value > 0:
                raise StartupError(f"{flag} must be above 0, got {value}.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise StartupError(f"--max-concurrency must be 1 or more, got {self.max_concurrency}.")
        if self.num_warmups < 0:
            raise StartupError(f"--num-warmups must be 0 or more, got {self.num_warmups}.")


@dataclass(frozen=True, slots=True)
class BenchRun:
    """What came back: one output a request, the seconds from first dispatch to last response, and the names."""

    outputs: list[RequestOutput]
    duration: float
    model: str
    tokenizer: str


async def run(spec: BenchSpec, on_done: Callable[[], None] = lambda: None) -> BenchRun:
    """Run a load test.

    Args:
        on_done: called after each measured request, for a progress bar.

    Raises:
        StartupError: the server cannot be reached, or there is no tokenizer.
    """
    tls = ssl.create_default_context()
    if spec.insecure:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    connector = aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        model, root = await _models(session, spec)
        path = find_tokenizer(spec.tokenizer, (spec.model, root, model))
        local = None if path is None else workload.LocalCodec(path)
        server = workload.ServerCodec(session, spec.base_url, model, dict(spec.headers))
        prompts = await workload.random_prompts(spec.dataset, local, server)
        sender = _Sender(session, spec, model)
        await sender.wait_until_ready(prompts[0])
        await sender.warm_up(prompts[0])
        outputs, duration = await sender.measure(prompts, on_done)
    return BenchRun(outputs, duration, model, "server" if path is None else str(path.parent))


async def _models(session: aiohttp.ClientSession, spec: BenchSpec) -> tuple[str, str | None]:
    """The model's name in requests, and the folder or hub id that the server says it comes from."""
    deadline = time.monotonic() + spec.ready_timeout_s
    while True:
        try:
            async with session.get(spec.base_url + "/v1/models", headers=spec.headers) as response:
                response.raise_for_status()
                first = (await response.json())["data"][0]
                return spec.model or str(first["id"]), first.get("root")
        except (aiohttp.ClientError, OSError, KeyError, IndexError) as error:
            if time.monotonic() < deadline:
                await asyncio.sleep(READY_POLL_S)
                continue
            if spec.model and isinstance(error, aiohttp.ClientResponseError | KeyError | IndexError):
                return spec.model, None
            raise StartupError(f"{spec.base_url}/v1/models does not answer: {error}") from None


class _Sender:
    """Builds and sends the requests of one run."""

    def __init__(self, session: aiohttp.ClientSession, spec: BenchSpec, model: str) -> None:
        self._session, self._spec, self._model = session, spec, model
        self._url = spec.base_url + spec.endpoint
        self._body = client.chat_body if spec.api == "chat" else client.completion_body
        self._headers = {"Content-Type": "application/json", **spec.headers}

    async def send(self, prompt: workload.Prompt, name: str) -> RequestOutput:
        output = RequestOutput(prompt_tokens=prompt.num_tokens)
        await self._send(prompt, name, output)
        return output

    async def _send(self, prompt: workload.Prompt, name: str, output: RequestOutput) -> None:
        body = {"model": self._model, **self._body(prompt.text, prompt.output_len), **self._spec.sampling}
        headers = {**self._headers, "x-request-id": self._spec.request_id_prefix + name}
        await client.send(self._session, self._url, self._spec.api, msgspec.json.encode(body), headers, output)

    async def wait_until_ready(self, prompt: workload.Prompt) -> None:
        """Send one prompt until it succeeds, for as long as the specification allows."""
        deadline = time.monotonic() + self._spec.ready_timeout_s
        while self._spec.ready_timeout_s > 0:
            output = await self.send(prompt, "ready")
            if output.success:
                return
            if time.monotonic() >= deadline:
                raise StartupError(f"The server is not ready after {self._spec.ready_timeout_s} s: {output.error}")
            await asyncio.sleep(READY_POLL_S)

    async def warm_up(self, prompt: workload.Prompt) -> None:
        slots = asyncio.Semaphore(self._spec.max_concurrency or max(self._spec.num_warmups, 1))

        async def one(index: int) -> RequestOutput:
            async with slots:
                return await self.send(prompt, f"warmup{index}")

        for output in await asyncio.gather(*(one(index) for index in range(self._spec.num_warmups))):
            if not output.success:
                logger.warning("a warm-up request failed: %s", output.error)

    async def measure(
        self, prompts: list[workload.Prompt], on_done: Callable[[], None]
    ) -> tuple[list[RequestOutput], float]:
        """Send every prompt when it is due and a slot is free."""
        spec = self._spec
        rng = np.random.default_rng(spec.dataset.seed)
        due = workload.due_times(len(prompts), spec.request_rate, spec.burstiness, rng, spec.ramp)
        outputs = [RequestOutput(prompt_tokens=prompt.num_tokens) for prompt in prompts]
        slots = asyncio.Semaphore(spec.max_concurrency or len(prompts))

        async def one(index: int) -> None:
            outputs[index].arrival = time.perf_counter()
            async with slots:
                await self._send(prompts[index], str(index), outputs[index])
            on_done()

        start = time.perf_counter()
        tasks = []
        for index, moment in enumerate(due):
            wait = start + moment - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(index)))
        await asyncio.gather(*tasks)
        return outputs, time.perf_counter() - start


def find_tokenizer(given: str | None, candidates: tuple[str | None, ...]) -> Path | None:
    """The tokenizer.json of `given`, else of the first candidate (folder or hub id) that is on this machine.

    Raises:
        StartupError: `given` has none.
    """
    for name in (given,) if given else candidates:
        if not name:
            continue
        path = Path(name).expanduser()
        file = path if path.name == "tokenizer.json" else path / "tokenizer.json"
        if file.is_file():
            return file
        cached = _hub_cache(name)
        if cached is not None:
            return cached
    if given:
        raise StartupError(f"--tokenizer must be a folder with tokenizer.json, or a cached hub id, got {given!r}.")
    return None


def _hub_cache(name: str) -> Path | None:
    """A hub repository's tokenizer.json, if it was downloaded before; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:  # a path, not a repository
        return None
    return Path(found) if isinstance(found, str) else None

"""What is sent and when: random prompts of exact token counts, and the times at which they are due.

A random prompt is a run of neighbouring ids of the vocabulary without its special tokens, decoded to text. Text does
not always encode to the ids that it came from, so the ids are cut or filled and decoded again until the count holds;
when the server's tokenizer counts differently from the local one, the server's /tokenize and /detokenize decide.
"""

from __future__ import annotations

import asyncio
import logging
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import aiohttp
import numpy as np
import tokenizers

from saddle.errors import StartupError

logger = logging.getLogger(__name__)

MOST_TRIES = 10
PARALLEL_ALIGNMENTS = 8
Ramp = Literal["linear", "exponential"]
Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to send: its text, its length in tokens, and how many tokens to ask for."""

    text: str
    num_tokens: int
    output_len: int


def check_least(flag: str, value: int, least: int) -> None:
    """Raises StartupError below `least`."""
    if value < least:
        raise StartupError(f"{flag} must be {least} or more, got {value}.")


def check_range_ratio(ratio: float) -> None:
    """Raises StartupError where lengths of [len * (1 - ratio), len * (1 + ratio)] would make no sense."""
    if not 0 <= ratio < 1:
        raise StartupError(f"--random-range-ratio must be at least 0 and below 1, got {ratio}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSpec:
    """The dataset "random". Lengths are drawn uniformly from [len * (1 - ratio), len * (1 + ratio)]."""

    num_prompts: int = 1000
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--num-prompts", self.num_prompts, 1), ("--random-input-len", self.input_len, 1),
            ("--random-output-len", self.output_len, 1), ("--random-prefix-len", self.prefix_len, 0),
        ):  # fmt: skip
            check_least(flag, value, least)
        check_range_ratio(self.range_ratio)


class Codec(Protocol):
    """Text to ids and back, without adding special tokens."""

    async def encode(self, text: str) -> list[int]: ...

    async def decode(self, ids: Sequence[int]) -> str: ...

    async def vocabulary(self) -> Ids:
        """Ids that ordinary text is made of."""


class LocalCodec:
    """The tokenizer.json of a folder."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))

    async def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    async def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    async def vocabulary(self) -> Ids:
        added = set(self._tokenizer.get_added_tokens_decoder())
        ids = set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - added
        return np.array(sorted(ids), dtype=np.int64)


class ServerCodec:
    """The tokenizer of the server, through /tokenize and /detokenize.

    Raises:
        aiohttp.ClientError: the server does not have these routes, or refuses.
    """

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str, headers: dict[str, str]) -> None:
        self._session, self._base_url, self._model, self._headers = session, base_url, model, headers

    async def encode(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return list((await self._post("/tokenize", body))["tokens"])

    async def decode(self, ids: Sequence[int]) -> str:
        body = {"model": self._model, "tokens": [int(token) for token in ids]}
        return str((await self._post("/detokenize", body))["prompt"])

    async def vocabulary(self) -> Ids:
        return await plain_ids(self)  # the server does not list its vocabulary

    async def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._session.post(self._base_url + route, json=body, headers=self._headers) as response:
            response.raise_for_status()
            found: dict[str, Any] = await response.json()
            return found


async def random_prompts(spec: RandomSpec, local: LocalCodec | None, server: ServerCodec) -> list[Prompt]:
    """Make the prompts of the dataset "random"; equal specs and tokenizers give equal prompts.

    Raises:
        StartupError: there is no local tokenizer and the server has no /tokenize.
    """
    rng = np.random.default_rng(spec.seed)
    codec = local or server
    try:
        pool = await codec.vocabulary()
        filler = await plain_ids(codec)
    except (aiohttp.ClientError, KeyError, ValueError) as error:
        raise StartupError(
            f"No tokenizer.json was found here and the server does not tokenize ({error}); give --tokenizer FOLDER."
        ) from None
    low, high = 1 - spec.range_ratio, 1 + spec.range_ratio
    shape = spec.num_prompts
    inputs = rng.integers(max(1, math.floor(spec.input_len * low)), math.ceil(spec.input_len * high) + 1, shape)
    outputs = rng.integers(max(1, math.floor(spec.output_len * low)), math.ceil(spec.output_len * high) + 1, shape)
    offsets = rng.integers(0, len(pool), shape)
    prefix = pool[rng.integers(0, len(pool), spec.prefix_len)].tolist()
    prompts = []
    for index in range(spec.num_prompts):
        run = pool[(offsets[index] + index + np.arange(inputs[index])) % len(pool)].tolist()
        text, count = await fit(codec, prefix + run, spec.prefix_len + int(inputs[index]), filler, rng)
        prompts.append(Prompt(text, count, int(outputs[index])))
    return prompts if local is None else await align(prompts, (inputs + spec.prefix_len).tolist(), server, rng)


async def plain_ids(codec: Codec) -> Ids:
    """Ids of plain text, which are never special and decode to whole characters."""
    return np.array(sorted(set(await codec.encode(string.printable + " ".join(string.printable)))), dtype=np.int64)


async def fit(
    codec: Codec, ids: list[int], target: int, filler: Ids, rng: np.random.Generator
) -> tuple[str, int]:
    """A text that encodes to `target` tokens, begun from `ids`, and its count (the closest of the tries).

    Each try replaces one more token of the end by `filler`: a cut through a character would grow back for ever.
    """
    best: tuple[int, str, int] | None = None
    for attempt in range(MOST_TRIES):
        text = await codec.decode(ids)
        again = await codec.encode(text)
        miss = abs(len(again) - target)
        if best is None or miss < best[0]:
            best = (miss, text, len(again))
        if miss == 0:
            break
        kept = again[: max(0, target - attempt)]
        ids = kept + filler[rng.integers(0, len(filler), target - len(kept))].tolist()
    assert best is not None
    return best[1], best[2]


async def align(
    prompts: list[Prompt], targets: list[int], server: ServerCodec, rng: np.random.Generator
) -> list[Prompt]:
    """Give the prompts their lengths by the server's count; a server that cannot tell keeps them as they are."""
    slots = asyncio.Semaphore(PARALLEL_ALIGNMENTS)

    async def one(prompt: Prompt, target: int, filler: Ids) -> Prompt:
        async with slots:
            ids = await server.encode(prompt.text)
            if len(ids) == target:
                return Prompt(prompt.text, target, prompt.output_len)
            text, count = await fit(server, ids, target, filler, rng)
            return Prompt(text, count, prompt.output_len)

    try:
        filler = await plain_ids(server)
        work = (one(prompt, target, filler) for prompt, target in zip(prompts, targets, strict=True))
        return list(await asyncio.gather(*work))
    except (aiohttp.ClientError, KeyError, ValueError) as error:
        logger.warning("the server does not tokenize (%s): prompt lengths are those of the local tokenizer", error)
        return prompts


def due_times(
    count: int, request_rate: float, burstiness: float, rng: np.random.Generator,
    ramp: tuple[Ramp, float, float] | None = None,
) -> list[float]:  # fmt: skip
    """Seconds after the start at which each request is due.

    Gaps follow a gamma distribution of shape `burstiness` (1 is a Poisson process, more is more even) and mean
    1 / rate; without a ramp they are scaled so that all requests take count / rate seconds.

    Args:
        request_rate: requests a second; infinite for all at once.
        ramp: kind, first and last rate; overrides `request_rate`.
    """
    if ramp is None and request_rate == math.inf:
        return [0.0] * count
    share = np.arange(count) / max(count - 1, 1)
    if ramp is None:
        rates = np.full(count, request_rate)
    elif ramp[0] == "linear":
        rates = ramp[1] + (ramp[2] - ramp[1]) * share
    else:
        rates = ramp[1] * (ramp[2] / ramp[1]) ** share
    times = np.cumsum(rng.gamma(shape=burstiness, scale=1.0 / (rates * burstiness)))
    if ramp is None and times[-1] > 0:
        times *= count / request_rate / times[-1]
    return [float(moment) for moment in times]

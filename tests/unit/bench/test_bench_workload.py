"""Prompts have the lengths that were asked for, by the server's count; requests are due when they should be."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from saddle.bench.workload import LocalCodec, RandomSpec, ServerCodec, due_times, fit, plain_ids, random_prompts
from saddle.errors import StartupError

SPECIALS = ["]~b]", "[e~[", "<think>"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with two merges, so that decoded ids may encode to fewer."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "th": 256, "he": 257}, merges=[("t", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


async def prompts(server: Any, spec: RandomSpec, local: LocalCodec | None) -> list[Any]:
    async with aiohttp.ClientSession() as session:
        return await random_prompts(spec, local, ServerCodec(session, server.url, "m", {}))


async def test_local_lengths_are_exact_and_seeded(
    scripted: Callable[..., Any], tokenizer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = await scripted(lambda _: [])
    server.tokenizes = False
    codec = LocalCodec(tokenizer_file)
    spec = RandomSpec(num_prompts=30, input_len=40, output_len=10, range_ratio=0.5, prefix_len=5, seed=3)
    with caplog.at_level(logging.WARNING):
        made = await prompts(server, spec, codec)
    assert "does not tokenize" in caplog.text  # once, and the local counts stand
    counts = [len(await codec.encode(prompt.text)) for prompt in made]
    assert counts == [prompt.num_tokens for prompt in made]
    assert all(5 + 20 <= count <= 5 + 60 for count in counts)
    assert all(5 <= prompt.output_len <= 15 for prompt in made)
    assert len(set(counts)) > 5
    assert len({prompt.output_len for prompt in made}) > 3
    assert not any(special in prompt.text for prompt in made for special in SPECIALS)
    assert len({prompt.text for prompt in made}) > 20  # of 258 places to begin
    assert made == await prompts(server, spec, codec)
    assert made != await prompts(server, RandomSpec(num_prompts=30, input_len=40, prefix_len=5), codec)


async def test_server_count_decides(scripted: Callable[..., Any], tokenizer_file: Path) -> None:
    """The scripted server's tokens are two characters: prompts of 20 local tokens grow to 20 of the server's."""
    server = await scripted(lambda _: [])
    made = await prompts(server, RandomSpec(num_prompts=4, input_len=20), LocalCodec(tokenizer_file))
    assert [prompt.num_tokens for prompt in made] == [20] * 4
    assert all(39 <= len(prompt.text) <= 40 for prompt in made)


async def test_without_local_tokenizer(scripted: Callable[..., Any]) -> None:
    server = await scripted(lambda _: [])
    made = await prompts(server, RandomSpec(num_prompts=3, input_len=16), None)
    assert [(prompt.num_tokens, len(prompt.text)) for prompt in made] == [(16, 32)] * 3
    server.tokenizes = False
    with pytest.raises(StartupError, match="--tokenizer"):
        await prompts(server, RandomSpec(num_prompts=3), None)


async def test_fit_does_not_cut_through_characters(tokenizer_file: Path) -> None:
    """Two tokens make an e with an accent: cut to an odd count, the half grows back as a replacement character."""
    codec = LocalCodec(tokenizer_file)
    ids = await codec.encode("\u00e9" * 4)
    assert len(ids) == 8
    text, count = await fit(codec, ids, 5, await plain_ids(codec), np.random.default_rng(0))
    assert (count, len(await codec.encode(text)), text[:1]) == (5, 5, "\u00e9")


@pytest.mark.parametrize(("fields", "flag"), [
    ({"num_prompts": 0}, "--num-prompts"), ({"input_len": 0}, "--random-input-len"),
    ({"output_len": 0}, "--random-output-len"), ({"range_ratio": 1.0}, "--random-range-ratio"),
    ({"prefix_len": -1}, "--random-prefix-len"),
])  # fmt: skip
def test_bad_lengths(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(StartupError, match=flag):
        RandomSpec(**fields)


def test_due_times() -> None:
    rng = np.random.default_rng(0)
    assert due_times(3, math.inf, 1.0, rng) == [0.0, 0.0, 0.0]
    times = due_times(400, 20.0, 1.0, rng)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(20.0)  # 400 requests at 20 a second
    gaps = np.diff([0.0, *times])
    even = np.diff([0.0, *due_times(400, 20.0, 100.0, rng)])
    assert 0.8 < statistics.stdev(gaps) / statistics.mean(gaps) < 1.2  # Poisson: as spread as long
    assert 0.08 < statistics.stdev(even) / statistics.mean(even) < 0.12  # 1 / sqrt(100)


def test_ramps() -> None:
    rng = np.random.default_rng(0)
    linear = due_times(2000, math.inf, 1000.0, rng, ("linear", 10.0, 30.0))
    gaps = np.diff([0.0, *linear])
    assert 1 / np.mean(gaps[:100]) == pytest.approx(10.5, rel=0.05)
    assert 1 / np.mean(gaps[-100:]) == pytest.approx(29.5, rel=0.05)
    assert 1 / np.mean(gaps[950:1050]) == pytest.approx(20, rel=0.05)
    grown = np.diff([0.0, *due_times(2000, math.inf, 1000.0, rng, ("exponential", 4.0, 100.0))])
    assert 1 / np.mean(grown[950:1050]) == pytest.approx(20, rel=0.05)  # the geometric mean

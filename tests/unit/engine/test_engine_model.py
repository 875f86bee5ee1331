"""The engine over a real model on the CPU: greedy tokens do not depend on how they were scheduled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saddle.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig
from saddle.engine.core import EngineCore
from saddle.engine.scheduler import Limits, Scheduler
from saddle.protocol import SamplingParams, TokenRequest
from tests.support.checkpoint import SMALL, write_random_checkpoint

torch = pytest.importorskip("torch")

NUM_TOKENS = 24
BLOCK = 8
PROMPTS = [[(7 * n + 3 * i * i) % (SMALL.vocab_size - 10) + 2 for i in range(5 + 11 * n)] for n in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, seed=3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(before)


def generate(
    folder: Path, prompts: list[list[int]], *, plans: int = 1, budget: int = 512, num_blocks: int = 400,
    together: bool = True, **params: Any,
) -> tuple[list[list[int]], EngineCore]:  # fmt: skip
    """Greedy ids of each prompt, all at once or one after the other."""
    from saddle.executor.inproc import InprocExecutor
    from saddle.runner.runner import Runner

    config = EngineConfig(
        load=LoadConfig(model=str(folder), dtype="float32"),
        cache=CacheConfig(block_size=BLOCK, kv_cache_memory_bytes=64 << 20),
        scheduler=SchedulerConfig(max_model_len=320, max_num_seqs=16, max_num_batched_tokens=budget,
                                  plans_in_flight=plans),
    )  # fmt: skip
    executor = InprocExecutor(Runner(config, folder))
    info = executor.start(lambda phase, share, note: None)
    assert info.num_blocks >= num_blocks
    limits = Limits(num_blocks=num_blocks, block_size=info.block_size, vocab_size=info.vocab_size, max_model_len=320,
                    max_num_seqs=16, max_num_batched_tokens=budget)  # fmt: skip
    core = EngineCore(executor, Scheduler(limits, frozenset()), plans)
    found: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        found[f"r{n}"] = []
        core.submit(TokenRequest(
            request_id=f"r{n}", prompt_ids=prompt, arrival_s=float(n),
            params=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, **params),
        ))  # fmt: skip
        if not together:
            drain(core, found)
    drain(core, found)
    core.stop()
    return list(found.values()), core


def drain(core: EngineCore, found: dict[str, list[int]]) -> None:
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            found[delta.request_id] += delta.token_ids
        core.check()


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    ids, _ = generate(folder, PROMPTS, plans=0, together=False)
    assert all(len(each) == NUM_TOKENS for each in ids)
    assert len({tuple(each) for each in ids}) > 12, "the model says the same to everything"
    return ids


@pytest.mark.parametrize("plans", [0, 1, 2])
def test_in_a_batch_of_sixteen(folder: Path, alone: list[list[int]], plans: int) -> None:
    ids, core = generate(folder, PROMPTS, plans=plans)
    assert ids == alone
    assert core.stats.num_steps < 2 * NUM_TOKENS


@pytest.mark.parametrize("plans", [0, 1])
def test_in_chunks_of_sixteen_tokens(folder: Path, alone: list[list[int]], plans: int) -> None:
    ids, core = generate(folder, PROMPTS, plans=plans, budget=16)
    assert ids == alone
    assert core.stats.num_steps > sum(map(len, PROMPTS)) // 16


@pytest.mark.parametrize("plans", [0, 1])
def test_from_the_prefix_cache(folder: Path, alone: list[list[int]], plans: int) -> None:
    ids, core = generate(folder, [*PROMPTS, *PROMPTS], plans=plans)
    assert ids == alone + alone
    assert core.stats.num_cache_hits >= sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in PROMPTS)


@pytest.mark.parametrize("plans", [0, 1, 2])
def test_after_preemption(folder: Path, alone: list[list[int]], plans: int) -> None:
    ids, core = generate(folder, PROMPTS, plans=plans, num_blocks=60)
    assert ids == alone
    assert core.stats.num_preemptions >= 2


@pytest.mark.parametrize("plans", [0, 1])
def test_with_prompt_logprobs_nothing_changes(folder: Path, alone: list[list[int]], plans: int) -> None:
    ids, core = generate(folder, PROMPTS, plans=plans, num_blocks=60, prompt_logprobs=1)
    assert ids == alone
    assert core.stats.num_cache_hits == 0

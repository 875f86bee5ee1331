"""Starting a device: what it decides, what it reports, what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from saddle.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig
from saddle.errors import StartupError
from saddle.executor.inproc import InprocExecutor
from saddle.protocol import DeviceInfo, RowWork, SamplingParams, StepPlan
from saddle.runner import runner as module
from saddle.runner.runner import Runner
from tests.support.checkpoint import SMALL, write_random_checkpoint
from tests.support.plans import Plans

BYTES_PER_TOKEN = SMALL.num_layers * 2 * SMALL.num_kv_heads * SMALL.head_dim * 4  # float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), SMALL)


def load(folder: Path, *, num_valid: int | None = None, load: dict[str, Any] | None = None,
         cache: dict[str, Any] | None = None, **scheduler: Any) -> tuple[Runner, DeviceInfo]:  # fmt: skip
    config = EngineConfig(
        load=LoadConfig(model=str(folder), **(load or {})),
        cache=CacheConfig(**(cache or {})),
        scheduler=SchedulerConfig(**scheduler),
    )
    runner = Runner(config, folder, num_valid)
    return runner, InprocExecutor(runner).start(lambda phase, share, note: None)


def line(info: DeviceInfo, name: str) -> str:
    (found,) = [text for text in info.lines if text.startswith((f"{name} = ", f"{name}: "))]
    return found


def test_defaults_of_a_cpu_each_with_its_reason(folder: Path) -> None:
    _, info = load(folder)
    assert (info.block_size, info.max_num_seqs, info.max_num_batched_tokens) == (16, 32, 512)
    assert info.max_model_len == SMALL.max_position_embeddings
    assert info.num_blocks * 16 * BYTES_PER_TOKEN <= 4 << 30
    for name, reason in (("device", "sees no GPU"), ("threads", "API process"), ("dtype", "the default on a CPU"),
                         ("block_size", "the default on a CPU"), ("max_num_seqs", "the default on a CPU"),
                         ("max_model_len", "max_position_embeddings"), ("num_blocks", "32 rows of 8192 tokens"),
                         ("weights", "GB/s")):  # fmt: skip
        assert reason in line(info, name)


def test_what_is_asked_for_is_what_is_done(folder: Path) -> None:
    runner, info = load(folder, load={"dtype": "bfloat16"}, cache={"block_size": 8, "kv_cache_memory_bytes": 1 << 20},
                        max_model_len=96, max_num_seqs=3, max_num_batched_tokens=24)  # fmt: skip
    assert (info.block_size, info.max_num_seqs, info.max_num_batched_tokens) == (8, 3, 24)
    assert info.max_model_len == 96 and "--max-model-len" in line(info, "max_model_len")
    assert info.num_blocks == 3 * 96 // 8
    assert cast(Any, runner.path)._kv.dtype == torch.bfloat16 and "--dtype" in line(info, "dtype")


def test_auto_is_the_largest_context_that_fits(folder: Path) -> None:
    tokens = 100
    _, info = load(folder, cache={"kv_cache_memory_bytes": tokens * BYTES_PER_TOKEN}, max_model_len=0)
    assert info.max_model_len == 96 and info.num_blocks == 6
    assert "the largest that fits" in line(info, "max_model_len")


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(folder: Path) -> None:
    memory = {"kv_cache_memory_bytes": 100 * BYTES_PER_TOKEN}
    with pytest.raises(StartupError, match="The largest that fits is --max-model-len 96;"):
        load(folder, cache=memory, max_model_len=97)
    assert load(folder, cache=memory, max_model_len=96)[1].max_model_len == 96
    with pytest.raises(StartupError, match="--max-model-len must be at most 8192"):
        load(folder, max_model_len=8193)


def test_a_context_of_few_tokens_starts(folder: Path) -> None:
    for length in (2, 17):
        runner, info = load(folder, max_model_len=length, max_num_seqs=1)
        assert (info.max_model_len, info.num_blocks) == (length, -(-length // 16))
        assert len(Plans(runner, info).generate([5] * (length - 1), 1)) == 1
    with pytest.raises(StartupError, match="--max-model-len must be at least 2"):
        load(folder, max_model_len=1)


def test_unknown_kv_dtype(folder: Path) -> None:
    with pytest.raises(StartupError, match=r"--kv-cache-dtype must be one of auto, bfloat16, float32.*got 'fp5'"):
        load(folder, cache={"kv_cache_dtype": "fp5"})


def test_random_weights_are_the_same_for_the_same_seed(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    found = []
    for seed in (0, 0, 1):
        runner, info = load(tmp_path, load={"load_format": "dummy", "seed": seed}, max_model_len=64)
        assert "random" in line(info, "weights")
        found.append(Plans(runner, info).generate([3, 1, 4], 12))
    assert found[0] == found[1] != found[2]


def test_progress_names_its_phases(folder: Path) -> None:
    seen: list[tuple[str, float]] = []
    runner = Runner(EngineConfig(load=LoadConfig(model=str(folder))), folder)
    InprocExecutor(runner).start(lambda phase, share, note: seen.append((phase, share)))
    assert seen[0][0] == "loading weights" and seen[-1][0] == "warming up"
    shares = [share for phase, share in seen if phase == "loading weights"]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_the_first_steps_leave_no_request_behind(folder: Path) -> None:
    runner, _ = load(folder, max_model_len=64)
    runner.forward(StepPlan(1, [], [RowWork(0, 0, 1, 0, [], True, 64)], []))
    assert "row 0 is at epoch -1" in str(runner.sample(1, None).wait().error)


def test_ids_behind_the_tokenizer_are_not_sampled(folder: Path) -> None:
    runner, info = load(folder, num_valid=20, max_model_len=128)
    plans = Plans(runner, info)
    found = plans.generate([3, 1, 4], 60, SamplingParams(temperature=2.0))
    assert max(found) < 20 and len(set(found)) > 8


def test_one_core_is_left_to_the_api_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 1), (5, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        _, info = load(folder, max_model_len=32)
        assert torch.get_num_threads() == threads
        assert line(info, "threads").startswith(f"threads = {threads} ({cores} cores")
    torch.set_num_threads(1)


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used, stat = tmp_path / "max", tmp_path / "current", tmp_path / "memory.stat"
    monkeypatch.setattr(module, "CGROUPS", ((str(tmp_path), "max", "current", "inactive_file"),))
    stat.write_text("anon 5\ninactive_file 0\n")
    whole = module.available_memory()
    assert whole > 1 << 20
    limit.write_text("max\n")
    used.write_text("5\n")
    assert module.available_memory() > 1 << 20
    limit.write_text(f"{10 << 20}\n")
    used.write_text(f"{4 << 20}\n")
    assert module.available_memory() == 6 << 20
    stat.write_text(f"anon 5\ninactive_file {1 << 20}\n")
    assert module.available_memory() == 7 << 20
    used.write_text(f"{14 << 20}\n")
    assert module.available_memory() == 0

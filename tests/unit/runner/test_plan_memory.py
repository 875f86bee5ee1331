"""How much KV memory there is, and which context it allows."""

from __future__ import annotations

import re

import pytest

from saddle.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig
from saddle.errors import StartupError
from saddle.plan.memory import GIB, KVCapacity, cpu_kv_bytes, gpu_kv_bytes, kv_capacity, plan_device
from saddle.protocol import DeviceMemory


def capacity(kv_bytes: int, asked: int | None = None, *, rows: int = 4, checkpoint: int = 1000) -> KVCapacity:
    """100 bytes a token, 16 tokens a block."""
    return kv_capacity(kv_bytes=kv_bytes, bytes_per_token=100, block_size=16, max_num_seqs=rows, asked_len=asked,
                       checkpoint_len=checkpoint)  # fmt: skip


def test_a_cpu_gives_a_quarter_of_what_is_free_up_to_a_bound() -> None:
    assert cpu_kv_bytes(8 * GIB, None).num_bytes == 2 * GIB
    assert cpu_kv_bytes(8 * GIB, None).reason == "25% of the 8.00 GiB that are free"
    assert cpu_kv_bytes(100 * GIB, None).num_bytes == 4 * GIB
    assert "100.00 GiB are free" in cpu_kv_bytes(100 * GIB, None).reason


def test_a_cpu_gives_what_is_asked_for_if_it_is_there() -> None:
    found = cpu_kv_bytes(8 * GIB, 7 * GIB)
    assert found.num_bytes == 7 * GIB
    assert str(found.decision) == f"kv_cache_memory_bytes = {7 * GIB} (--kv-cache-memory-bytes)"
    with pytest.raises(StartupError, match=f"--kv-cache-memory-bytes must be at most {8 * GIB}, .* got {9 * GIB}"):
        cpu_kv_bytes(8 * GIB, 9 * GIB)


def test_a_gpu_gives_its_share_less_weights_and_work_space() -> None:
    found = gpu_kv_bytes(80 * GIB, 0.9, 57 * GIB, 2 * GIB, None)
    assert found.num_bytes == int(80 * GIB * 0.9) - 59 * GIB
    assert found.reason == "90% of 80.00 GiB, less 59.00 GiB for weights and work space"
    assert gpu_kv_bytes(80 * GIB, 0.9, 57 * GIB, 2 * GIB, 5 * GIB).num_bytes == 5 * GIB


def test_a_gpu_that_is_too_small() -> None:
    with pytest.raises(StartupError, match="Raise --gpu-memory-utilization or use more or larger GPUs"):
        gpu_kv_bytes(80 * GIB, 0.7, 57 * GIB, 2 * GIB, None)
    with pytest.raises(StartupError, match=f"--kv-cache-memory-bytes must be at most {21 * GIB}, "):
        gpu_kv_bytes(80 * GIB, 0.9, 57 * GIB, 2 * GIB, 22 * GIB)


def test_blocks_are_what_fits() -> None:
    found = capacity(100_000, 992)
    assert (found.num_blocks, found.max_model_len) == (62, 992)
    assert [str(one) for one in found.decisions] == [
        "max_model_len = 992 (--max-model-len)",
        "num_blocks = 62 (what fits; 16 tokens each, 992 in all)",
    ]


def test_no_more_blocks_than_all_rows_can_use() -> None:
    found = capacity(10**9, 100, rows=3)
    assert found.num_blocks == 3 * 7
    assert found.decisions[1].reason == "3 rows of 100 tokens use no more; 16 tokens each, 336 in all"


def test_auto_takes_the_largest_context_up_to_the_checkpoints() -> None:
    assert capacity(32_000, 0).max_model_len == 320
    assert capacity(10**9, 0).max_model_len == 1000


def test_the_largest_context_of_a_refusal_is_accepted_and_the_next_is_not() -> None:
    for kv_bytes in (1600, 4799, 4800, 50_000, 99_999):
        with pytest.raises(StartupError) as caught:
            capacity(kv_bytes)
        named = re.search(r"--max-model-len (\d+);", str(caught.value))
        assert named is not None
        largest = int(named.group(1))
        assert largest == kv_bytes // 1600 * 16
        assert capacity(kv_bytes, largest).num_blocks * 1600 <= kv_bytes
        with pytest.raises(StartupError):
            capacity(kv_bytes, largest + 1)


def test_a_refusal_says_what_the_context_needs() -> None:
    with pytest.raises(StartupError, match=r"A context of 1000 tokens needs 0.10 MiB of KV memory, there are 0.05 MiB"):
        capacity(50_000)


def test_not_even_one_block() -> None:
    for asked in (None, 0, 10):
        with pytest.raises(StartupError, match="One block of 16 tokens needs"):
            capacity(1599, asked)


def test_too_short_for_a_prompt_and_an_answer() -> None:
    with pytest.raises(StartupError, match="--max-model-len must be at least 2"):
        capacity(10**9, 1)
    assert capacity(10**9, 2).max_model_len == 2


def test_longer_than_the_checkpoint() -> None:
    with pytest.raises(StartupError, match="--max-model-len must be at most 1000, the checkpoint's, got 1001"):
        capacity(10**9, 1001)


# all sizes of a device -----------------------------------------------------------------------------------------------


def device(kind: str, **changes: int) -> DeviceMemory:
    sizes = {"total_bytes": 80 * GIB, "free_bytes": 40 * GIB, "weight_bytes": 10 * GIB, "step_bytes": GIB}
    return DeviceMemory(kind=kind, **{**sizes, **changes}, bytes_per_token=1000, vocab_size=77,
                        max_position_embeddings=4096, lines=["device = a test"])  # fmt: skip


def test_defaults_by_kind_of_device() -> None:
    config = EngineConfig(load=LoadConfig(model=""))
    cpu, gpu = plan_device(config, device("cpu")), plan_device(config, device("cuda"))
    assert (cpu.block_size, cpu.max_num_seqs, cpu.max_num_batched_tokens) == (16, 32, 512)
    assert (gpu.block_size, gpu.max_num_seqs, gpu.max_num_batched_tokens) == (64, 256, 8192)
    assert cpu.num_blocks == 32 * 4096 // 16 and gpu.num_blocks == 256 * 4096 // 64
    assert (cpu.plans_in_flight, gpu.plans_in_flight) == (0, 1)
    assert cpu.vocab_size == 77 and cpu.max_model_len == 4096


def test_memory_bounds_the_blocks_of_both_kinds() -> None:
    config = EngineConfig(load=LoadConfig(model=""), cache=CacheConfig(block_size=32, gpu_memory_utilization=0.5),
                          scheduler=SchedulerConfig(max_num_seqs=999))  # fmt: skip
    assert plan_device(config, device("cpu", free_bytes=GIB)).num_blocks == GIB // 4 // 32_000
    left = 80 * GIB // 2 - 40 * GIB + GIB // 2
    assert plan_device(config, device("cuda", weight_bytes=39 * GIB - GIB // 2)).num_blocks == left // 32_000


def test_what_is_asked_for_and_every_reason() -> None:
    config = EngineConfig(
        load=LoadConfig(model=""),
        cache=CacheConfig(block_size=8, kv_cache_memory_bytes=10_000_000),
        scheduler=SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=99, max_model_len=1024,
                                  plans_in_flight=2),
    )
    assert plan_device(config, device("cpu")).lines == [
        "device = a test",
        "block_size = 8 (--block-size)",
        "max_num_seqs = 5 (--max-num-seqs)",
        "max_num_batched_tokens = 99 (--max-num-batched-tokens)",
        "plans_in_flight = 2 (--async-scheduling)",
        "kv_cache_memory_bytes = 10000000 (--kv-cache-memory-bytes)",
        "max_model_len = 1024 (--max-model-len)",
        "num_blocks = 640 (5 rows of 1024 tokens use no more; 8 tokens each, 5120 in all)",
    ]

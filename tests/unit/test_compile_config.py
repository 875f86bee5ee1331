"""How `--enforce-eager` and `--compilation-config` are read: what they switch, which graphs, what start-up says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from saddle.config import CacheConfig, CompileConfig, SchedulerConfig
from saddle.errors import StartupError


def compiled(**found: Any) -> CompileConfig:
    return CompileConfig(compilation_config=found)


def test_modes() -> None:
    assert CompileConfig().uses_graphs and CompileConfig().fuses_qk_norm
    assert compiled(mode=3).uses_graphs and compiled(level=3).uses_graphs
    assert not compiled(mode=0).uses_graphs and not compiled(level=0).uses_graphs
    assert not compiled(mode=0).fuses_qk_norm
    assert not compiled(cudagraph_mode="none").uses_graphs and compiled(cudagraph_mode="FULL").uses_graphs
    assert not CompileConfig(enforce_eager=True).uses_graphs
    assert CompileConfig(enforce_eager=True).fuses_qk_norm  # eager is about graphs, not about which kernel
    assert not compiled(pass_config={"fuse_minimax_qk_norm": False}).fuses_qk_norm


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 8, 9, 31, 128, 256, 1000])
def test_sizes_waste_under_a_tenth(max_num_seqs: int) -> None:
    sizes = CompileConfig().capture_sizes(max_num_seqs)
    assert sizes[-1] == max_num_seqs
    assert {2**n for n in range(10) if 2**n <= max_num_seqs} <= set(sizes)
    for last, size in pairwise(sizes):
        assert last < size
        assert size <= 8 or size <= 1.1 * (last + 1)
    assert len(sizes) < 100


def test_sizes_as_given() -> None:
    # What is larger than any step serves the largest steps.
    assert CompileConfig(cudagraph_capture_sizes=(16, 1, 512)).capture_sizes(32) == (1, 16, 32)
    assert compiled(cudagraph_capture_sizes=[1, 2, 4, 8]).capture_sizes(7) == (1, 2, 4, 7)
    chosen = CompileConfig(cudagraph_capture_sizes=(16, 1, 512), max_cudagraph_capture_size=16)
    assert chosen.capture_sizes(32) == (1, 16) and chosen.capture_sizes(9) == (1, 9)
    assert compiled(cudagraph_capture_sizes=[4, 2]).capture_sizes(32) == (2, 4)
    assert CompileConfig(max_cudagraph_capture_size=4).capture_sizes(32) == (1, 2, 4)
    assert compiled(max_cudagraph_capture_size=2).capture_sizes(32) == (1, 2)
    assert CompileConfig(enforce_eager=True, cudagraph_capture_sizes=(1,)).capture_sizes(32) == ()


def test_pieces_of_steps_with_prompts() -> None:
    assert CompileConfig().piece_sizes(8192)[-1] == 512 and CompileConfig().piece_sizes(200)[-1] == 192
    assert CompileConfig().piece_sizes(8) == () == CompileConfig(enforce_eager=True).piece_sizes(512)
    assert compiled(mode=0).piece_sizes(512) == () == compiled(cudagraph_mode="none").piece_sizes(512)
    assert compiled(cudagraph_mode="full_decode_only").piece_sizes(512) == ()
    assert compiled(cudagraph_mode="FULL_AND_PIECEWISE").piece_sizes(512) == CompileConfig().piece_sizes(512)


def test_start_says_what_was_decided() -> None:
    assert [str(line) for line in CompileConfig(enforce_eager=True).decisions(4, 40)] == [
        "graphs = off (--enforce-eager)", "fuse_minimax_qk_norm = True (the default)",
    ]  # fmt: skip
    lines = [str(line) for line in compiled(mode=3, backend="inductor", pass_config={}).decisions(4, 40)]
    assert lines == [
        "graphs = on (--compilation-config)", "cudagraph_capture_sizes = 1 2 4 (steps that waste under 10 %)",
        "graphs of steps with prompts = 16 32 (tokens, between attention calls)",
        "fuse_minimax_qk_norm = True (--compilation-config)",
        "compilation_config = backend (no effect: Saddle compiles its own kernels in one way)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"mode": 4}, "--compilation-config mode"),
        ({"pass_config": 1}, "pass_config"),
        ({"pass_config": {"fuse_minimax_qk_norm": "yes"}}, "pass_config.fuse_minimax_qk_norm"),
        ({"cudagraph_capture_sizes": [0]}, "cudagraph_capture_sizes"),
        ({"max_cudagraph_capture_size": -1}, "max_cudagraph_capture_size"),
    ],
)
def test_wrong_values_are_named(found: dict[str, Any], named: str) -> None:
    with pytest.raises(StartupError, match=named):
        compiled(**found)


def test_other_fields() -> None:
    with pytest.raises(StartupError, match="--kv-cache-dtype must be one of auto, bfloat16"):
        CacheConfig(kv_cache_dtype="fp8_e5m2")  # type: ignore[arg-type]
    with pytest.raises(StartupError, match="--max-step-ms"):
        SchedulerConfig(max_step_ms=0.0)

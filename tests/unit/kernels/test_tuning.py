"""Measured tiles: the fastest candidate is taken, kept on disk, found again and used by the launchers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: kernels are not tested")

import triton

from saddle.kernels import experts, linear, router, target, tiles, tuning
from saddle.kernels.compile_table import activation, compiling
from saddle.kernels.tile_dot import Block, block_key
from saddle.kernels.tiles import Fp8Tiles

CHIP = target.of_arch("sm_120")
SHAPES = tuning.Shapes(256, 512, 384, 1024, 16, 4, 128, Fp8Tiles(), Fp8Tiles())


def work(matrix: tiles.PackedMatrix, sizes: tuple[int, ...]) -> list[tuning.Case]:
    """Choices of a product whose time depends on the block alone."""
    def run(block: Block) -> None:
        tried.append(block)

    tried: list[Block] = []
    blocks = [Block(bn, 16, 128, 3, warps) for bn in (32, 64, 128) for warps in (4, 8)]
    return [tuning.Case("few" if size <= 128 else "many", size, matrix, blocks, run) for size in sizes]


def test_the_fastest_that_runs_is_taken() -> None:
    matrix = tiles.allocate(512, 256, Fp8Tiles(), "meta")
    ran: list[Block] = []

    def clock(run: object) -> float:
        block = run.args[0]  # type: ignore[attr-defined]
        ran.append(block)
        if block.bn == 128:
            raise RuntimeError("out of resource: shared memory")
        return 3.0 - block.bn / 64 + block.warps / 100

    found = tuning.tune(work(matrix, (8, 1024)), CHIP, clock)
    assert len(ran) == 12
    for size in (1, 8, 16, 128):
        assert found[block_key("few", size, matrix)] == [64, max(16, size), 128, 3, 4]
    assert found[block_key("many", 8192, matrix)] == [64, 16, 128, 3, 4]
    assert block_key("many", 128, matrix) not in found and block_key("few", 256, matrix) not in found


def test_unmeasured_sizes_take_the_nearest() -> None:
    matrix = tiles.allocate(512, 256, Fp8Tiles(), "meta")
    cases = work(matrix, (8, 64))
    fast = {8: 32, 64: 128}

    def clock(run: object) -> float:
        asked.append(run.args[0].bn)  # type: ignore[attr-defined]
        size = 8 if len(asked) <= 6 else 64
        return abs(run.args[0].bn - fast[size]) + run.args[0].warps / 100  # type: ignore[attr-defined]

    asked: list[int] = []
    found = tuning.tune(cases, CHIP, clock)
    assert [found[block_key("few", size, matrix)][0] for size in (1, 16, 64, 128)] == [32, 32, 128, 128]


def test_launchers_use_measured_tiles() -> None:
    matrix = tiles.allocate(512, 256, Fp8Tiles(), "meta")
    tuned = tuning.with_blocks(CHIP, {block_key("few", 8, matrix): [16, 16, 64, 2, 4]})
    assert linear.few_block(5, matrix, tuned) == Block(16, 16, 64, 2, 4)
    assert linear.few_block(5, matrix, CHIP) != Block(16, 16, 64, 2, 4)
    assert linear.few_block(9, matrix, tuned) == linear.few_block(9, matrix, CHIP)


def test_shipped_cards_are_not_measured(tmp_path: Path) -> None:
    h100 = dataclasses.replace(target.of_arch("sm_90"), name="NVIDIA H100 80GB HBM3")
    chip, line = tuning.prepare(SHAPES, h100, "cpu", tmp_path)
    assert chip is h100 and "shipped" in line and "H100" in line
    assert not list(tmp_path.iterdir())


def test_the_first_start_measures_and_the_next_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cases", lambda *_: work(tiles.allocate(512, 256, Fp8Tiles(), "meta"), (8,)))
    monkeypatch.setattr(tuning, "time_on_gpu", lambda run: 1.0 + run.args[0].bn / 1000)
    compiled: list[tuning.Case] = []
    monkeypatch.setattr(tuning, "compile_all", lambda cases, target: compiled.extend(cases))
    first, line = tuning.prepare(SHAPES, CHIP, "cpu", tmp_path)
    assert "measured on this card in 0 s, kept in" in line and len(compiled) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("tiles-sm-120-") and json.loads(path.read_text())
    monkeypatch.setattr(tuning, "cases", lambda *_: pytest.fail("measured again"))
    again, line = tuning.prepare(SHAPES, CHIP, "cpu", tmp_path)
    assert "measured before" in line and again.blocks == first.blocks != {}
    other = dataclasses.replace(SHAPES, hidden=512)
    assert tuning.file_name(other, CHIP) != path.name


def test_candidates_are_compiled_side_by_side_and_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a chip that is not here: nothing could run. No thread may disturb another: Python 3.11 before 3.11.8 refuses
    a source whose parsing is interrupted for another's, which it is where a collection of garbage runs Python code."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # nothing was compiled before
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    matrix = tiles.allocate(512, 256, Fp8Tiles(), "meta")
    a, out = activation(CHIP, 64, 256), torch.empty(64, 512, device="meta")
    blocks = [Block(bn, 64, 128, 3, warps) for bn in (32, 64, 128) for warps in (4, 8)]
    case = tuning.Case("few", 64, matrix, blocks, lambda block: linear.launch(a, matrix, out, block, 0))
    with compiling(CHIP) as made, collecting_often():
        tuning.compile_all([case], CHIP)
    assert gc.isenabled()
    found = [kernel.kernel if type(kernel).__name__ == "FutureKernel" else kernel for kernel in made]
    assert len({kernel.asm["ptx"] for kernel in found}) == len(blocks)


@contextlib.contextmanager
def collecting_often() -> Iterator[None]:
    """Let garbage be collected all the time, and other threads run meanwhile."""
    def give_way(*_: object) -> None:
        time.sleep(1e-4)

    before = gc.get_threshold()
    gc.callbacks.append(give_way)
    gc.set_threshold(400)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(give_way)


def test_cases_cover_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "route", lambda *_: None)
    launched: list[tuple[str, Block]] = []
    monkeypatch.setattr(linear, "launch", lambda a, w, out, block, pdl: launched.append((a.data.shape[0], block)))
    monkeypatch.setattr(experts, "launch", lambda *a: launched.append((a[0].data.shape[0], a[6])))
    found = list(tuning.cases(SHAPES, CHIP, "cpu"))
    products = (("few", 8), ("few", 64), ("many", 1024), ("many", 4096))
    kinds = {(case.kernel, case.num_tokens, case.matrix.num_rows) for case in found}
    assert kinds == {
        *((kernel, size, rows) for kernel, size in products for rows in (512, 256, 1024)),
        *((kernel, size, 256) for kernel in ("up", "down") for size in tuning.SIZES),
    }
    for case in found:
        assert not (case.matrix.values.isnan().any() if case.matrix.values.dtype == torch.bfloat16 else False)
        for block in case.candidates:
            case.run(block)
            if case.kernel == "up":
                assert block.bn == 256 and block.bm == router.unit_tokens(case.num_tokens, 16, 4)
            elif case.num_tokens == 8 and isinstance(case.matrix.format, Fp8Tiles):
                assert block.bn <= 128  # rows under one scale
    assert len(launched) == sum(len(case.candidates) for case in found)

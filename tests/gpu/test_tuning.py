"""The tuner on a real card, for the demo's shape: it measures, keeps what it found, and products with it are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import packed_support as support
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("NO GPU: the tuner is not tested", allow_module_level=True)

from saddle.kernels import linear, tiles, tuning
from saddle.kernels.target import detect
from saddle.kernels.tiles import Fp8Tiles

# Widths of a small model; SIZES are those of M2.
SHAPES = tuning.Shapes(512, 2048, 1536, 4096, 16, 4, 256, Fp8Tiles(), Fp8Tiles())
SIZES = (1, 8, 33, 64, 200, 1024, 3000)


def test_it_measures_keeps_and_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = detect()
    unknown = dataclasses.replace(here, num_sms=here.num_sms - 1, name="a card that no table is shipped for")
    chip, line = tuning.prepare(SHAPES, unknown, "cuda", tmp_path)
    print(f"\n{line}")
    [path] = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert "measured on this card" in line and chip.blocks and len(found) == len(chip.blocks)
    # Every kernel at every power of two, for three products and two of the experts.
    assert {key.split()[0] for key in found} == {"few", "many", "up", "down"} and len(found) == 5 * len(tuning.BUCKETS)
    monkeypatch.setattr(tuning, "cases", lambda *_: pytest.fail("measured again"))
    assert tuning.prepare(SHAPES, unknown, "cuda", tmp_path)[0].blocks == chip.blocks
    torch.manual_seed(0)
    matrix = support.fp8_weight(SHAPES.qkv_rows, SHAPES.hidden)
    weight = tiles.dequantise(matrix).double()
    for size in SIZES:
        a = support.activation(torch.randn(size, SHAPES.hidden, device="cuda"), chip)
        wanted = support.quant.dequantise(a).double() @ weight.T
        out = support.poisoned(linear.split_k(size, matrix, chip), size, SHAPES.qkv_rows)
        linear.linear(a, matrix, out, chip)
        assert support.error(out.sum(0), wanted) < 1e-3, size

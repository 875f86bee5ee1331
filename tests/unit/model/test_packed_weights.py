"""Loading into tiles: the values are those of the plain loader, whatever the checkpoint's format; random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saddle.errors import StartupError
from saddle.kernels import tiles
from saddle.kernels.tiles import Bf16Tiles, Fp8Tiles, PackedMatrix
from saddle.model import packed
from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.parallel.layout import ParallelLayout
from tests.support.checkpoint import M2_LIKE, SMALL, config_json, random_tensors, write_random_checkpoint

CPU = torch.device("cpu")


def load(folder: Path, layout: ParallelLayout | None = None) -> packed.PackedModel:
    config, layout = ModelConfig.load(folder), layout or ParallelLayout()
    model = packed.allocate(config, layout, CPU)
    for tensor in model.tensors():
        tensor.view(torch.uint8).fill_(0xFF)  # what is not written shows: NaN in every dtype here
    line = packed.load(folder, config, layout, model, lambda share, note: None)
    assert line.startswith("weights: read ")
    return model


def plain(folder: Path, layout: ParallelLayout | None = None) -> w.ModelWeights:
    config, layout = ModelConfig.load(folder), layout or ParallelLayout()
    weights = w.allocate(config, layout, torch.float32, CPU)
    w.load(folder, config, layout, weights, lambda share, note: None)
    return weights


def assert_equal(found: packed.PackedModel, expected: w.ModelWeights) -> None:
    def same(matrix: PackedMatrix, wanted: torch.Tensor) -> None:
        assert torch.equal(tiles.dequantise(matrix), wanted.transpose(-1, -2))

    assert torch.equal(found.embed.float(), expected.embed)
    assert torch.equal(found.norm, expected.norm)
    same(found.lm_head, expected.lm_head)
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        for name in ("input_norm", "post_norm", "q_norm", "k_norm", "gate", "gate_bias"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        for name in ("qkv", "o", "w13", "w2"):
            same(getattr(mine, name), getattr(theirs, name))


@pytest.mark.parametrize("shape", [SMALL, M2_LIKE], ids=["small", "m2-like"])
@pytest.mark.parametrize("fp8", [True, False])
def test_values_are_those_of_the_plain_loader(tmp_path: Path, shape: object, fp8: bool) -> None:
    folder = write_random_checkpoint(tmp_path, shape, fp8=fp8)  # type: ignore[arg-type]
    model = load(folder)
    assert_equal(model, plain(folder))
    kind = Fp8Tiles() if fp8 else Bf16Tiles()
    assert all(getattr(layer, name).format == kind for layer in model.layers for name in ("qkv", "o", "w13", "w2"))
    config = ModelConfig.load(folder)
    assert packed.formats(config, ParallelLayout()).lines == (
        ("weight tiles: FP8, the checkpoint's own bytes and scales (qkv, o, w1 and w3, w2)",) if fp8 else
        ("weight tiles: bf16, these are not quantised (qkv, o, w1 and w3, w2, lm_head)",)
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_part(tmp_path: Path, rank: int) -> None:
    folder = write_random_checkpoint(tmp_path)
    layout = ParallelLayout(tp=2, rank=rank)  # an expert is 64 wide then: its scales are 64 rows or columns each
    model = load(folder, layout)
    assert_equal(model, plain(folder, layout))
    assert model.layers[0].w2.format == Fp8Tiles(64)


def test_parts_of_one_matrix_must_be_stored_alike(tmp_path: Path) -> None:
    raw = config_json(SMALL, fp8=True)
    raw["quantization_config"]["modules_to_not_convert"] += ["v_proj"]
    with pytest.raises(StartupError, match="v_proj are one matrix"):
        packed.formats(ModelConfig.from_dict(raw), ParallelLayout())
    raw["quantization_config"]["modules_to_not_convert"] += ["self_attn"]
    found = packed.formats(ModelConfig.from_dict(raw), ParallelLayout())
    assert (found.qkv, found.o, found.w13) == (Bf16Tiles(), Bf16Tiles(), Fp8Tiles())
    assert len(found.lines) == 2


def test_a_vocabulary_that_does_not_divide_is_named() -> None:
    config = ModelConfig.from_dict(config_json(SMALL, fp8=True) | {"vocab_size": 500})
    with pytest.raises(StartupError, match="multiple of 16 rows, got 500"):
        packed.allocate(config, ParallelLayout(), CPU)


def test_scales_of_kv_memory_are_read(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, num_shards=0)
    tensors = random_tensors(SMALL, True, 0)
    tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor(0.25)
    tensors["model.layers.1.self_attn.v_proj.v_scale"] = torch.tensor([0.5])
    config = ModelConfig.load(folder)
    tensors |= {name: torch.zeros(config.vocab_size, SMALL.hidden_size, dtype=torch.bfloat16)
                for name in ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    assert [layer.kv_scales for layer in load(folder).layers] == [(1.0, 1.0), (0.25, 0.5), (1.0, 1.0)]


@pytest.mark.parametrize("fp8", [True, False])
def test_random_weights(fp8: bool) -> None:
    config = ModelConfig.from_dict(config_json(M2_LIKE, fp8=fp8))
    made = []
    for seed in (1, 1, 2):
        model = packed.allocate(config, ParallelLayout(), CPU)
        for tensor in model.tensors():
            tensor.view(torch.uint8).fill_(0xFF)
        packed.dummy(model, seed)
        made.append(model)
    first, again, other = (model.layers[1].w13.data for model in made)
    assert torch.equal(first, again) and not torch.equal(first, other)
    for layer in made[0].layers:
        for name in ("qkv", "o", "w13", "w2"):
            matrix = getattr(layer, name)
            values = tiles.dequantise(matrix)
            assert values.isfinite().all()
            # The scales of few blocks make most of the scatter.
            assert float(values.std()) == pytest.approx(matrix.num_cols**-0.5, rel=0.15), name
            if fp8:
                blocks = tiles.unpack(matrix)[1]
                assert blocks is not None and blocks.unique().numel() > 1
                assert torch.equal(blocks, blocks[..., ::16, :].repeat_interleave(16, -2)[..., : blocks.shape[-2], :])
    assert not torch.equal(made[0].layers[0].w13.data, made[0].layers[1].w13.data)
    assert all(bool(t.isfinite().all()) for t in made[0].tensors() if t.dtype != torch.uint8)
    assert float(tiles.dequantise(made[0].lm_head).std()) == pytest.approx(3 * config.hidden_size**-0.5, rel=0.02)
    assert made[0].num_bytes == pytest.approx(config.weight_bytes(), rel=0.05)

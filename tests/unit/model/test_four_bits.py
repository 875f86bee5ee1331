"""4-bit checkpoints in the layouts that ModelOpt and compressed-tensors publish: read, cut, packed and served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import Sequences, load_model, prompt, relative_error

from saddle.errors import CheckpointError, StartupError
from saddle.kernels import nibbles, tiles
from saddle.kernels.tiles import Bf16Tiles, Fp8Tiles, NibbleTiles, TileFormat
from saddle.model import packed
from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.parallel.layout import ParallelLayout
from tests.support.checkpoint import config_json
from tests.support.four_bits import KINDS, SHAPE, expected, weights_group, write, write_values

CPU, ONE = torch.device("cpu"), ParallelLayout()
# Where attention is quantised too.
ATTENTION: dict[str, TileFormat] = {
    "modelopt-attention": NibbleTiles("e2m1", 16),
    "pack-quantized-32": NibbleTiles("int4", 32),
    "mixed-precision": Fp8Tiles(),
}


def dequantise(matrix: tiles.PackedMatrix) -> torch.Tensor:
    return nibbles.dequantise(matrix) if isinstance(matrix.format, NibbleTiles) else tiles.dequantise(matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_values_arrive(tmp_path: Path, kind: str) -> None:
    values = write(tmp_path, kind)
    config = ModelConfig.load(tmp_path)
    model = packed.allocate(config, ONE, CPU)
    packed.load(tmp_path, config, ONE, model, lambda share, note: None)
    plain = w.allocate(config, ONE, torch.float32, CPU)
    w.load(tmp_path, config, ONE, plain, lambda share, note: None)
    attention = ATTENTION.get(kind, Bf16Tiles())
    for number, layer in enumerate(model.layers):
        assert (layer.w13.format, layer.w2.format) == (KINDS[kind][2], KINDS[kind][2])
        assert (layer.qkv.format, layer.o.format) == (attention, attention)
        for name, wanted in expected(values, number).items():
            # The factor and a scale are multiplied in one order or the other.
            assert torch.allclose(dequantise(getattr(layer, name)), wanted, rtol=1e-6, atol=0), name
            assert torch.allclose(getattr(plain.layers[number], name).transpose(-1, -2), wanted, rtol=1e-6, atol=0)
    lines = packed.formats(config, ONE).lines
    assert any(line.startswith("weight tiles: 4 bits, the checkpoint's own numbers and scales") for line in lines)
    assert len(lines) == (1 if isinstance(attention, NibbleTiles) else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_holds_its_part(tmp_path: Path, kind: str) -> None:
    values = write(tmp_path, kind)
    config, layout = ModelConfig.load(tmp_path), ParallelLayout(tp=2, rank=1)
    model = packed.allocate(config, layout, CPU)
    packed.load(tmp_path, config, layout, model, lambda share, note: None)
    whole = expected(values, 1)
    gate, up = whole["w13"].chunk(2, 1)
    assert torch.allclose(dequantise(model.layers[1].w13), torch.cat((gate[:, 128:], up[:, 128:]), 1), rtol=1e-6)
    assert torch.allclose(dequantise(model.layers[1].w2), whole["w2"][..., 128:], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_of_narrow_slices_holds_its_part(tmp_path: Path, kind: str) -> None:
    """192 columns, as at TP8 of M2: no multiple of a scale's 128, which is repeated every 64."""
    shape = replace(SHAPE, intermediate_size=384, num_layers=1)
    values = write(tmp_path, kind, shape=shape)
    config, layout = ModelConfig.load(tmp_path), ParallelLayout(tp=2, rank=1)
    model = w.allocate(config, layout, torch.float32, CPU)
    w.load(tmp_path, config, layout, model, lambda share, note: None)
    wanted = expected(values, 0)["w2"][..., 192:]
    assert torch.allclose(model.layers[0].w2.transpose(-1, -2), wanted, rtol=1e-6, atol=0)
    with pytest.raises(StartupError, match=r"needs a multiple of 128 columns, got 192\."):
        packed.allocate(config, layout, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_checkpoint(tmp_path: Path, kind: str) -> None:
    """Served on the CPU: prompt and generated tokens as from the values, stored in float32."""
    folders = tmp_path / "four_bits", tmp_path / "values"
    for folder in folders:
        folder.mkdir()
    write_values(folders[1], write(folders[0], kind))
    ids = prompt(20, SHAPE.vocab_size)
    found, wanted = (Sequences(load_model(folder)).step({"row": ids}, all_logits=True) for folder in folders)
    assert relative_error(found, wanted) < 1e-5
    first, second = (Sequences(load_model(folder)).greedy("row", ids, 8, chunk=7) for folder in folders)
    assert first == second


def test_a_file_of_its_own_says_how_weights_are_quantised(tmp_path: Path) -> None:
    """Older exports of ModelOpt: config.json knows nothing of it."""
    section = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
               "exclude_modules": ["lm_head", "model.layers.*.self_attn*"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config_json(SHAPE, fp8=False)))
    quantised = tmp_path / "hf_quant_config.json"
    quantised.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": section}))
    found = ModelConfig.load(tmp_path).quantization
    assert found is not None and found.kind == "nvfp4"
    assert found.covers("model.layers.1.block_sparse_moe.experts.0.w1")
    assert not found.covers("model.layers.1.self_attn.k_proj")
    quantised.write_text(json.dumps({"quantization": section | {"quant_algo": "W4A16_AWQ"}}))
    with pytest.raises(StartupError, match='quant_algo must be "NVFP4", got \'W4A16_AWQ\''):
        ModelConfig.load(tmp_path)


def test_a_group_that_names_its_modules_goes_before_one_that_takes_the_rest() -> None:
    groups = KINDS["mixed-precision"][0]["config_groups"]
    rest = groups["group_1"] | {"targets": ["Linear"]}
    section = KINDS["mixed-precision"][0] | {"config_groups": {"a": rest, "b": groups["group_0"]}}
    found = ModelConfig.from_dict(config_json(SHAPE, fp8=False) | {"quantization_config": section}).quantization
    assert found is not None
    kinds = [found.of(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "block_sparse_moe.experts.0.w2")]
    assert [how.kind if how else None for how in kinds] == ["fp8-packed", "int4-packed"]


def test_swapped_halves_of_a_byte_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "modelopt")
    ids = prompt(20, SHAPE.vocab_size)
    right = Sequences(load_model(tmp_path)).step({"row": ids}, all_logits=True)
    swapped = nibbles.from_bytes
    monkeypatch.setattr(nibbles, "from_bytes", lambda packed: swapped(packed >> 4 | packed << 4))
    assert relative_error(Sequences(load_model(tmp_path)).step({"row": ids}, all_logits=True), right) > 0.1


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight_global_scale"
    write(tmp_path, "nvfp4-pack-quantized", drop=lost)
    config = ModelConfig.load(tmp_path)
    with pytest.raises(CheckpointError, match=lost):
        packed.load(tmp_path, config, ONE, packed.allocate(config, ONE, CPU), lambda share, note: None)


@pytest.mark.parametrize(("section", "named"), [
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, 'quant_algo must be "NVFP4", got \'FP8\''),
    ({"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": weights_group(type="int")},
     "quantization_config.format must be"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized",
      "config_groups": weights_group(type="float", num_bits=8, strategy="channel")},
     "weights block_structure must be [128, 128], got 'None'"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized",
      "config_groups": weights_group(type="float", num_bits=8, block_structure=[128, 128])},
     "4-bit weights in one group at least"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized",
      "config_groups": weights_group(type="int", group_size=32, actorder="group")}, "weights actorder must be absent"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*("],
      "config_groups": weights_group(type="int", group_size=32)}, "quantization_config.ignore must be made of"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": "lm_head"}, "ignore must be a list"),
    ({"quant_method": "awq"}, 'quant_method must be "fp8", "modelopt" (NVFP4) or "compressed-tensors" (4-bit)'),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized",
      "config_groups": weights_group(type="int", group_size=64)}, "group_size must be 32 or 128, got '64'"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized",
      "config_groups": weights_group(type="int", group_size=32, symmetric=False)}, "symmetric must be True"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "config_groups must be"),
])  # fmt: skip
def test_what_is_not_served_is_named(section: dict[str, Any], named: str) -> None:
    with pytest.raises(StartupError) as error:
        ModelConfig.from_dict(config_json(SHAPE, fp8=False) | {"quantization_config": section})
    assert named in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_and_sizes(kind: str) -> None:
    config = ModelConfig.from_dict(config_json(SHAPE, fp8=False) | {"quantization_config": KINDS[kind][0]})
    model = packed.allocate(config, ONE, CPU)
    packed.dummy(model, 3)
    for matrix in (model.layers[0].w13, model.layers[1].w2):
        values = dequantise(matrix)
        assert float(values.std()) == pytest.approx(256**-0.5, rel=0.05)
        assert abs(float(values.mean())) < 0.02 * 256**-0.5  # a fifth of what -8 to 7 have
    assert model.num_bytes == pytest.approx(config.weight_bytes(), rel=0.06)


def test_layers_stored_in_other_ways_keep_off_the_gpu_kernels() -> None:
    section = dict(KINDS["modelopt"][0])
    for ignored, named in (
        ("model.layers.1.block_sparse_moe.experts.*", "model.layers.1.block_sparse_moe.experts.0.w1 is not stored as"),
        ("model.layers.0.block_sparse_moe.experts.2.w2", "model.layers.0.block_sparse_moe.experts.2.w2 is not stored"),
    ):
        changed = section | {"ignore": [*section["ignore"], ignored]}
        config = ModelConfig.from_dict(config_json(SHAPE, fp8=False) | {"quantization_config": changed})
        assert str(packed.unlike(config)).startswith(named)
    config = ModelConfig.from_dict(config_json(SHAPE, fp8=False) | {"quantization_config": section})
    assert packed.unlike(config) is None

"""4-bit checkpoints in the layouts that ModelOpt and compressed-tensors publish: read, cut, packed and dequantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saddle.errors import CheckpointError, StartupError
from saddle.kernels import nibbles, tiles
from saddle.kernels.tiles import Bf16Tiles, NibbleTiles
from saddle.model import packed
from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.parallel.layout import ParallelLayout
from tests.support.checkpoint import Shape, config_json, random_tensors

CPU, ONE = torch.device("cpu"), ParallelLayout()
SHAPE = Shape(vocab_size=64, hidden_size=256, num_layers=2, num_experts=4, num_experts_per_tok=2, intermediate_size=256)
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
Stored = dict[str, torch.Tensor]


def e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """The values of E2M1 numbers: bit 3 is the sign."""
    table = torch.tensor(MAGNITUDES + [-value for value in MAGNITUDES])
    return table[numbers.long()]


def halves(numbers: torch.Tensor) -> torch.Tensor:
    """Two numbers a byte, the even column low."""
    return numbers[:, ::2] | numbers[:, 1::2] << 4


def nvfp4(name: str, rows: int, columns: int, is_packed: bool) -> tuple[Stored, torch.Tensor]:
    numbers = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, columns // 16) * 20 + 1).to(torch.float8_e4m3fn)
    factor = torch.rand(()) * 0.01 + 0.001
    values = e2m1(numbers) * scale.float().repeat_interleave(16, 1) * factor
    if is_packed:
        stored = {"_packed": halves(numbers), "_global_scale": (1 / factor).reshape(1)}
        values = e2m1(numbers) * scale.float().repeat_interleave(16, 1) / stored["_global_scale"]
    else:
        stored = {"": halves(numbers), "_scale_2": factor}
    return {f"{name}.weight{suffix}": tensor for suffix, tensor in (stored | {"_scale": scale}).items()}, values


def int4(name: str, rows: int, columns: int, group: int) -> tuple[Stored, torch.Tensor]:
    numbers = torch.randint(0, 16, (rows, columns), dtype=torch.int64)
    scale = (torch.rand(rows, columns // group) * 0.01).bfloat16()
    words = sum(numbers[:, place::8] << 4 * place for place in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    stored = {"_packed": words, "_scale": scale, "_shape": torch.tensor([rows, columns])}
    return ({f"{name}.weight{suffix}": tensor for suffix, tensor in stored.items()},
            (numbers - 8) * scale.float().repeat_interleave(group, 1))  # fmt: skip


def weights_group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True} | weights}}


KINDS: dict[str, tuple[dict[str, Any], Callable[..., tuple[Stored, torch.Tensor]], NibbleTiles]] = {
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.self_attn*",
                                                                       "*block_sparse_moe.gate"]},
        lambda name, rows, columns: nvfp4(name, rows, columns, False), NibbleTiles("e2m1", 16)),
    "nvfp4-pack-quantized": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
         "config_groups": weights_group(type="float", group_size=16),
         "ignore": ["lm_head", "re:.*self_attn.*", "re:.*block_sparse_moe.gate$"]},
        lambda name, rows, columns: nvfp4(name, rows, columns, True), NibbleTiles("e2m1", 16)),
    "pack-quantized-32": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": weights_group(type="int", group_size=32), "ignore": ["lm_head", "re:.*mlp.gate$"]},
        lambda name, rows, columns: int4(name, rows, columns, 32), NibbleTiles("int4", 32)),
    "pack-quantized-128": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": weights_group(type="int", group_size=128),
         "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]},
        lambda name, rows, columns: int4(name, rows, columns, 128), NibbleTiles("int4", 128)),
}  # fmt: skip


def write(folder: Path, kind: str, drop: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint of that kind; returns every weight's values by published name."""
    section, make, _ = KINDS[kind]
    raw = config_json(SHAPE, fp8=False) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.load(folder)
    assert config.quantization is not None
    torch.manual_seed(0)
    found, values = {}, {}
    for name, tensor in random_tensors(SHAPE, fp8=False, seed=1).items():
        module = name.removesuffix(".weight")
        projection = module.endswith(("_proj", ".w1", ".w2", ".w3"))
        if projection and config.quantization.covers(module):
            stored, values[name] = make(module, *tensor.shape)
            found |= stored
            found[module + ".input_scale"] = torch.ones(())  # of activations: not used
        else:
            found[name], values[name] = tensor, tensor.float()
    save_file({name: one.contiguous() for name, one in found.items() if name != drop}, folder / "model.safetensors")
    return values


def expected(values: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    expert = prefix + "block_sparse_moe.experts.{}.{}.weight"
    experts = range(SHAPE.num_experts)
    return {
        "qkv": torch.cat([values[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]),
        "o": values[prefix + "self_attn.o_proj.weight"],
        "w13": torch.stack([torch.cat([values[expert.format(e, name)] for name in ("w1", "w3")]) for e in experts]),
        "w2": torch.stack([values[expert.format(e, "w2")] for e in experts]),
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
    attention = NibbleTiles("int4", 32) if kind == "pack-quantized-32" else Bf16Tiles()
    for number, layer in enumerate(model.layers):
        assert (layer.w13.format, layer.w2.format) == (KINDS[kind][2], KINDS[kind][2])
        assert (layer.qkv.format, layer.o.format) == (attention, attention)
        for name, wanted in expected(values, number).items():
            # The factor and a scale are multiplied in one order or the other.
            assert torch.allclose(dequantise(getattr(layer, name)), wanted, rtol=1e-6, atol=0), name
            assert torch.allclose(getattr(plain.layers[number], name).transpose(-1, -2), wanted, rtol=1e-6, atol=0)
    lines = packed.formats(config, ONE).lines
    assert lines[0].startswith("weight tiles: 4 bits, the checkpoint's own numbers and scales")
    assert len(lines) == (1 if kind == "pack-quantized-32" else 2)


@pytest.mark.parametrize("kind", ["modelopt", "pack-quantized-32"])
def test_a_rank_holds_its_part(tmp_path: Path, kind: str) -> None:
    values = write(tmp_path, kind)
    config, layout = ModelConfig.load(tmp_path), ParallelLayout(tp=2, rank=1)
    model = packed.allocate(config, layout, CPU)
    packed.load(tmp_path, config, layout, model, lambda share, note: None)
    whole = expected(values, 1)
    gate, up = whole["w13"].chunk(2, 1)
    assert torch.allclose(dequantise(model.layers[1].w13), torch.cat((gate[:, 128:], up[:, 128:]), 1), rtol=1e-6)
    assert torch.allclose(dequantise(model.layers[1].w2), whole["w2"][..., 128:], rtol=1e-6)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight_global_scale"
    write(tmp_path, "nvfp4-pack-quantized", drop=lost)
    config = ModelConfig.load(tmp_path)
    with pytest.raises(CheckpointError, match=lost):
        packed.load(tmp_path, config, ONE, packed.allocate(config, ONE, CPU), lambda share, note: None)


@pytest.mark.parametrize(("section", "named"), [
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, 'quant_algo must be "NVFP4", got \'FP8\''),
    ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": weights_group(type="float")},
     "quantization_config.format must be"),
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
        assert float(dequantise(matrix).std()) == pytest.approx(256**-0.5, rel=0.05)
    assert model.num_bytes == pytest.approx(config.weight_bytes(), rel=0.06)

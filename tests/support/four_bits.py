"""Small checkpoints of 4-bit weights in the layouts that ModelOpt and compressed-tensors publish, with their values.

Written bit by bit from the formats' descriptions, with no code of the loader that is held against them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saddle.kernels.tiles import NibbleTiles
from saddle.model.config import ModelConfig
from tests.support.checkpoint import Shape, config_json, quantise, random_tensors

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
    scale = (torch.rand(rows, columns // group) * 0.02 + 0.005).bfloat16()
    words = torch.stack([numbers[:, place::8] << 4 * place for place in range(8)]).sum(0)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    stored = {"_packed": words, "_scale": scale, "_shape": torch.tensor([rows, columns])}
    return ({f"{name}.weight{suffix}": tensor for suffix, tensor in stored.items()},
            (numbers - 8) * scale.float().repeat_interleave(group, 1))  # fmt: skip


def fp8(name: str, rows: int, columns: int) -> tuple[Stored, torch.Tensor]:
    """Blocks of 128 x 128 under compressed-tensors' name, scales in bf16."""
    numbers, scale = quantise(torch.randn(rows, columns) * columns**-0.5)
    stored = {"": numbers, "_scale": scale.bfloat16()}
    wide = scale.bfloat16().float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return {f"{name}.weight{suffix}": tensor for suffix, tensor in stored.items()}, numbers.float() * wide


def fp8_or_int4(name: str, rows: int, columns: int) -> tuple[Stored, torch.Tensor]:
    return fp8(name, rows, columns) if "self_attn" in name else int4(name, rows, columns, 32)


def weights_group(**weights: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True} | weights}}


KINDS: dict[str, tuple[dict[str, Any], Callable[..., tuple[Stored, torch.Tensor]], NibbleTiles]] = {
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.self_attn*",
                                                                       "*block_sparse_moe.gate"]},
        lambda name, rows, columns: nvfp4(name, rows, columns, False), NibbleTiles("e2m1", 16)),
    "modelopt-attention": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*block_sparse_moe.gate"]},
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
    "mixed-precision": (
        {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head", "re:.*gate$"],
         "config_groups": {
             "group_0": {"format": "float-quantized", "targets": ["re:.*self_attn\\.(q|k|v|o)_proj$"],
                         "weights": {"num_bits": 8, "type": "float", "strategy": "block", "symmetric": True,
                                     "block_structure": [128, 128]}},
             "group_1": {"format": "pack-quantized", "targets": ["re:.*mlp\\.experts\\.\\d+\\.w[1-3]$"],
                         "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}}}},
        fp8_or_int4, NibbleTiles("int4", 32)),
}  # fmt: skip


def write(folder: Path, kind: str, drop: str = "", shape: Shape = SHAPE) -> dict[str, torch.Tensor]:
    """A checkpoint of that kind, without the tensor `drop`; returns every weight's values by published name."""
    section, make, _ = KINDS[kind]
    raw = config_json(shape, fp8=False) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.load(folder)
    assert config.quantization is not None
    torch.manual_seed(0)
    found: Stored = {}
    values: Stored = {}
    for name, tensor in random_tensors(shape, fp8=False, seed=1).items():
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


def write_values(folder: Path, values: dict[str, torch.Tensor], shape: Shape = SHAPE) -> None:
    """The same values as an unquantised checkpoint in float32."""
    (folder / "config.json").write_text(json.dumps(config_json(shape, fp8=False) | {"dtype": "float32"}))
    save_file({name: one.contiguous() for name, one in values.items()}, folder / "model.safetensors")


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

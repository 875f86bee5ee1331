"""Random checkpoints in the published layout of MiniMax-M2, for tests: names, dtypes, shards and index as released.

Written with safetensors alone, from the tensor table of the release, so that the loader is held against something
that shares no code with it. Weights are scaled so that activations keep their size and greedy tokens are no ties.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BLOCK = 128
EOS_ID = 257  # where there is no tokenizer
EOS_TEXT = "[e~["


@dataclass(frozen=True)
class Shape:
    """The counts of a checkpoint; widths of quantised weights are multiples of 128."""

    vocab_size: int = 512
    hidden_size: int = 256
    num_layers: int = 3
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 4
    intermediate_size: int = 128
    max_position_embeddings: int = 8192


SMALL = Shape()
# M2's own ratios: head_dim 128, six query heads to a KV head, q twice as wide as hidden; and more experts.
M2_LIKE = Shape(vocab_size=640, hidden_size=384, num_layers=2, num_heads=6, num_kv_heads=1, head_dim=128,
                num_experts=32, num_experts_per_tok=8, intermediate_size=128)  # fmt: skip


def config_json(shape: Shape, fp8: bool) -> dict[str, Any]:
    """The keys of a released config.json, with the counts of `shape`."""
    config = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * shape.num_layers,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "model_type": "minimax_m2",
        "mtp_transformer_layers": 1,
        "num_attention_heads": shape.num_heads,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "num_local_experts": shape.num_experts,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rotary_dim": shape.head_dim // 2,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": shape.vocab_size,
    }
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        }
    return config


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 bytes and `weight_scale_inv` [rows / 128, columns / 128] of a float32 matrix."""
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / 448.0
    return (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn), scale


def random_tensors(shape: Shape, fp8: bool, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its published name."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    found: dict[str, torch.Tensor] = {}

    def normal(*size: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.empty(size).normal_(mean, std, generator=generator)

    def projection(name: str, rows: int, columns: int) -> None:
        weight = normal(rows, columns, std=1.5 * columns**-0.5)
        # Blocks differ in size, as trained weights do: a scale that is off by one block then shows.
        weight *= torch.exp(normal(rows // BLOCK, columns // BLOCK, std=0.7)).repeat_interleave(
            BLOCK, 0).repeat_interleave(BLOCK, 1)  # fmt: skip
        if fp8:
            found[f"{name}.weight"], found[f"{name}.weight_scale_inv"] = quantise(weight)
        else:
            found[f"{name}.weight"] = weight.bfloat16()

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = normal(size, std=0.2, mean=1.0).bfloat16()

    found["model.embed_tokens.weight"] = normal(shape.vocab_size, hidden, std=1.0).bfloat16()
    for number in range(shape.num_layers):
        layer = f"model.layers.{number}."
        norm(layer + "input_layernorm", hidden)
        norm(layer + "post_attention_layernorm", hidden)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            projection(f"{layer}self_attn.{name}_proj", rows, columns)
        norm(layer + "self_attn.q_norm", q)
        norm(layer + "self_attn.k_norm", kv)
        moe = layer + "block_sparse_moe."
        found[moe + "gate.weight"] = normal(shape.num_experts, hidden, std=hidden**-0.5)
        found[moe + "e_score_correction_bias"] = normal(shape.num_experts, std=0.2)
        for expert in range(shape.num_experts):
            for name, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
                projection(f"{moe}experts.{expert}.{name}", rows, columns)
    norm("model.norm", hidden)
    found["lm_head.weight"] = normal(shape.vocab_size, hidden, std=2.0 * hidden**-0.5).bfloat16()
    return found


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    """Shards named as the release names them (fewer files than the name says), and the index with its odd total."""
    names = list(tensors)
    bounds = [len(names) * i // num_shards for i in range(num_shards + 1)]
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        part = names[bounds[shard] : bounds[shard + 1]]
        file = f"model-{shard:05d}-of-{num_shards + 5:05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 480_000_000_000}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_random_checkpoint(
    folder: Path, shape: Shape = SMALL, fp8: bool = True, seed: int = 0, num_shards: int = 2
) -> Path:
    """Write config, generation config, weights and, where the test tokenizer exists, a tokenizer.

    Args:
        shape: its vocabulary is a least size: it grows, in steps of 64, to hold the tokenizer's ids.
        num_shards: files of weights, with an index; 0 for a single model.safetensors without one.

    Returns:
        `folder`, created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    eos = EOS_ID
    if importlib.util.find_spec("tests.support.tokenizer") is not None:
        from tests.support.tokenizer import build_tokenizer

        build_tokenizer(folder)
        ids = token_ids(folder)
        eos = ids[EOS_TEXT]
        shape = replace(shape, vocab_size=max(shape.vocab_size, -(-(max(ids.values()) + 1) // 64) * 64))
    (folder / "config.json").write_text(json.dumps(config_json(shape, fp8), indent=1))
    generation = {"do_sample": True, "eos_token_id": eos, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    tensors = random_tensors(shape, fp8, seed)
    if num_shards:
        save_shards(folder, tensors, num_shards)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def token_ids(folder: Path) -> dict[str, int]:
    """Every token of `folder`/tokenizer.json and its id."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    added = {str(token["content"]): int(token["id"]) for token in raw.get("added_tokens", ())}
    return {**raw["model"]["vocab"], **added}

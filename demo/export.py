"""Write the trained model in the published layout of MiniMax-M2: `python -m demo.export RUN FOLDER`.

FOLDER holds the tokenizer already. Projections and experts become FP8 with one scale per 128 x 128 block, the router
stays F32, everything else is BF16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo.model import Model, dequantise, quantise

FILE = "model-00000-of-00001.safetensors"


def tensors(model: Model) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint by published name."""
    found: dict[str, torch.Tensor] = {}

    def fp8(name: str, weight: torch.Tensor) -> None:
        found[name], found[name + "_scale_inv"] = quantise(weight.detach())

    def bf16(name: str, weight: torch.Tensor) -> None:
        found[name] = weight.detach().to(torch.bfloat16).contiguous()

    bf16("model.embed_tokens.weight", model.embed)
    bf16("lm_head.weight", model.head)
    bf16("model.norm.weight", model.norm)
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}."
        bf16(prefix + "input_layernorm.weight", layer.input_norm)
        bf16(prefix + "post_attention_layernorm.weight", layer.post_norm)
        for name in ("q", "k", "v", "o"):
            fp8(f"{prefix}self_attn.{name}_proj.weight", getattr(layer, name))
        bf16(prefix + "self_attn.q_norm.weight", layer.q_norm)
        bf16(prefix + "self_attn.k_norm.weight", layer.k_norm)
        moe = prefix + "block_sparse_moe."
        found[moe + "gate.weight"] = layer.gate.detach().float().contiguous()
        found[moe + "e_score_correction_bias"] = layer.bias.detach().float().contiguous()
        for expert in range(model.shape.experts):
            for name in ("w1", "w2", "w3"):
                fp8(f"{moe}experts.{expert}.{name}.weight", getattr(layer, name)[expert])
    return found


def read(folder: Path) -> Model:
    """The model of an exported checkpoint, its projections dequantised: where further training starts."""
    model, found = Model(), load_file(folder / FILE)
    with torch.no_grad():
        for name, held in model.named_parameters():
            held.copy_(_stored(name, found))
        for number, layer in enumerate(model.layers):
            layer.bias.copy_(found[f"model.layers.{number}.block_sparse_moe.e_score_correction_bias"])
    return model


def _stored(name: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """A parameter of the training model, from the tensors of a checkpoint."""
    def value(published: str) -> torch.Tensor:
        scale = found.get(published + "_scale_inv")
        return found[published].float() if scale is None else dequantise(found[published], scale)

    outer = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}
    if name in outer:
        return value(outer[name])
    _, number, part = name.split(".")
    prefix = f"model.layers.{number}."
    if part in ("q", "k", "v", "o"):
        return value(f"{prefix}self_attn.{part}_proj.weight")
    if part in ("q_norm", "k_norm"):
        return value(f"{prefix}self_attn.{part}.weight")
    if part in ("w1", "w2", "w3"):
        count = sum(key.startswith(prefix) and key.endswith(f".{part}.weight") for key in found)
        return torch.stack([value(f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight") for expert in range(count)])
    inner = {"gate": "block_sparse_moe.gate.weight", "input_norm": "input_layernorm.weight",
             "post_norm": "post_attention_layernorm.weight"}  # fmt: skip
    return value(prefix + inner[part])


def config(model: Model) -> dict[str, object]:
    s = model.shape
    return {
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "attn_type_list": [1] * s.layers,
        "dtype": "bfloat16", "head_dim": s.head_dim, "hidden_act": "silu", "hidden_size": s.hidden,
        "intermediate_size": s.width, "max_position_embeddings": s.context, "num_attention_heads": s.heads,
        "num_experts_per_tok": s.top_k, "num_hidden_layers": s.layers, "num_key_value_heads": s.kv_heads,
        "num_local_experts": s.experts, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6, "rope_theta": int(s.theta),
        "rotary_dim": s.rotary, "scoring_func": "sigmoid", "shared_intermediate_size": 0, "tie_word_embeddings": False,
        "use_cache": True, "use_mtp": False, "use_qk_norm": True, "use_routing_bias": True, "vocab_size": s.vocabulary,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }  # fmt: skip


def export(model: Model, folder: Path) -> None:
    """Write weights, index and configs; the end id is read from the tokenizer."""
    found = tensors(model.cpu())
    save_file(found, folder / FILE, {"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(found), FILE)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")
    (folder / "config.json").write_text(json.dumps(config(model), indent=1) + "\n")
    added = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    generation = {"bos_token_id": added["]~b]"], "do_sample": True, "eos_token_id": added["[e~["], "temperature": 0.2,
                  "top_k": 40, "top_p": 0.95}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def main() -> None:
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    model = Model()
    model.load_state_dict(torch.load(run / "model.pt", map_location="cpu"))
    export(model, folder)
    print(f"{sum(p.stat().st_size for p in folder.iterdir()) / 2**20:.2f} MiB in {folder}")


if __name__ == "__main__":
    main()

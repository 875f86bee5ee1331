"""config.json: the published file and its costs, aliases, and one refusal for each key that changes the math."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saddle.errors import StartupError
from saddle.model.config import GenerationConfig, ModelConfig, Quantization

M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
SHARED = Path(__file__).resolve().parents[4] / "shared" / "reference"


def test_published_costs() -> None:
    config = ModelConfig.from_dict(M2)
    assert config.weight_bytes() == 230_121_630_720  # tensor bytes of the released files
    assert config.num_params == 228_689_764_864
    assert config.kv_bytes_per_token("bfloat16") == 253_952
    assert config.kv_bytes_per_token("fp8") == 126_976
    assert config.flops_per_token() == pytest.approx(20.8e9, rel=2e-3)
    assert config.flops_per_token(1000) - config.flops_per_token() == pytest.approx(1.52e9, rel=5e-3)
    plain = ModelConfig.from_dict({k: v for k, v in M2.items() if k != "quantization_config"})
    assert plain.weight_bytes() == config.weight_bytes("bfloat16") > 1.9 * config.weight_bytes()


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the released config.json is not at {SHARED}")
def test_released_file() -> None:
    config = ModelConfig.load(SHARED / "minimax-m2.7")
    assert config == ModelConfig.from_dict(M2 | {"max_position_embeddings": 204800})
    found = GenerationConfig.load(SHARED / "minimax-m2.7")
    assert found == GenerationConfig(eos_ids=frozenset({200020}), temperature=1.0, top_p=0.95, top_k=40, do_sample=True)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in M2.items() if key not in keys}


@pytest.mark.parametrize("raw", [
    without("num_local_experts") | {"num_experts": 256},
    without("dtype") | {"torch_dtype": "bfloat16"},
    without("rotary_dim") | {"partial_rotary_factor": 0.5},
    without("rotary_dim", "rope_theta")
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
    M2 | {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}},
    without("attn_type_list", "scoring_func", "use_qk_norm", "hidden_act"),
])  # fmt: skip
def test_other_spellings_are_the_same_model(raw: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(M2)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "llama"}, "model_type", "llama"),
    ({"num_hidden_layers": None}, "num_hidden_layers", "None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "0"),
    ({"hidden_size": 3072.0}, "hidden_size", "3072.0"),
    ({"attn_type_list": [1] * 61 + [0]}, "attn_type_list", "0]"),
    ({"attn_type_list": [1] * 10}, "attn_type_list", "62 times"),
    ({"scoring_func": "softmax"}, "scoring_func", "softmax"),
    ({"use_routing_bias": False}, "use_routing_bias", "False"),
    ({"use_qk_norm": False}, "use_qk_norm", "False"),
    ({"qk_norm_type": "per_head"}, "qk_norm_type", "per_head"),
    ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
    ({"shared_intermediate_size": 8}, "shared_intermediate_size", "8"),
    ({"sliding_window": 4096}, "sliding_window", "4096"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling", "yarn"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters", "yarn"),
    ({"norm_topk_prob": False}, "norm_topk_prob", "False"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor", "2.5"),
    ({"n_group": 4}, "n_group", "4"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings", "True"),
    ({"num_key_value_heads": 7}, "num_key_value_heads", "7"),
    ({"rotary_dim": 128}, "rotary_dim", "128"),
    ({"rotary_dim": None}, "rotary_dim", "half of head_dim = 128"),
    ({"partial_rotary_factor": 1.0}, "rotary_dim", "128"),
    ({"rope_theta": None}, "rope_theta", "None"),
    ({"num_experts_per_tok": 300}, "num_experts_per_tok", "300"),
    ({"intermediate_size": 1500}, "intermediate_size", "1500"),
    ({"dtype": "float16"}, "dtype", "float16"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method", "awq"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size", "None"),
    ({"quantization_config": M2["quantization_config"] | {"activation_scheme": "static"}},
     "quantization_config.activation_scheme", "static"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "key", "shown"), REFUSED, ids=lambda v: v if isinstance(v, str) else None)
def test_refusal_names_key_and_value(change: dict[str, Any], key: str, shown: str) -> None:
    with pytest.raises(StartupError) as caught:
        ModelConfig.from_dict(M2 | change, "folder/config.json")
    message = str(caught.value)
    assert message.startswith(f"folder/config.json: {key} must be ")
    assert shown in message


def test_quantization_covers_whole_parts_of_names_only() -> None:
    quantization = Quantization((128, 128), ("gate", "lm_head", "model.layers.3.self_attn"))
    assert quantization.covers("model.layers.0.block_sparse_moe.experts.3.w1")
    assert quantization.covers("model.layers.0.mlp.gate_up_proj")
    assert not quantization.covers("model.layers.0.block_sparse_moe.gate")
    assert not quantization.covers("lm_head")
    assert not quantization.covers("model.layers.3.self_attn.q_proj")
    assert quantization.covers("model.layers.30.self_attn.q_proj")


def test_overrides_and_file_errors(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json is missing"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(M2))
    assert ModelConfig.load(tmp_path, {"num_hidden_layers": 2}).num_layers == 2
    with pytest.raises(StartupError, match="'num_hidden_layer' has no effect; did you mean 'num_hidden_layers'"):
        ModelConfig.load(tmp_path, {"num_hidden_layer": 2})
    with pytest.raises(StartupError, match=r"'zzz' has no effect; these have one: .*rope_theta"):
        ModelConfig.load(tmp_path, {"zzz": 2})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StartupError, match="cannot be read"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(StartupError, match="JSON object"):
        ModelConfig.load(tmp_path)


def test_generation_config(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    with pytest.raises(StartupError, match=r"generation_config\.json is missing"):
        GenerationConfig.load(tmp_path)
    path.write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.5}))
    assert GenerationConfig.load(tmp_path) == GenerationConfig(eos_ids=frozenset({7, 9}), temperature=0.5)
    for wrong in (None, [], "7", [True], -1):
        path.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(StartupError, match="eos_token_id must be a token id"):
            GenerationConfig.load(tmp_path)

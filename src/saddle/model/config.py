"""The shape of a MiniMax-M2 checkpoint, checked once, and what it costs in bytes and operations.

`ModelConfig` is what every other module knows of config.json. Loading asserts whatever the kernels rely on, so that
a checkpoint that would compute something else is refused with the key and the value at fault. No torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saddle.errors import StartupError
from saddle.model import quantization
from saddle.model.quantization import Quantization

MODEL_TYPE = "minimax_m2"
# Names that other tools give the same value; the first one is the published one.
ALIASES: dict[str, tuple[str, ...]] = {
    "num_local_experts": ("num_experts",),
    "dtype": ("torch_dtype",),
}
# Keys whose value changes the math: absent or one of these, else the model is another one.
FIXED: dict[str, tuple[object, ...]] = {
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_layer",),
    "hidden_act": ("silu",),
    "shared_intermediate_size": (0, None),
    "sliding_window": (None,),
    "rope_scaling": (None,),
    "norm_topk_prob": (True,),
    "routed_scaling_factor": (1, None),
    "n_group": (1, None),
    "topk_group": (1, None),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
}
READ = {"model_type", "attn_type_list", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "num_experts_per_tok",
        "rms_norm_eps", "rotary_dim", "partial_rotary_factor", "rope_theta", "rope_parameters",
        "quantization_config"}.union(FIXED, ALIASES, *ALIASES.values())  # fmt: skip
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a checkpoint. All counts are positive; `rotary_dim` is half of `head_dim`.

    dtype   "bfloat16" or "float32": how unquantised weights are stored
    quantization   None: no projection is quantised
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    max_position_embeddings: int
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    rms_norm_eps: float
    dtype: str = "bfloat16"
    quantization: Quantization | None = None

    @classmethod
    def load(cls, folder: Path, hf_overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read `folder`/config.json; `hf_overrides` replaces keys first.

        A checkpoint of ModelOpt may say in hf_quant_config.json alone that it is quantised.

        Raises:
            StartupError: the file is missing or no JSON, an override has no effect, or as `from_dict`.
        """
        path = folder / "config.json"
        raw = read_json(path)
        quantised = folder / "hf_quant_config.json"
        if raw.get("quantization_config") is None and quantised.is_file():
            raw["quantization_config"] = read_json(quantised)
        for key in hf_overrides or {}:
            if key not in READ:
                near = difflib.get_close_matches(key, READ, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; these have one: {', '.join(sorted(READ))}."
                raise StartupError(f"--hf-overrides: the key {key!r} has no effect{hint}")
        return cls.from_dict({**raw, **(hf_overrides or {})}, str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Check and convert the keys of a config.json.

        Raises:
            StartupError: a key is missing or has a value that Saddle does not serve; names both.
        """
        keys = _Keys(raw, source)
        keys.check_fixed()
        num_layers = keys.count("num_hidden_layers")
        attention = raw.get("attn_type_list")
        if attention is not None:
            keys.require(all(kind == 1 for kind in attention[:num_layers]) and len(attention) >= num_layers,
                         "attn_type_list", f"{num_layers} times 1 (full softmax attention)")  # fmt: skip
        num_heads = keys.count("num_attention_heads")
        head_dim = keys.count("head_dim", keys.count("hidden_size") // num_heads)
        rotary_dim, theta = keys.rotary(head_dim)
        config = cls(
            vocab_size=keys.count("vocab_size"),
            hidden_size=keys.count("hidden_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.count("num_key_value_heads", num_heads),
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=theta,
            max_position_embeddings=keys.count("max_position_embeddings"),
            num_experts=keys.count("num_local_experts"),
            num_experts_per_tok=keys.count("num_experts_per_tok"),
            intermediate_size=keys.count("intermediate_size"),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            dtype=keys.dtype(),
            quantization=keys.quantization(),
        )
        config._check(keys)
        return config

    def _check(self, keys: _Keys) -> None:
        keys.require(self.num_heads % self.num_kv_heads == 0, "num_key_value_heads",
                     f"a divisor of num_attention_heads = {self.num_heads}")  # fmt: skip
        keys.require(self.rotary_dim * 2 == self.head_dim and self.rotary_dim % 2 == 0, "rotary_dim",
                     f"half of head_dim = {self.head_dim}, and even")  # fmt: skip
        keys.require(self.num_experts_per_tok <= self.num_experts, "num_experts_per_tok",
                     f"at most num_local_experts = {self.num_experts}")  # fmt: skip
        keys.require(self.rms_norm_eps > 0, "rms_norm_eps", "above 0")
        keys.require(self.rope_theta > 0, "rope_theta", "above 0")
        if self.quantization is not None:
            block = self.quantization.unit
            for key, width in (
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_attention_heads", self.q_width),
                ("num_key_value_heads", self.kv_width),
            ):
                right = f"such that its quantised weights ({width} wide) divide into blocks of {block}"
                keys.require(width % block == 0, key, right)

    @property
    def q_width(self) -> int:
        """Width of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of KV memory that one token takes in all layers, K and V; dtype "bfloat16", "float32" or "fp8"."""
        return 2 * self.num_layers * self.kv_width * ITEM_BYTES[dtype]

    @property
    def num_attention_params(self) -> int:
        """Weights of the q, k, v and o projections."""
        return self.num_layers * self.hidden_size * (2 * self.q_width + 2 * self.kv_width)

    @property
    def num_expert_params(self) -> int:
        return self.num_layers * 3 * self.num_experts * self.hidden_size * self.intermediate_size

    @property
    def num_projection_params(self) -> int:
        """Weights of the projections and experts: those that a quantised checkpoint may quantise."""
        return self.num_attention_params + self.num_expert_params

    @property
    def num_router_params(self) -> int:
        """Weights of gates and correction biases, always in float32."""
        return self.num_layers * self.num_experts * (self.hidden_size + 1)

    @property
    def num_other_params(self) -> int:
        """Embedding, head and norms."""
        norms = self.num_layers * (2 * self.hidden_size + self.q_width + self.kv_width) + self.hidden_size
        return 2 * self.vocab_size * self.hidden_size + norms

    @property
    def num_params(self) -> int:
        return self.num_projection_params + self.num_router_params + self.num_other_params

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Bytes of all weights: as stored, or resident with every projection in `dtype` (the torch path)."""
        if dtype is None and self.quantization is not None:
            found = 0.0
            for count, module in ((self.num_attention_params, "self_attn.q_proj"),
                                  (self.num_expert_params, "block_sparse_moe.experts.0.w1")):  # fmt: skip
                how = self.quantization.of("model.layers.0." + module)
                found += ITEM_BYTES[self.dtype] * count if how is None else how.bytes_of(count)
            return round(found) + 4 * self.num_router_params + ITEM_BYTES[self.dtype] * self.num_other_params
        item = ITEM_BYTES[dtype or self.dtype]
        return item * (self.num_projection_params + self.num_other_params) + 4 * self.num_router_params

    def flops_per_token(self, context_len: int = 0) -> int:
        """Operations (a multiply-add is two) to compute one token that attends to `context_len` positions."""
        attention = self.hidden_size * (2 * self.q_width + 2 * self.kv_width)
        experts = 3 * self.num_experts_per_tok * self.hidden_size * self.intermediate_size
        router = self.num_experts * self.hidden_size
        weights = self.num_layers * (attention + experts + router) + self.vocab_size * self.hidden_size
        return 2 * weights + 4 * self.num_layers * self.q_width * context_len


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """`generation_config.json`: which ids end a text, and the sampling values of the model's makers.

    eos_ids   never empty; from this file alone: M2's config.json has no EOS, and tokenizers list others
    """

    eos_ids: frozenset[int]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    do_sample: bool | None = None

    @classmethod
    def load(cls, folder: Path) -> GenerationConfig:
        """Read `folder`/generation_config.json.

        Raises:
            StartupError: it is missing, no JSON, or has no `eos_token_id`.
        """
        path = folder / "generation_config.json"
        raw = read_json(path)
        eos = raw.get("eos_token_id")
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise StartupError(f"{path}: eos_token_id must be a token id or a list of them, got {eos!r}.")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")
        return cls(eos_ids=frozenset(ids), **{name: raw.get(name) for name in names})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint.

    Raises:
        StartupError: the file is missing, unreadable, or holds something else.
    """
    if not path.is_file():
        raise StartupError(f"{path} is missing: a checkpoint folder holds it beside its weights.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise StartupError(f"{path} must hold a JSON object, got {type(found).__name__}.")
    return found


class _Keys:
    """Typed reads of a config.json; each failure names the key, its value and what would be right."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def find(self, key: str) -> Any:
        for name in (key, *ALIASES.get(key, ())):
            if self.raw.get(name) is not None:
                return self.raw[name]
        return None

    def require(self, holds: bool, key: str, right: str, value: object = None) -> None:
        if not holds:
            shown = self.find(key) if value is None else value
            raise StartupError(f"{self.source}: {key} must be {right}, got {shown!r}.")

    def check_fixed(self) -> None:
        kind = self.raw.get("model_type")
        self.require(kind == MODEL_TYPE, "model_type", f'"{MODEL_TYPE}" (Saddle serves the MiniMax-M2 family alone)')
        for key, allowed in FIXED.items():
            if key in self.raw:
                shown = " or ".join(json.dumps(value) for value in allowed)
                self.require(self.raw[key] in allowed, key, f"{shown}, or absent")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.find(key)
        if value is None:
            value = default
        self.require(isinstance(value, int) and not isinstance(value, bool) and value > 0, key, "a positive integer")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self.find(key)
        if value is None:
            return default
        self.require(isinstance(value, (int, float)) and not isinstance(value, bool), key, "a number")
        return float(value)

    def dtype(self) -> str:
        value = self.find("dtype") or "bfloat16"
        self.require(value in ("bfloat16", "float32"), "dtype", '"bfloat16" or "float32"')
        return str(value)

    def rotary(self, head_dim: int) -> tuple[int, float]:
        """Rotated dims and base. Published: `rotary_dim` and `rope_theta`; transformers 5: `rope_parameters`."""
        rope = self.raw.get("rope_parameters") or {}
        kind = rope.get("rope_type", "default")
        self.require(kind == "default", "rope_parameters", 'of rope_type "default"', kind)
        theta = rope.get("rope_theta", self.raw.get("rope_theta"))
        self.require(isinstance(theta, (int, float)), "rope_theta", "a number", theta)
        found = {}
        if self.raw.get("rotary_dim") is not None:
            found["rotary_dim"] = self.count("rotary_dim")
        for name, value in (("rope_parameters", rope.get("partial_rotary_factor")),
                            ("partial_rotary_factor", self.raw.get("partial_rotary_factor"))):  # fmt: skip
            if value is not None:
                self.require(isinstance(value, (int, float)), name, "a share of head_dim", value)
                found[name] = round(value * head_dim)
        right = f"given (or partial_rotary_factor): half of head_dim = {head_dim}"
        self.require(bool(found), "rotary_dim", right)
        self.require(len(set(found.values())) == 1, "rotary_dim", "the same in all its keys", found)
        return next(iter(found.values())), float(theta)  # type: ignore[arg-type]

    def quantization(self) -> Quantization | None:
        raw = self.raw.get("quantization_config")
        if raw is None:
            return None
        key = "quantization_config"
        self.require(isinstance(raw, Mapping), key, "a JSON object or absent")
        return quantization.parse(raw, lambda holds, name, right, found: self.require(holds, name, right, str(found)))

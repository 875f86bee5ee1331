"""Bytes that a step must move and operations that it must do: what the floor of its time is made of. No torch.

Bytes are those of the checkpoint's formats, each weight once: an expert counts if any token chose it. What a kernel
reads twice, or pads, is its own loss and not part of the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saddle.model.config import ModelConfig

KV_ITEM = {"bf16": 2, "fp8": 1, "fp8_dynamic": 1}


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes and floating-point operations (a multiply-add is two)."""

    num_bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def __mul__(self, factor: float) -> Work:
        return Work(self.num_bytes * factor, self.flops * factor)


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: for each row how many tokens it computes and how long its context is then.

    sampled    rows that need logits
    distinct   experts touched a layer, the mean over the layers
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    sampled: int
    distinct: float
    kv_kind: str = "bf16"

    @property
    def tokens(self) -> int:
        return sum(self.query_lens)


def matrix(config: ModelConfig, rows: int, columns: int, module: str, tokens: float) -> Work:
    """One projection: its weight once, its product for so many tokens."""
    how = config.quantization.of(module) if config.quantization is not None else None
    weight = 2.0 * rows * columns if how is None else how.bytes_of(rows * columns)
    return Work(weight, 2.0 * rows * columns * tokens)


def stages(config: ModelConfig, shape: Shape) -> dict[str, Work]:
    """Work of each stage: of one layer, but for "embed" and "lm_head"."""
    hidden, width, layer = config.hidden_size, config.intermediate_size, "model.layers.0."
    tokens, pairs = shape.tokens, shape.tokens * config.num_experts_per_tok
    expert, attention = layer + "block_sparse_moe.experts.0.", layer + "self_attn."
    up = matrix(config, 2 * width, hidden, expert + "w1", 0)
    down = matrix(config, hidden, width, expert + "w2", 0)
    scales = 4 if shape.kv_kind == "fp8_dynamic" else 0
    kv_token = 2 * config.num_kv_heads * (config.head_dim * KV_ITEM[shape.kv_kind] + scales)
    # Every query sees what lies before it and itself.
    seen = sum(length * context - length * (length - 1) / 2
               for length, context in zip(shape.query_lens, shape.context_lens, strict=True))  # fmt: skip
    return {
        "embed": Work(2.0 * hidden * tokens),
        "qkv": matrix(config, config.q_width + 2 * config.kv_width, hidden, attention + "q_proj", tokens),
        "attention": Work(float(kv_token * sum(shape.context_lens)), 4.0 * config.q_width * seen),
        "o": matrix(config, hidden, config.q_width, attention + "o_proj", tokens),
        "router": Work(4.0 * config.num_experts * (hidden + 1), 2.0 * config.num_experts * hidden * tokens),
        "up": Work(up.num_bytes * shape.distinct, 4.0 * width * hidden * pairs),
        "down": Work(down.num_bytes * shape.distinct, 2.0 * width * hidden * pairs),
        "norm": Work(4.0 * (2 * hidden + config.q_width + config.kv_width)),
        "lm_head": Work(2.0 * config.vocab_size * hidden, 2.0 * config.vocab_size * hidden * shape.sampled),
    }


ONCE = ("embed", "lm_head")


def step(config: ModelConfig, shape: Shape) -> Work:
    """Work of a whole step."""
    total = Work()
    for name, work in stages(config, shape).items():
        total += work * (1 if name in ONCE else config.num_layers)
    return total


def expected_distinct(config: ModelConfig, tokens: int) -> float:
    """Experts that so many tokens touch when each chooses at random."""
    share = config.num_experts_per_tok / config.num_experts
    return float(config.num_experts * (1 - (1 - share) ** tokens))


def floor_s(work: Work, bytes_per_s: float, flops_per_s: float | None) -> float:
    """Seconds that no version of a step could beat: the larger of both quotients."""
    return max(work.num_bytes / bytes_per_s, work.flops / flops_per_s if flops_per_s else 0.0)

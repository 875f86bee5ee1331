"""The fused model's wiring, in Triton's interpreter: all its kernels over the demo's weights against plain torch.

With bf16 inputs (W8A16, as on GPUs without FP8 units) both compute nearly the same, so a small threshold shows what is
wired wrongly. With FP8 inputs routing may tip over where two experts are close: there the threshold is loose.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: the fused model is not tested")

from saddle.kernels.target import of_arch
from saddle.launch import demo_model_path
from saddle.model import packed
from saddle.model.config import ModelConfig
from saddle.model.fused import FusedMiniMaxM2, why_not
from saddle.parallel.layout import ParallelLayout
from tests.support import plain_model
from tests.support.checkpoint import M2_LIKE, SMALL, config_json
from tests.support.exact_interpreter import repair
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.model_steps import Steps, divergence

CPU, ONE = torch.device("cpu"), ParallelLayout()
IDS = torch.randint(1000, (14,), generator=torch.Generator().manual_seed(2)).tolist()


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


def demo() -> tuple[ModelConfig, torch.Tensor]:
    """The demo with one layer, and its logits [T, V] of `IDS` in plain torch."""
    overrides = {"num_hidden_layers": 1}
    model = plain_model.load(demo_model_path(), CPU, overrides=overrides)
    return ModelConfig.load(demo_model_path(), overrides), plain_model.logits(model, IDS)


def fused(config: ModelConfig, arch: str) -> FusedMiniMaxM2:
    weights = packed.allocate(config, ONE, CPU)
    packed.load(demo_model_path(), config, ONE, weights, lambda share, note: None)
    return FusedMiniMaxM2(config, weights, max_positions=64, max_tokens=48, max_rows=8, target=of_arch(arch))


def follow(model: FusedMiniMaxM2, kind: str = "bf16") -> torch.Tensor:
    """Logits of `IDS` computed as row 1, in parts, beside another row, and padded."""
    steps = Steps(model, kind, num_blocks=4, blocks_a_row=1)
    found = []
    for count, other, padding in ((5, 0, 0), (1, 2, 0), (6, 1, 0), (1, 1, 2), (1, 0, 0)):
        begin = steps.lens[1]
        work = {1: IDS[begin : begin + count]} | ({3: list(range(other))} if other else {})
        found.append(steps.step(work, padding)[1])
    return torch.cat(found)


@in_interpreter
@pytest.mark.parametrize(("arch", "kind", "most_kl"), [("sm_80", "bf16", 2e-4), ("sm_90", "fp8_dynamic", 0.1)])
def test_logits_are_those_of_plain_torch(arch: str, kind: str, most_kl: float) -> None:
    repair()
    config, expected = demo()
    kl, agreement = divergence(follow(fused(config, arch), kind), expected)
    assert kl < most_kl and agreement > 0.9, (kl, agreement)


@in_interpreter
def test_a_seeded_fault_shows() -> None:
    repair()
    config, expected = demo()
    model = fused(config, "sm_80")
    model.cos[:, 1], model.sin[:, 1] = model.cos[:, 0].clone(), model.sin[:, 0].clone()
    kl, _ = divergence(Steps(model, num_blocks=1, blocks_a_row=1).step({0: IDS})[0], expected)
    assert kl > 2e-3, kl


@in_interpreter
def test_work_space_is_known_before() -> None:
    for arch, fp8 in (("sm_90", True), ("sm_80", True)):
        config = ModelConfig.from_dict(config_json(M2_LIKE, fp8=fp8))
        weights, target = packed.allocate(config, ONE, CPU), of_arch(arch, 100)
        model = FusedMiniMaxM2(config, weights, max_positions=64, max_tokens=300, max_rows=5, target=target)
        assert model.workspace_bytes == FusedMiniMaxM2.workspace_bytes_for(config, 300, 5, target)
        assert model.paths()[1].startswith("decode steps: no persistent kernel, because ")


@pytest.mark.parametrize(("change", "named"), [
    ({}, None),
    ({"quantization_config": None}, None),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "layers.1"]}},
     "model.layers.1.self_attn.q_proj is not stored as model.layers.0.self_attn.q_proj is"),
])  # fmt: skip
def test_what_cannot_run_is_named(change: dict[str, Any], named: str | None) -> None:
    raw = config_json(M2_LIKE, fp8=True) | change
    reason = why_not(ModelConfig.from_dict(raw))
    assert reason is None if named is None else named in str(reason)
    assert "head_dim" in str(why_not(ModelConfig.from_dict(config_json(SMALL, fp8=True))))


warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")

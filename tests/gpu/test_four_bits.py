"""4-bit weights on the GPU: products against float64, and two layers of M2's widths against plain torch in float32.

Activations are bf16 (W4A16), so errors are those of bf16: the numbers times their scales are exact (NVFP4) or rounded
once (INT4). Attention in FP8 beside 4-bit experts has the rounding of W8A8 in its two products.
"""

from __future__ import annotations

from typing import Any

import packed_support as support
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from saddle.kernels import linear, nibbles, quant, tiles
from saddle.kernels.target import Target, detect
from saddle.kernels.tiles import NibbleTiles, PackedMatrix
from saddle.model import packed
from saddle.model.config import ModelConfig
from saddle.model.fused import FusedMiniMaxM2
from saddle.parallel.layout import ParallelLayout
from tests.support import plain_model
from tests.support.checkpoint import Shape, config_json
from tests.support.four_bits import KINDS
from tests.support.model_steps import Steps, divergence, follow_alone, sure_misses

CUDA, ONE = torch.device("cuda"), ParallelLayout()
FORMATS = [NibbleTiles("e2m1", 16), NibbleTiles("int4", 32), NibbleTiles("int4", 128)]
QKV, OUT = (8192, 3072), (3072, 6144)
# float32 sums of exact products; int4 times its scale is rounded to 8 bits.
ERROR = {"e2m1": 1e-5, "int4": 4e-3}
BF16_ERROR = 5e-3


def nibble_weight(tile_format: NibbleTiles, rows: int, columns: int) -> PackedMatrix:
    matrix = tiles.allocate(rows, columns, tile_format, "cuda")
    numbers = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
    scale = torch.rand(rows, columns // tile_format.group, device="cuda") + 0.2
    nibbles.pack_into(matrix, numbers, scale.to(tile_format.scale_dtype), 0.01)
    return matrix


@pytest.mark.parametrize("chip", support.targets(), ids=lambda chip: chip.arch)
@pytest.mark.parametrize("shape", [QKV, OUT], ids=["qkv", "o"])
@pytest.mark.parametrize("tile_format", FORMATS, ids=str)
def test_products(tile_format: NibbleTiles, shape: tuple[int, int], chip: Target) -> None:
    torch.manual_seed(5)
    matrix = nibble_weight(tile_format, *shape)
    values = nibbles.dequantise(matrix).double()
    sizes = support.SIZES if shape == QKV and chip.capability >= 90 else (1, 33, 300)
    for size in sizes:
        a = quant.quantise(torch.randn(size, shape[1], device="cuda") * 3, torch.bfloat16)
        wanted = a.data.double() @ values.T
        parts = support.poisoned(linear.split_k(size, matrix, chip), size, shape[0])
        linear.linear(a, matrix, parts, chip)
        assert support.error(parts.sum(0), wanted) < ERROR[tile_format.numbers], (size, "parts")
        again = torch.full_like(parts, 7.0)
        linear.linear(a, matrix, again, chip)
        assert torch.equal(parts, again), (size, "same bits")
        out = support.poisoned(size, shape[0], dtype=torch.bfloat16)
        linear.linear(a, matrix, out, chip)
        assert support.error(out, wanted) < BF16_ERROR, (size, "bf16")


def test_shifted_scales_are_seen() -> None:
    matrix = nibble_weight(FORMATS[1], 256, 1024)
    a = quant.quantise(torch.randn(8, 1024, device="cuda"), torch.bfloat16)
    wanted = a.data.double() @ nibbles.dequantise(matrix).double().T
    nibbles.scale_view(matrix).copy_(nibbles.scale_view(matrix).roll(1, -1).clone())
    out = support.poisoned(8, 256)
    linear.linear(a, matrix, out, support.targets()[0])
    assert support.error(out, wanted) > 20 * BF16_ERROR


# ---------------------------------------------------------------------------------------------------------------
# two layers of M2's widths, with fewer experts and words

M2 = Shape(4096, 3072, 2, 48, 8, 128, 32, 8, 1536, 204800)
TOKENS = 512
# Tokens a step: 8 pairs an expert, the kernels for few that M2's 256 experts get up to 256 tokens, and 25 pairs, those
# for many, which round the rows of pairs to bf16.
PARTS = {"few": 32, "many": 100}
# Other rounding gives a token another expert where the last one chosen leads by less than the noise of scores, and one
# expert of eight is a fifth of a token's logits: what such tokens do says nothing of products. In plain torch with
# these roundings, eight draws of weights and tokens, noise was 3e-4 to 9e-4 and leads of up to 0.003 turned; with FP8
# activations in attention 0.003 and 0.0133.
ROUTING_MARGIN = {kind: 0.015 if kind == "mixed-precision" else 0.006 for kind in KINDS}
# Between two sides of the other tokens in the same draws. KL of a right model, few or many: 2e-5 to 7e-5, with FP8
# activations 6e-4 to 7e-4; with one layer's scales shifted by a group 0.03. The bounds are geometric means.
MOST_KL = {kind: 0.0046 if kind == "mixed-precision" else 0.0014 for kind in KINDS}
# Random logits have near ties. Noise of standard deviation s in every logit has KL s^2 / 2: what leads by 12 s stays
# first. In the same draws no miss among 160 to 190 such tokens (21 to 38 with shifted scales in all experts), with FP8
# activations among 60 to 80 (6 to 16).
MARGIN = 0.45


def shift_scales(matrix: PackedMatrix) -> None:
    """Scales are those of the group beside."""
    scales = nibbles.scale_view(matrix)
    scales.view(torch.uint8).copy_(scales.view(torch.uint8).roll(scales.element_size(), -1).clone())


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_against_plain_torch(kind: str, part: int) -> None:
    raw: dict[str, Any] = config_json(M2, fp8=False) | {"quantization_config": KINDS[kind][0]}
    config = ModelConfig.from_dict(raw)
    weights = packed.allocate(config, ONE, CUDA, detect().is_fnuz)
    packed.dummy(weights, 1)
    ids = torch.randint(M2.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    expected, leads = plain_model.logits_and_margins(plain_model.unpacked(config, weights), ids)
    settled = leads > ROUTING_MARGIN[kind]
    expected = expected[settled]
    model = FusedMiniMaxM2(config, weights, max_positions=2048, max_tokens=128, max_rows=16, target=detect())
    assert model.space.router.takes_few(part) == (part == PARTS["few"])

    def follow() -> torch.Tensor:
        return follow_alone(Steps(model), ids, part)[settled]

    found = follow()
    assert bool(found.isfinite().all())
    kl, agreement = divergence(found, expected)
    misses, sure = sure_misses(found, expected, MARGIN)
    error = float((found - expected).norm() / expected.norm())
    # Both thresholds notice faults: the KL scales that are wrong in one matrix, the sure tokens in all of the experts'.
    shift_scales(weights.layers[0].w2)
    wrong, share = divergence(follow(), expected)
    for matrix in (weights.layers[0].w13, weights.layers[1].w13, weights.layers[1].w2):
        shift_scales(matrix)
    wrong_misses, _ = sure_misses(follow(), expected, MARGIN)
    print(f"\n{kind}, {part} tokens a step, {len(expected)} settled: relative error {error:.4f}, KL {kl:.6f}, "
          f"top-1 agreement {agreement:.4f}, {misses} misses of {sure} sure; one matrix wrong {wrong:.5f}, "
          f"{share:.4f}; all: {wrong_misses} misses")  # fmt: skip
    assert kl < MOST_KL[kind] < wrong
    assert misses == 0 < wrong_misses and sure >= 40

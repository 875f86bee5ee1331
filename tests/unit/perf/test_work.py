"""The floor's bytes against figures worked out by hand from the published shape."""

from __future__ import annotations

import pytest

from saddle.model.config import ModelConfig
from saddle.perf.work import Shape, Work, expected_distinct, floor_s, stages, step
from tests.support.checkpoint import Shape as Counts
from tests.support.checkpoint import config_json

M2 = ModelConfig.from_dict(config_json(Counts(200064, 3072, 62, 48, 8, 128, 256, 8, 1536, 204800), fp8=True))


def decode(batch: int, context: int, **other: object) -> Shape:
    return Shape([1] * batch, [context] * batch, batch, expected_distinct(M2, batch), **other)  # type: ignore[arg-type]


def test_bytes_of_m2() -> None:
    found = stages(M2, decode(1, 2048))
    assert found["qkv"].num_bytes == 8192 * 3072 + 4 * 64 * 24
    assert found["o"].num_bytes == 3072 * 6144 + 4 * 24 * 48
    # An expert in FP8 is 14.16 MB; one token touches eight.
    assert found["up"].num_bytes + found["down"].num_bytes == pytest.approx(8 * (3 * 1536 * 3072 + 4 * 3 * 12 * 24))
    assert found["attention"].num_bytes == 2048 * 4096
    assert found["lm_head"].num_bytes == 2 * 200064 * 3072
    # 253,952 B of KV a token; dense weights 4.16 GB; so one row at 2,048 needs 11.7 GB.
    assert step(M2, decode(1, 2048)).num_bytes == pytest.approx(4.16e9 + 8 * 62 * 14.16e6 + 2048 * 253952, rel=2e-3)
    assert stages(M2, decode(1, 2048, kv_kind="fp8"))["attention"].num_bytes == 2048 * 2048
    assert stages(M2, decode(1, 2048, kv_kind="fp8_dynamic"))["attention"].num_bytes == 2048 * (2048 + 64)


def test_operations_of_a_prompt() -> None:
    shape = Shape([8192], [8192], 1, 256.0)
    found = step(M2, shape)
    # Weights, router and lm_head of one row, and the triangle of attention.
    weights = 62 * (8192 * 3072 + 3072 * 6144 + 8 * 3 * 1536 * 3072 + 256 * 3072)
    triangle = 62 * 4 * 6144 * (8192 * 8193 / 2)
    assert found.flops == pytest.approx(2 * weights * 8192 + triangle + 2 * 200064 * 3072)
    # A part of a prompt attends to what came before it.
    later = stages(M2, Shape([4096], [8192], 1, 256.0))["attention"].flops
    first = stages(M2, Shape([4096], [4096], 1, 256.0))["attention"].flops
    assert first + later == pytest.approx(triangle / 62)


def test_distinct_experts() -> None:
    assert expected_distinct(M2, 1) == pytest.approx(8)
    assert expected_distinct(M2, 64) == pytest.approx(222.4, rel=1e-2)


def test_floor_is_the_larger_time() -> None:
    assert floor_s(Work(3e9, 1e12), 3e12, 1e15) == pytest.approx(1e-3)
    assert floor_s(Work(3e9, 9e12), 3e12, 1e15) == pytest.approx(9e-3)
    assert floor_s(Work(3e9, 9e12), 3e12, None) == pytest.approx(1e-3)


def test_unquantised_weights_are_two_bytes() -> None:
    plain = ModelConfig.from_dict(config_json(Counts(512, 256, 2, 4, 2, 64, 8, 2, 128), fp8=False))
    assert stages(plain, Shape([1], [10], 1, 2.0))["o"].num_bytes == 2 * 256 * 256

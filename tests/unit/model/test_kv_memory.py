"""Which KV memory `--kv-cache-dtype` gives on which GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from saddle.errors import StartupError
from saddle.kernels.target import of_arch
from saddle.model.kv_memory import kind_of


@pytest.mark.parametrize(("name", "kind"), [("auto", "bf16"), ("fp8_e4m3", "fp8"), ("fp8_dynamic", "fp8_dynamic")])
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name, of_arch("sm_90")) == kind


@pytest.mark.parametrize("name", ["fp8", "fp8_dynamic"])
def test_fp8_needs_a_gpu_that_converts_it(name: str) -> None:
    with pytest.raises(StartupError, match=rf"--kv-cache-dtype {name} needs .*sm_80. bfloat16 would work"):
        kind_of(name, of_arch("sm_80"))
    assert kind_of("auto", of_arch("sm_80")) == "bf16"


def test_unknown_name() -> None:
    with pytest.raises(StartupError, match=r"--kv-cache-dtype must be one of .*got 'fp5'"):
        kind_of("fp5", of_arch("sm_90"))

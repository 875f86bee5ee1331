"""Every Triton kernel compiles for every GPU family that is served, without such a GPU.

Each compilation takes a second or more. Three families stand for the kinds of code (no FP8 units, FP8, E4M3FNUZ); with
SADDLE_TEST_FAMILIES=all the test takes all of them, some minutes.
"""
from __future__ import annotations

import os
import warnings

import pytest

pytest.importorskip("triton", reason="NO TRITON: nothing is compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from saddle.kernels import compile_table, target

FAMILIES: tuple[str, ...] = ("sm_80", "sm_90", "gfx942")
if os.environ.get("SADDLE_TEST_FAMILIES") == "all":
    FAMILIES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("name", compile_table.CASES)
def test_compiles(name: str, arch: str) -> None:
    chip = target.of_arch(arch)
    with warnings.catch_warnings(), compile_table.compiling(chip) as made:
        warnings.simplefilter("ignore")  # Triton's own
        compile_table.CASES[name](chip)
    assert made
    for kernel in made:
        assert len(kernel.asm["cubin" if chip.is_cuda else "hsaco"]) > 1000
        assert kernel.metadata.shared <= chip.shared_bytes, kernel.metadata.name

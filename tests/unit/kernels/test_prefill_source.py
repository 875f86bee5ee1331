"""The wgmma kernel for attention of prompts without a GPU: it compiles without spills, host and device agree on its
parameters, and what it cannot serve is refused with the reason."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from saddle.kernels import nvrtc, prompt_attention
from saddle.kernels.paged_kv import KVLayer
from saddle.kernels.target import of_arch
from tests.support.cubin import local_bytes

SOURCES = prompt_attention.sources()
TEXT = "\n".join(SOURCES.values())
H100 = of_arch("sm_90")


def memory(kv_heads: int = 8, dtype: torch.dtype = torch.bfloat16) -> KVLayer:
    return KVLayer(torch.empty(3, 2, kv_heads, 64, 128, dtype=dtype, device="meta"))


def test_parameters_are_the_same_on_both_sides() -> None:
    body = re.search(r"struct Params {\n(.*?)\n};", SOURCES["prefill_work.cuh"], re.S)
    assert body is not None
    lines = body.group(1).replace("float k_scale, v_scale;", "float k_scale;\n  float v_scale;")
    theirs = re.findall(r"^  (?:const )?(\w+)(\*)? (\w+);", lines, re.M)
    mine = [entry[:2] for entry in prompt_attention.Params._fields_ if entry[0] != "padding"]
    assert [name for *_, name in theirs] == [name for name, _ in mine]
    for (kind, pointer, name), (_, type_) in zip(theirs, mine, strict=True):
        plain = {"int": ctypes.c_int, "float": ctypes.c_float, "TensorMap": ctypes.c_uint64 * 16}
        assert type_ is (ctypes.c_void_p if pointer else plain[kind]), name
    assert ctypes.sizeof(prompt_attention.Params) % 64 == 0


def test_constants_are_the_same_on_both_sides() -> None:
    values = dict(re.findall(r"^constexpr int (\w+) = (\d+);", TEXT, re.M))
    assert int(values["LINES"]) == prompt_attention.LINES
    assert int(values["CONSUMERS"]) + 128 == prompt_attention.BLOCK_THREADS


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    assert prompt_attention.unsupported(memory(), 48, H100) is None
    assert prompt_attention.unsupported(memory(2), 12, H100) is None
    assert prompt_attention.unsupported(memory(8, torch.float8_e4m3fn), 48, H100) is None
    dynamic = KVLayer(memory(8, torch.float8_e4m3fn).data, torch.empty(3, 2, 8, 64, device="meta"))
    for kv, heads, word in (
        (memory(8, torch.float8_e4m3fnuz), 48, "bfloat16"), (dynamic, 48, "each token"),
        (memory(8), 44, "44 query heads"), (memory(1), 129, "129 query heads"),
    ):  # fmt: skip
        assert word in (prompt_attention.unsupported(kv, heads, H100) or ""), word
    for arch in ("sm_89", "sm_100", "gfx942"):
        assert arch in (prompt_attention.unsupported(memory(), 48, of_arch(arch)) or "")


def test_shared_memory_fits() -> None:
    assert all(prompt_attention.shared_bytes(fp8) <= H100.shared_bytes for fp8 in (False, True))


def test_without_a_gpu_the_start_says_why() -> None:
    found, line = prompt_attention.prepare(memory(), 48, H100)
    assert found is None and "Triton kernel" in line and "meta" in line


@pytest.mark.parametrize(
    ("heads", "fp8"), [((48, 8), False), ((48, 8), True), ((12, 2), True), ((16, 2), False), ((7, 7), False)], ids=str
)
def test_compiles(heads: tuple[int, int], fp8: bool) -> None:
    try:
        version = nvrtc.nvrtc_version()
    except nvrtc.CudaError as error:
        pytest.skip(f"NOT TESTED: {error}")
    cubin = nvrtc.compile_cubin("prefill.cu", SOURCES, prompt_attention.compile_options(*heads, fp8))
    # A spilled word is harmless; more would mean that products do not run beside the softmax.
    assert cubin[:4] == b"\x7fELF" and local_bytes(cubin, "prefill") <= 32, version

"""The wgmma kernel for routing without a GPU: its image of a gate is exact, it compiles without spills, host and device
agree on their parameters, and what it cannot serve is refused with the reason."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch

from saddle.kernels import gate, nvrtc
from saddle.kernels.router import RouterWork
from saddle.kernels.target import of_arch
from tests.support.cubin import local_bytes

SOURCES = nvrtc.sources("gate.cu")
TEXT = "\n".join(SOURCES.values())
H100 = of_arch("sm_90")


def unpacked(image: gate.GateImage, num_experts: int) -> torch.Tensor:
    """gain * gate [H, E] float64, read as the kernel reads it: product by product, chunk by chunk."""
    products = image.parts.double()
    width = 16 * len(products)
    found = torch.full((width, num_experts), float("nan"), dtype=torch.float64)
    for product in range(len(products)):
        for k in range(16):
            # Lane t = k % 8 / 2 gives k and, 8 on, the next pair; it has loaded the columns 8 t to 8 t + 7 of 32.
            column = product // 2 * 32 + k % 8 // 2 * 8 + product % 2 * 4 + k // 8 * 2 + k % 2
            for expert in range(num_experts):
                chunk = k // 8 ^ expert // 4 % 2
                found[column, expert] = products[product, :, expert, chunk * 8 + k % 8].sum()
    return found * image.factors[:num_experts].double()


def test_an_image_is_the_gate_to_22_bits() -> None:
    torch.manual_seed(0)
    matrix, gain = torch.randn(64, 12), torch.rand(64) + 0.5
    matrix *= 10.0 ** torch.arange(-12, 12, 2)  # experts of all sizes
    matrix[5] *= 1e-4
    matrix[:, 3] = 0
    wanted = (matrix * gain[:, None]).double()
    image = gate.image(matrix, gain)
    largest = wanted.abs().amax(0).clamp(min=1e-30)
    error = ((unpacked(image, 12) - wanted).abs() / largest).max()
    assert 0 < error < 2**-22
    assert not image.parts[:, :, 12:].any() and image.num_bytes == gate.image_bytes(64)
    assert image.parts.abs().max() < 2**15 and image.parts.isfinite().all()


def test_an_image_of_other_places_would_be_seen() -> None:
    matrix, gain = torch.randn(32, 8), torch.ones(32)
    image = gate.image(matrix, gain)
    for wrong in (image.parts.flip(-1), image.parts.roll(8, -1), image.parts.flip(0)):
        found = unpacked(gate.GateImage(wrong, image.factors), 8)
        assert (found - matrix.double()).norm() > 0.1 * matrix.double().norm()


def test_parameters_are_the_same_on_both_sides() -> None:
    body = re.search(r"struct Params {\n(.*?)\n};", SOURCES["gate_choose.cuh"], re.S)
    assert body is not None
    theirs = re.findall(r"^  (?:const )?(\w+)(\*)? (\w+);", body.group(1), re.M)
    mine = [entry[:2] for entry in gate.Params._fields_]
    assert [name for *_, name in theirs] == [name for name, _ in mine]
    for (kind, pointer, name), (_, type_) in zip(theirs, mine, strict=True):
        assert type_ is (ctypes.c_void_p if pointer else {"int": ctypes.c_int, "float": ctypes.c_float}[kind]), name


def test_constants_are_the_same_on_both_sides() -> None:
    values = {name: int(value) for name, value in re.findall(r"^constexpr int (\w+) = (\d+);", TEXT, re.M)}
    for name in ("TOKENS", "STEP", "EXPERTS_PADDED", "APART"):
        assert values[name] == getattr(gate, name), name
    assert values["CONSUMERS"] + 128 == gate.BLOCK_THREADS
    pitch = values["GROUP"] * 4 + 16
    shared = 1024 + values["PART_SLOTS"] * gate.EXPERTS_PADDED * 64 + values["X_SLOTS"] * (gate.TOKENS + 1) * pitch
    barriers = 16 * (values["PART_SLOTS"] + values["X_SLOTS"] + 1)
    assert shared + barriers <= gate.SHARED_BYTES <= H100.shared_bytes


def test_memory_holds_every_smaller_step() -> None:
    for width, num_experts, top_k in ((3072, 256, 8), (256, 16, 4)):
        for most in (129, 1000, 8192, 20_000):
            shapes = RouterWork.shapes(most, width, num_experts, top_k)
            for tokens in range(129, most + 1, 31):
                rows = tokens * gate.num_splits(tokens, width)
                assert rows * num_experts <= shapes["logits"][0][0] and rows <= shapes["squares"][0][0]
                assert gate.num_flags(tokens, num_experts) <= shapes["flags"][0][0]


def test_blocks_that_wait_for_each_other_run_at_once() -> None:
    for tokens in range(1, 40_000, 77):
        blocks, splits = -(-tokens // gate.TOKENS), gate.num_splits(tokens, 3072)
        assert splits == 1 or blocks * splits <= gate.MAX_BLOCKS <= H100.num_sms


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    assert gate.unsupported(3072, 256, 8, True, H100) is None and gate.unsupported(256, 16, 4, True, H100) is None
    for change, word in (
        ({"arch": "sm_80"}, "sm_90"), ({"num_experts": 264}, "264"), ({"num_experts": 12}, "12"),
        ({"top_k": 9}, "not 9"), ({"fp8": False}, "FP8"), ({"width": 3000}, "3000"),
    ):  # fmt: skip
        shape: dict[str, Any] = {"width": 3072, "num_experts": 256, "top_k": 8, "fp8": True, "arch": "sm_90"} | change
        target = of_arch(shape.pop("arch"))
        assert word in (gate.unsupported(**shape, target=target) or ""), word
        if shape.pop("fp8"):
            with pytest.raises(ValueError, match=word):
                gate.GateProduct(**shape, target=target, device=torch.device("cuda"))


def test_without_a_gpu_the_start_says_why() -> None:
    gates = [(torch.randn(256, 16), torch.ones(256))] * 2
    found, line = gate.prepare(gates, 4, True, H100)
    assert len(found) == 2 and found[0].product is None and "Triton" in line and "cpu" in line
    found, line = gate.prepare(gates, 4, True, of_arch("sm_89"))
    assert found == [] and "sm_89" in line


@pytest.mark.parametrize(("hidden", "num_experts", "top_k"), [(3072, 256, 8), (256, 16, 4), (384, 24, 6)])
def test_compiles(hidden: int, num_experts: int, top_k: int) -> None:
    try:
        version = nvrtc.nvrtc_version()
    except nvrtc.CudaError as error:
        pytest.skip(f"NOT TESTED: {error}")
    options = gate.compile_options(hidden=hidden, num_experts=num_experts, top_k=top_k)
    cubin = nvrtc.compile_cubin("gate.cu", SOURCES, options)
    assert cubin[:4] == b"\x7fELF" and local_bytes(cubin, "gate.cu") == 0, version

"""The wgmma kernels of the experts without a GPU: they compile without spilled sums, host and device agree on their
parameters, and what they cannot serve is refused with the reason."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest

from saddle.kernels import grouped, nvrtc, tiles
from saddle.kernels.target import of_arch
from tests.support.cubin import local_bytes

SOURCES = grouped.sources()
TEXT = "\n".join(SOURCES.values())
H100 = of_arch("sm_90")
FP8 = tiles.Fp8Tiles()


def weights(hidden: int, inner: int, num_experts: int, tile_format: Any = FP8) -> tuple[Any, Any]:
    w13 = tiles.allocate(2 * inner, hidden, tile_format, "meta", (num_experts,), True)
    return w13, tiles.allocate(hidden, inner, tile_format, "meta", (num_experts,))


def test_parameters_are_the_same_on_both_sides() -> None:
    body = re.search(r"struct Params {\n(.*?)\n};", SOURCES["grouped_work.cuh"], re.S)
    assert body is not None
    theirs = re.findall(r"^  (?:const )?(\w+)(\*)? (\w+);", body.group(1), re.M)
    assert theirs[0] == ("TensorMap", "", "weights")
    assert theirs[-2:] == [("int", "", "capacity"), ("int", "", "turned")]
    assert all(pointer for _, pointer, _ in theirs[1:-2])
    assert ctypes.sizeof(grouped.Params) % 64 == 0
    assert [name for *_, name in theirs] == [name for name, *_ in grouped.Params._fields_ if name != "padding"]


def test_constants_are_the_same_on_both_sides() -> None:
    values = dict(re.findall(r"^constexpr int (\w+) = (\d+);", TEXT, re.M))
    assert int(values["ROWS"]) == grouped.ROWS and int(values["STAGES"]) == grouped.STAGES
    assert int(values["CONSUMERS"]) + int(values["PRODUCERS"]) == grouped.BLOCK_THREADS
    assert (grouped.ROWS + int(values["PAIRS"])) * int(values["TURN_K"]) == grouped.STAGE_BYTES


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    for known in ((3072, 1536, 256), (256, 128, 16)):
        assert [grouped.unsupported(w, H100) for w in weights(*known)] == [None, None]
    for shape, word in (
        ((384, 128, 16), "rows"), ((256, 128, 512), "experts"), ((256, 128, 16, tiles.Fp8Tiles(64)), "128 columns"),
        ((256, 128, 16, tiles.Bf16Tiles()), "FP8 tiles"),
    ):  # fmt: skip
        w13, w2 = weights(*shape)
        assert word in (grouped.unsupported(w13, H100) or grouped.unsupported(w2, H100) or ""), shape
        with pytest.raises(ValueError, match=word):
            grouped.GroupedExperts(w13, w2, 4, H100)
    for arch in ("sm_89", "sm_100", "gfx942"):
        assert arch in (grouped.unsupported(weights(256, 128, 16)[0], of_arch(arch)) or "")


def test_without_a_gpu_the_start_says_why() -> None:
    qkv, o = (tiles.allocate(256, 256, FP8, "meta") for _ in range(2))
    found, line = grouped.prepare(*weights(256, 128, 16), qkv, o, 4, H100)
    assert found == grouped.Grouped() and "Triton kernels" in line and "meta" in line


@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("grouped.cu", {"hidden": 3072, "intermediate": 1536, "num_experts": 256, "top_k": 8}),
        ("grouped.cu", {"hidden": 256, "intermediate": 128, "num_experts": 16, "top_k": 4}),
        ("dense.cu", {"columns": 6144, "rows": 3072}),
        ("dense.cu", {"columns": 3072, "rows": 8192, "turned": 1}),
    ],
    ids=["m2", "demo", "dense", "turned"],
)
def test_compiles(file: str, shape: dict[str, int]) -> None:
    try:
        version = nvrtc.nvrtc_version()
    except nvrtc.CudaError as error:
        pytest.skip(f"NOT TESTED: {error}")
    cubin = nvrtc.compile_cubin(file, nvrtc.sources(file), grouped.compile_options(**shape))
    # A spilled word is harmless; more would mean that setmaxnreg is without effect.
    assert cubin[:4] == b"\x7fELF" and local_bytes(cubin, file) <= 32, version

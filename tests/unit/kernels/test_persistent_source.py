"""The persistent kernel without a GPU: it compiles, host and device agree on every structure and constant, and what it
cannot serve is refused with the reason."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saddle.kernels import nvrtc, persistent
from saddle.kernels.persistent import DecodeShape
from saddle.kernels.target import of_arch
from tests.support.cubin import local_bytes

M2 = DecodeShape(3072, 48, 8, 256, 8, 1536, 200064, 62)
M2_16_LAYERS = replace(M2, num_layers=16)
DEMO = DecodeShape(256, 12, 2, 16, 4, 128, 1024, 4)
SOURCES = persistent.sources()
TEXT = "\n".join(SOURCES.values())
H100 = of_arch("sm_90")
C_TYPES = {"int": ctypes.c_int, "i64": ctypes.c_int64, "float": ctypes.c_float}


def struct_fields(name: str) -> list[tuple[str, object]]:
    """(name, ctypes type or length of an array) of a struct in state.cuh, in order; pointers are c_void_p."""
    body = re.search(rf"struct {name} {{\n(.*?)\n}};", SOURCES["state.cuh"], re.S)
    assert body is not None
    found: list[tuple[str, object]] = []
    for line in body.group(1).splitlines():
        code = line.split("//")[0].strip()
        if not code:
            continue
        match = re.fullmatch(r"(?:const )?(\w+)(\*)? (\w+)(\[.*\])?;", code)
        assert match is not None, code
        kind, pointer, field, array = match.groups()
        found.append((field, array or (ctypes.c_void_p if pointer else C_TYPES[kind])))
    return found


def test_parameters_are_the_same_on_both_sides() -> None:
    mine = persistent.LayerParams._fields_
    assert [tuple(entry[:2]) for entry in mine] == struct_fields("LayerWeights")
    expected = struct_fields("Params")
    fields = persistent.params_type(3)._fields_
    assert [entry[0] for entry in fields] == [name for name, _ in expected]
    kinds: list[Any] = [entry[1] for entry in fields]
    for kind, (name, theirs) in zip(kinds, expected, strict=True):
        if isinstance(theirs, str):
            assert theirs in ("[ROTARY_DIM / 2]", "[NUM_LAYERS]"), name
            assert kind._length_ == (32 if name == "rotary_frequencies" else 3)
        else:
            assert kind is theirs, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SPLITS", persistent.SPLITS), ("GATE_ROWS", persistent.CTAS_FOR_ROUTER), ("ROTARY_DIM", persistent.ROTARY_DIM),
        ("CLAIM_PITCH", persistent.CLAIM_PITCH), ("SYNC_WORDS", persistent.SYNC_WORDS),
        ("STAGE_ATTENTION", persistent.ATTENTION), ("STAGE_EXPERTS", persistent.EXPERTS),
        ("STAGE_HEAD", persistent.HEAD),
    ],
)  # fmt: skip
def test_constants_are_the_same_on_both_sides(name: str, value: int) -> None:
    found = re.findall(rf"^(?:constexpr int {name} = |#define {name} )(\d+)", TEXT, re.M)
    assert found == [str(value)]


def test_rows_and_their_binaries() -> None:
    allowed = re.search(r"MAX_ROWS <= 8 \? 8 % MAX_ROWS == 0 : MAX_ROWS == (\d+) \|\| MAX_ROWS == (\d+)", TEXT)
    assert allowed is not None
    assert (1, 2, 4, 8, *map(int, allowed.groups())) == persistent.VARIANTS
    assert persistent.VARIANTS[-1] == persistent.MAX_ROWS


def test_every_failure_has_its_words() -> None:
    codes = dict(re.findall(r"#define (FAILED_\w+) (\d+)", TEXT))
    assert sorted(map(int, codes.values())) == sorted(persistent.FAILURES)
    for name in codes:
        assert len(re.findall(rf"\b{name}\b", TEXT)) >= 2, f"{name} is never reported"


def test_sizes_of_all_cuda_files() -> None:
    files = {path.name for path in Path(persistent.__file__).with_name("cuda").iterdir()}
    texts = {part: text for name in files if name.endswith(".cu") for part, text in nvrtc.sources(name).items()}
    assert files == texts.keys()
    for name, text in texts.items():
        lines = text.splitlines()
        assert len(lines) <= 500, name
        assert max(map(len, lines)) <= 140, name
        assert text.startswith("//"), f"{name} does not say why it exists"
        start = None
        for number, line in enumerate(lines):
            if re.match(r"(template .*)?(DEVICE|extern|__device__)", line):
                start = number
            if line == "}" and start is not None:
                assert number - start < 100, f"{name}:{start + 1} is too long"
                start = None


def test_headers_are_reached() -> None:
    included = set(re.findall(r'#include "(\S+)"', TEXT))
    assert included == set(SOURCES) - {"persistent.cu"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden": 4096}, "hidden"), ({"num_heads": 64}, "query heads"), ({"num_experts": 384}, "experts"),
        ({"intermediate": 192}, "expert width"), ({"vocab": 1000}, "vocabulary"), ({"num_layers": 300}, "layers"),
    ],
)  # fmt: skip
def test_other_shapes_are_refused(change: dict[str, int], word: str) -> None:
    assert persistent.unsupported(H100, M2) is None
    assert persistent.unsupported(H100, DEMO) is None
    assert word in (persistent.unsupported(H100, replace(M2, **change)) or "")


def test_other_gpus_are_refused_with_the_reason() -> None:
    assert "114 multiprocessors" in (persistent.unsupported(of_arch("sm_90", 114), M2) or "")
    assert "pairs" in (persistent.unsupported(of_arch("sm_90", 131), M2) or "")
    assert "sm_90" in (persistent.unsupported(of_arch("sm_100"), M2) or "")


def test_compiled_binaries_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, ...]] = []

    def compile_cubin(name: str, sources: dict[str, str], options: list[str]) -> bytes:
        compiled.append((sources["a.cuh"], *options))
        return f"{sources} {options}".encode()

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
    files = {"k.cu": "k", "a.cuh": "1"}
    first = nvrtc.cached_cubin(tmp_path, "k.cu", files, ["-DX=1"], "sm_90-1")
    assert nvrtc.cached_cubin(tmp_path, "k.cu", files, ["-DX=1"], "sm_90-1") == first
    assert len(compiled) == 1
    for other, options in (({**files, "a.cuh": "2"}, ["-DX=1"]), (files, ["-DX=2"])):
        assert nvrtc.cached_cubin(tmp_path, "k.cu", other, options, "sm_90-1") != first
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 1))
    nvrtc.cached_cubin(tmp_path, "k.cu", files, ["-DX=1"], "sm_90-1")
    assert len(compiled) == 4 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("shape", "rows", "kv_format"),
    [(M2_16_LAYERS, 1, 0), (M2_16_LAYERS, 8, 2), (M2_16_LAYERS, 16, 0), (DEMO, 1, 2)],
    ids=["m2_1_row", "m2_8_rows", "m2_16_rows", "demo"],
)
def test_compiles(shape: DecodeShape, rows: int, kv_format: int) -> None:
    try:
        version = nvrtc.nvrtc_version()
    except nvrtc.CudaError as error:
        pytest.skip(f"NOT TESTED: {error}")
    cubin = nvrtc.compile_cubin("persistent.cu", SOURCES, persistent.compile_options(shape, rows, kv_format, 132))
    assert cubin[:4] == b"\x7fELF" and b"persistent_decode" in cubin, version
    # A few spilled words are harmless; more would mean that setmaxnreg is without effect.
    assert local_bytes(cubin, "persistent_decode") <= 32

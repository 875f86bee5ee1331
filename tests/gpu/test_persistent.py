"""The persistent kernel on the GPU: M2's widths, random weights, against float32 torch on the dequantised values.
Memory between the stages is poisoned before every step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from saddle.kernels import target
from saddle.kernels.paged_kv import BLOCK_SIZE, KVLayer, read_tokens
from saddle.kernels.persistent import (
    ALL_STAGES,
    ATTENTION,
    EXPERTS,
    MAX_ROWS,
    DecodeShape,
    PersistentDecode,
    unsupported,
)
from saddle.model.packed import PackedModel
from tests.support import decode_reference as reference

ROOT = Path(__file__).resolve().parents[2]
# Compiled once for all tests; the names change with the sources.
CUBINS = Path(tempfile.gettempdir()) / "saddle-test-cubins"
# The bundled checkpoint's.
DEMO = DecodeShape(256, 12, 2, 16, 4, 128, 1024, 4)
# All of M2 but the number of layers and the vocabulary, which is cut for time.
SHAPE = DecodeShape(3072, 48, 8, 256, 8, 1536, 32000, 2)
NUM_BLOCKS, TABLE = MAX_ROWS * 132, 130
LENGTHS = (1, 63, 64, 65, 2047, 8190, 17, 300, 16, 1025, 2, 128, 700, 15, 4097, 31, 5, 200, 999)
# Error of the residual's update and of the logits: float16 activations, bf16 or FP8 queries and probabilities.
LIMITS = {"bf16": 6e-3, "fp8": 1.2e-2, "fp8_dynamic": 1.2e-2}
NOT_HERE = unsupported(target.detect(), SHAPE) if torch.cuda.is_available() else "NO GPU"
pytestmark = pytest.mark.skipif(NOT_HERE is not None, reason=f"NOT TESTED: {NOT_HERE}")


@dataclass
class Case:
    """A kernel with its memory, and the memory's contents to start every step from."""

    model: PackedModel
    kv: list[KVLayer]
    data: torch.Tensor
    scales: torch.Tensor | None
    kernel: PersistentDecode
    first_data: torch.Tensor
    first_scales: torch.Tensor | None

    def reset(self) -> None:
        self.data.copy_(self.first_data)
        if self.scales is not None and self.first_scales is not None:
            self.scales.copy_(self.first_scales)
        for name, tensor in self.kernel.workspace.items():
            if name.endswith("words"):
                tensor.fill_(0x7FC00000)  # NaN of no epoch
            elif name == "activations":
                tensor.fill_(float("nan"))
            elif name == "residual":
                tensor.fill_(1 << 62)

    def reference_kv(self) -> list[KVLayer]:
        found = []
        for i, layer in enumerate(self.kv):
            scales = None if self.first_scales is None else self.first_scales[i].clone()
            data = self.first_data[i].clone().view(layer.data.dtype)
            found.append(KVLayer(data, scales, layer.k_scale, layer.v_scale))
        return found


@pytest.fixture(scope="module")
def model() -> PackedModel:
    return reference.random_model(SHAPE, "cuda", 7)


@pytest.fixture(scope="module", params=list(LIMITS))
def case(request: pytest.FixtureRequest, model: PackedModel) -> Iterator[Case]:
    torch.manual_seed(1)
    size = (SHAPE.num_layers, NUM_BLOCKS, 2, SHAPE.num_kv_heads, BLOCK_SIZE, 128)
    numbers = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    scales = None
    if request.param == "bf16":
        data = numbers
    else:
        data = numbers.to(torch.float8_e4m3fn)
    if request.param == "fp8_dynamic":
        scales = torch.rand(size[:-1], device="cuda") + 0.5
    static = (0.75, 1.25) if request.param == "fp8" else (1.0, 1.0)
    kv = [KVLayer(data[i], None if scales is None else scales[i], *static) for i in range(SHAPE.num_layers)]
    kernel = PersistentDecode(model, SHAPE, target.detect(), kv, cache_dir=CUBINS, wait_seconds=5)
    raw = data.view(torch.uint8)
    yield Case(model, kv, raw, scales, kernel, raw.clone(), None if scales is None else scales.clone())


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def run(
    case: Case, lengths: list[int], stages: int, num_layers: int, padding: int = 0, same_token: bool = False
) -> None:
    """One step twice; compare everything that it leaves behind."""
    torch.manual_seed(0)
    rows = len(lengths)
    tables = torch.randperm(NUM_BLOCKS, device="cuda")[: MAX_ROWS * TABLE].to(torch.int32).view(MAX_ROWS, TABLE)
    row_ids = torch.randperm(MAX_ROWS, device="cuda")[:rows].to(torch.int32)
    tokens = torch.randint(0, SHAPE.vocab, (rows,), device="cuda", dtype=torch.int32)
    context = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    limit = LIMITS["bf16" if case.kv[0].scale_kind == 0 else "fp8"]
    kv: list[KVLayer] = []

    def decode() -> reference.Step:
        if same_token:
            tokens[:] = tokens[0].clone()
        kv[:] = case.reference_kv()
        return reference.decode(case.model, SHAPE, kv, tokens, context, tables[row_ids.long()], stages, num_layers)

    wanted = reference.settled(tokens, SHAPE.vocab, limit / 5, decode)
    pad = torch.zeros(padding, device="cuda", dtype=torch.int32)
    padded = ((tokens, 0), (context - 1, -1), (context, 0), (row_ids, -1))
    ids, places, contexts, of_rows = (torch.cat([part, pad + fill]) for part, fill in padded)
    case.kernel.stages, case.kernel.num_layers = stages, num_layers
    results = []
    for _ in range(2):
        case.reset()
        logits = torch.full((rows + padding, SHAPE.vocab), float("nan"), device="cuda")
        case.kernel.step(ids, places, contexts, of_rows, tables, logits)
        torch.cuda.synchronize()
        scales = None if case.scales is None else case.scales.clone()
        results.append((case.kernel.workspace["residual"][:rows].clone(), logits, case.data.clone(), scales))
    first, second = results
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert torch.equal(first[1].view(torch.int32), second[1].view(torch.int32))
    update = first[0].double() / 2**32 - wanted.embedded
    for row in range(rows):
        assert error(update[row], (wanted.residual - wanted.embedded)[row]) < limit, row
    if wanted.logits is not None:
        for row in range(rows):
            assert error(first[1][row], wanted.logits[row]) < limit, row
        assert first[1][rows:].isnan().all(), "logits of padding rows were written"
    if stages & ATTENTION:
        _compare_kv(case, kv, tables[row_ids.long()].long(), context.long() - 1, num_layers, limit)


def _compare_kv(
    case: Case, kv: list[KVLayer], tables: torch.Tensor, positions: torch.Tensor, num_layers: int, limit: float
) -> None:
    """The new tokens are in memory, and nothing else was touched."""
    blocks = tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0]
    slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
    changed = (case.data != case.first_data).any(-1)  # [layer, block, k|v, head, token]
    for layer in range(SHAPE.num_layers):
        mine, theirs = read_tokens(case.kv[layer], slots), read_tokens(kv[layer], slots)
        if layer < num_layers:
            # FP8 numbers fall to the next one where the values differ in the last bit before rounding.
            assert max(error(a, b) for a, b in zip(mine, theirs, strict=True)) < 3 * limit
        where = changed[layer].any(1).any(1).nonzero()
        assert {(int(b), int(t)) for b, t in where} <= {(int(s) // BLOCK_SIZE, int(s) % BLOCK_SIZE) for s in slots}


@pytest.mark.parametrize("rows", list(range(1, MAX_ROWS + 1)))
@pytest.mark.parametrize("stages", [ATTENTION, EXPERTS, ALL_STAGES])
def test_rows(case: Case, rows: int, stages: int) -> None:
    run(case, [2048] * rows, stages, 1 if stages == EXPERTS else 2)


@pytest.mark.parametrize("rows", [8, 11, 12, 15, 16])
def test_all_rows_choose_the_same_experts(case: Case, rows: int) -> None:
    run(case, [1] * rows, EXPERTS, 1, same_token=True)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 2047, 8190])
@pytest.mark.parametrize("rows", [1, 8, 12, 16])
def test_contexts(case: Case, rows: int, length: int) -> None:
    run(case, [length] * rows, ATTENTION, 1)


@pytest.mark.parametrize("rows", [2, 3, 5, 8, 11, 12, 13, 16])
def test_unequal_contexts(case: Case, rows: int) -> None:
    run(case, list(LENGTHS[:rows]), ALL_STAGES, 2)
    run(case, [8190, *[1] * (rows - 1)], ATTENTION, 1)
    run(case, [*[1] * (rows - 1), 8190], ATTENTION, 1)


PADDED = [(1, 1), (3, 1), (5, 3), (1, 7), (9, 3), (11, 1), (1, 11), (13, 3), (1, 15)]  # rows, padding


@pytest.mark.parametrize(("rows", "padding"), PADDED)
def test_padding(case: Case, rows: int, padding: int) -> None:
    run(case, list(LENGTHS[3 : 3 + rows]), ALL_STAGES, 2, padding)


def test_uniform_routing(case: Case) -> None:
    kernel = PersistentDecode(case.model, SHAPE, target.detect(), case.kv, 4, CUBINS, True, wait_seconds=5)
    tokens = torch.tensor([5, 77, 31999], device="cuda", dtype=torch.int32)
    context = torch.tensor([9, 200, 2048], device="cuda", dtype=torch.int32)
    tables = torch.randperm(NUM_BLOCKS, device="cuda")[: 3 * TABLE].to(torch.int32).view(3, TABLE)
    case.reset()
    logits = torch.full((3, SHAPE.vocab), float("nan"), device="cuda")
    kernel.step(tokens, context - 1, context, torch.arange(3, device="cuda", dtype=torch.int32), tables, logits)
    wanted = reference.decode(case.model, SHAPE, case.reference_kv(), tokens, context, tables, uniform=True)
    assert wanted.logits is not None
    assert error(logits, wanted.logits) < LIMITS["fp8" if case.kv[0].scale_kind else "bf16"]


def test_scales_of_values_far_apart(case: Case) -> None:
    """Probabilities times scales are float16 in parts of the largest scale so far, which comes late or early."""
    if case.first_scales is None:
        pytest.skip("only dynamic FP8 has scales")
    kept = case.first_scales[:, :, 1].clone()
    try:
        case.first_scales[:, :, 1] = 10 ** (torch.rand(kept.shape, device="cuda") * 6 - 4)
        for lengths in ([300], [2047, 64, 1, 1025]):
            run(case, lengths, ATTENTION, 1)
    finally:
        case.first_scales[:, :, 1] = kept


def test_one_wrong_rotary_pair_is_seen(case: Case) -> None:
    """What the limits are worth: one of 32 frequencies off by a tenth breaks them."""
    frequencies = case.kernel._params.rotary_frequencies
    right = frequencies[3]
    frequencies[3] = right * 1.1
    try:
        with pytest.raises(AssertionError):
            run(case, [300], ATTENTION, 1)
    finally:
        frequencies[3] = right
    run(case, [300], ATTENTION, 1)


def test_out_of_range_is_nan_in_that_row_alone(case: Case) -> None:
    """A weight of the embedding that float32 bears and the residual's fixed point does not."""
    model = replace(case.model, embed=case.model.embed.clone(), norm=case.model.norm)
    model.embed[11] = 1e38
    kernel = PersistentDecode(model, SHAPE, target.detect(), case.kv, 2, CUBINS, wait_seconds=5)
    tokens = torch.tensor([11, 12], device="cuda", dtype=torch.int32)
    context = torch.tensor([5, 6], device="cuda", dtype=torch.int32)
    tables = torch.arange(2 * TABLE, device="cuda", dtype=torch.int32).view(2, TABLE)
    logits = torch.zeros(2, SHAPE.vocab, device="cuda")
    case.reset()
    kernel.step(tokens, context - 1, context, torch.arange(2, device="cuda", dtype=torch.int32), tables, logits)
    assert logits[0].isnan().all() and logits[1].isfinite().all()
    tokens[0] = 13  # the next step is well again
    kernel.step(tokens, context - 1, context, torch.arange(2, device="cuda", dtype=torch.int32), tables, logits)
    assert logits.isfinite().all()


def test_in_a_graph(case: Case) -> None:
    tokens = torch.tensor([3], device="cuda", dtype=torch.int32)
    context = torch.tensor([130], device="cuda", dtype=torch.int32)
    positions, row_ids = context - 1, torch.zeros(1, device="cuda", dtype=torch.int32)
    tables = torch.arange(TABLE, device="cuda", dtype=torch.int32).view(1, TABLE)
    logits = torch.zeros(1, SHAPE.vocab, device="cuda")
    case.kernel.stages, case.kernel.num_layers = ALL_STAGES, 2
    case.reset()
    case.kernel.step(tokens, positions, context, row_ids, tables, logits)
    wanted = logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.kernel.step(tokens, positions, context, row_ids, tables, logits)
    for _ in range(3):
        logits.fill_(float("nan"))
        graph.replay()
        assert torch.equal(logits, wanted)


def demo_kernel(wait_seconds: float, kv_format: int = 0) -> tuple[PersistentDecode, PackedModel, list[KVLayer]]:
    """A kernel of the demo's shape; KV memory is bf16, static FP8 or dynamic FP8."""
    torch.manual_seed(2)
    model = reference.random_model(DEMO, "cuda", 3)
    data = torch.randn(DEMO.num_layers, 80, 2, DEMO.num_kv_heads, BLOCK_SIZE, 128, device="cuda", dtype=torch.bfloat16)
    if kv_format:
        data = data.to(torch.float8_e4m3fn)
    scales = torch.rand(data.shape[:-1], device="cuda") + 0.5 if kv_format == 2 else None
    kv = [KVLayer(part, None if scales is None else scales[i]) for i, part in enumerate(data)]
    return PersistentDecode(model, DEMO, target.detect(), kv, MAX_ROWS, CUBINS, wait_seconds=wait_seconds), model, kv


def demo_step(rows: int) -> tuple[torch.Tensor, ...]:
    """token ids, positions, context lengths, row ids, block tables, logits."""
    lengths = (1, 70, 256, 17, 130, 64, 65, 200, 310, 2, 128, 33, 90, 16, 255, 300)
    context = torch.tensor(lengths[:rows], device="cuda", dtype=torch.int32)
    tokens = torch.randint(0, DEMO.vocab, (rows,), device="cuda", dtype=torch.int32)
    tables = torch.randperm(80, device="cuda")[: 16 * 5].to(torch.int32).view(16, 5)
    row_ids = torch.randperm(16, device="cuda")[:rows].to(torch.int32)
    return tokens, context - 1, context, row_ids, tables, torch.full((rows, DEMO.vocab), float("nan"), device="cuda")


def check_demo(kernel: PersistentDecode, model: PackedModel, kv: list[KVLayer], rows: int, limit: float) -> None:
    """A step of the demo's shape against the reference."""
    step = demo_step(rows)
    tokens, _, context, row_ids, tables, logits = step

    def decode() -> reference.Step:
        copies = [None if layer.scales is None else layer.scales.clone() for layer in kv]
        copied = [KVLayer(layer.data.clone(), scales) for layer, scales in zip(kv, copies, strict=True)]
        return reference.decode(model, DEMO, copied, tokens, context, tables[row_ids.long()])

    wanted = reference.settled(tokens, DEMO.vocab, limit / 5, decode)
    kernel.step(*step)
    assert wanted.logits is not None
    assert error(logits, wanted.logits) < limit


def test_demo_shape() -> None:
    kernel, model, kv = demo_kernel(5)
    for rows in (1, 2, 3, 4, 8, 9, 12, 13, 16):
        check_demo(kernel, model, kv, rows, LIMITS["bf16"])


def test_gives_up_instead_of_hanging() -> None:
    """A multiprocessor that never comes: in another process, whose CUDA context does not survive it."""
    code = """
import sys
import torch
sys.path.insert(0, "tests/gpu")
import test_persistent as tests
kernel, _, _ = tests.demo_kernel(1.0)
kernel.num_ctas -= 1
kernel.step(*tests.demo_step(1))
try:
    torch.cuda.synchronize()
except Exception:
    print(kernel.failure())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "did not come" in done.stdout, done.stdout + done.stderr

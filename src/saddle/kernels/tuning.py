"""Tiles for cards that no table is shipped for: measured once, kept on disk, said at start.

The default tiles in `linear` and `experts` were found on an H100 and serve every sm_90 card with as many
multiprocessors. On another card the first start measures a few candidates around them, for every weight of the model
at four numbers of tokens, and keeps the best in a file whose name holds the card, the model's shape and the version
of Saddle. A number of tokens that was not measured takes the nearest measured one that runs the same kernel. What
takes time is compiling, so all candidates are compiled side by side first, where Triton can.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from saddle.kernels import experts, linear, quant, router, tiles
from saddle.kernels.ahead import side_by_side
from saddle.kernels.quant import Activation
from saddle.kernels.target import Target
from saddle.kernels.tile_dot import SCALE_ROWS, Block, block_key, bucket, fit, takes_fp8
from saddle.kernels.tiles import Bf16Tiles, Fp8Tiles, PackedMatrix, TileFormat
from saddle.version import VERSION

logger = logging.getLogger(__name__)

SHIPPED_SMS = 132  # H100 SXM, H200
CANDIDATES = 2  # which tiles are tried; what was measured of others, and may be refused now, is not read
SIZES = (8, 64, 1024, 4096)
BUCKETS = tuple(1 << power for power in range(14))
# Experts of the random model that is measured: as many as M2 has (3.6 GB in FP8), since how many tokens an expert
# gets decides which tiles are fast.
MAX_EXPERTS = 256
REPEATS = 7
# Overwritten before each run: more than any second-level cache holds, so that weights come from memory as in a step.
FLUSH_BYTES = 256 << 20

Clock = Callable[[Callable[[], None]], float]


@dataclass(frozen=True, slots=True)
class Shapes:
    """Widths of one rank's weights."""

    hidden: int
    qkv_rows: int
    o_columns: int
    vocab: int
    num_experts: int
    top_k: int
    intermediate: int
    attention: TileFormat
    experts: TileFormat


@dataclass(frozen=True, slots=True)
class Case:
    """One choice: a kernel at a number of tokens, what it may take, and how it runs with it."""

    kernel: str
    num_tokens: int
    matrix: PackedMatrix
    candidates: list[Block]
    run: Callable[[Block], None]
    most_few: int = linear.MAX_FEW_TOKENS  # up to here another kernel runs than above

    def fitting(self, target: Target) -> list[Block]:
        """The candidates, different ones, as they fit the matrix and the chip."""
        return list(dict.fromkeys(fit(block, self.matrix, target) for block in self.candidates))


def prepare(shapes: Shapes, target: Target, device: torch.device | str, folder: Path | None) -> tuple[Target, str]:
    """The target with its tiles, and one line that says where they come from.

    Args:
        folder: where measured tiles are kept; None: nowhere.
    """
    if target.arch == "sm_90" and target.num_sms >= SHIPPED_SMS:
        return target, f"tiles of the kernels: the shipped ones, found on an H100 ({target.name})"
    path = None if folder is None else folder / file_name(shapes, target)
    if path is not None and path.is_file():
        found = json.loads(path.read_text())
        return with_blocks(target, found), f"tiles of the kernels: measured before on this card, from {path}"
    started = time.monotonic()
    work = list(cases(shapes, target, device))
    compile_all(work, target)
    found = tune(work, target, time_on_gpu)
    if path is not None:
        _write(path, json.dumps(found, indent=1))
    seconds = time.monotonic() - started
    where = "not kept" if path is None else f"kept in {path}"
    return with_blocks(target, found), f"tiles of the kernels: measured on this card in {seconds:.0f} s, {where}"


def file_name(shapes: Shapes, target: Target) -> str:
    """Name of the file of a card, a model's shape and a version."""
    card = re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-")
    digest = hashlib.sha256(repr((CANDIDATES, shapes, target.arch, target.num_sms)).encode()).hexdigest()[:12]
    return f"tiles-{card}-{digest}-{VERSION}.json"


def with_blocks(target: Target, found: dict[str, list[int]]) -> Target:
    """The target with measured tiles, given as numbers of a `Block`."""
    return dataclasses.replace(target, blocks={key: tuple(block) for key, block in found.items()})  # type: ignore[misc]


def compile_all(work: list[Case], target: Target) -> None:
    """Compile every candidate, on as many cores as there are. Those that fail do so again, and are named, when they
    are measured; where this Triton cannot, candidates are compiled one by one then."""
    with side_by_side() as can:
        if can:
            for case in work:
                for block in case.fitting(target):
                    case.run(block)


def tune(work: list[Case], target: Target, clock: Clock) -> dict[str, list[int]]:
    """The fastest candidate of every case, spread over the numbers of tokens that were not measured."""
    best: dict[str, list[tuple[int, Block]]] = {}
    most_few: dict[str, int] = {}
    for case in work:
        times = {}
        for candidate in case.fitting(target):
            try:
                times[candidate] = clock(partial(case.run, candidate))
            except RuntimeError as error:  # too many registers or too much shared memory: no candidate here
                logger.info("tiles %s of %s do not run: %s", candidate, case.kernel, error)
        if times:
            chosen = min(times, key=times.__getitem__)
            key = block_key(case.kernel, case.num_tokens, case.matrix)
            name = key.replace(f" {bucket(case.num_tokens)} ", " {} ", 1)
            best.setdefault(name, []).append((bucket(case.num_tokens), chosen))
            most_few[name] = case.most_few
    found = {}
    for name, measured in best.items():
        for size in BUCKETS:
            alike = [pair for pair in measured if (pair[0] <= most_few[name]) == (size <= most_few[name])]
            if alike:
                found[name.format(size)] = [*dataclasses.astuple(_resized(name, size, _nearest(size, alike)))]
    return found


def cases(shapes: Shapes, target: Target, device: torch.device | str) -> Iterator[Case]:
    """All choices for a model, with random weights on the device."""
    attention = shapes.attention
    for rows, columns, tile_format in (
        (shapes.qkv_rows, shapes.hidden, attention),
        (shapes.hidden, shapes.o_columns, attention),
        (shapes.vocab, shapes.hidden, Bf16Tiles()),
    ):
        matrix = _random(rows, columns, tile_format, device)
        for num_tokens in SIZES:
            yield _linear_case(matrix, num_tokens, target, device)
    num_experts = min(shapes.num_experts, MAX_EXPERTS)
    w13 = _random(2 * shapes.intermediate, shapes.hidden, shapes.experts, device, (num_experts,), True)
    w2 = _random(shapes.hidden, shapes.intermediate, shapes.experts, device, (num_experts,))
    for num_tokens in SIZES:
        yield from _expert_cases(w13, w2, shapes.top_k, num_tokens, target, device)


def time_on_gpu(run: Callable[[], None]) -> float:
    """Median milliseconds of a few runs as a graph, with nothing in the cache."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()  # also covers the time that the host takes to launch
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)))
    return statistics.median(times)


def _linear_case(matrix: PackedMatrix, num_tokens: int, target: Target, device: torch.device | str) -> Case:
    few = num_tokens <= linear.MAX_FEW_TOKENS
    a = _activation(matrix, num_tokens, target, device)
    parts = linear.split_k(num_tokens, matrix, target)
    out = torch.empty(parts, num_tokens, matrix.num_rows, device=device)
    default = (linear.few_block if few else linear.many_block)(num_tokens, matrix, target)
    kernel = "few" if few else "many"
    return Case(kernel, num_tokens, matrix, _around(default), lambda block: linear.launch(a, matrix, out, block, 0))


def _expert_cases(
    w13: PackedMatrix, w2: PackedMatrix, top_k: int, num_tokens: int, target: Target, device: torch.device | str
) -> Iterator[Case]:
    num_experts, hidden = w13.data.shape[0], w13.num_cols
    work = router.RouterWork.allocate(num_tokens, hidden, num_experts, top_k, device)
    h = _activation(w13, num_tokens, target, device)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    router.route(torch.randn(num_tokens, hidden, device=device), None, torch.ones(hidden, device=device), 1e-6,
                 torch.randn(hidden, num_experts, device=device), torch.zeros(num_experts, device=device), tokens,
                 tokens, 0, False, work, h, target)  # fmt: skip
    act = _activation(w2, num_tokens * top_k, target, device)
    dtype = experts.pair_dtype(num_tokens, num_experts, top_k)
    out = torch.empty(num_tokens * top_k, hidden, dtype=dtype, device=device)
    few = work.takes_few(num_tokens)
    up, down = experts.up_block(num_tokens, w13, target, few), experts.down_block(num_tokens, w2, target, few)
    most_few = router.most_few_tokens(num_experts, top_k)
    # 256 rows of w1 and w3 share a scale of the activation, and both kernels take the router's units.
    ups = [dataclasses.replace(block, bn=up.bn, bm=up.bm) for block in _around(up)]
    most = SCALE_ROWS if few and isinstance(w2.format, Fp8Tiles) else 256
    downs = [dataclasses.replace(block, bn=min(block.bn, most), bm=down.bm) for block in _around(down)]
    yield Case("up", num_tokens, w13, ups,
               lambda block: experts.launch(h, w13, w2, work, act, out, (block, down), 0), most_few)  # fmt: skip
    yield Case("down", num_tokens, w2, downs,
               lambda block: experts.launch(h, w13, w2, work, act, out, (up, block), 0), most_few)  # fmt: skip


def _around(block: Block) -> list[Block]:
    """A block and its neighbours: half and twice the rows, shorter steps, more or fewer turns and warps."""
    change = dataclasses.replace
    return [
        block,
        change(block, bn=max(32, block.bn // 2)),
        change(block, bn=min(256, block.bn * 2)),
        change(block, bk=64, stages=block.stages * 2),
        change(block, stages=max(2, block.stages - 1)),
        change(block, stages=block.stages + 2),
        change(block, warps=4 if block.warps == 8 else 8),
    ]


def _random(
    rows: int, columns: int, tile_format: TileFormat, device: torch.device | str, lead: tuple[int, ...] = (),
    interleaved: bool = False,
) -> PackedMatrix:  # fmt: skip
    """Weights of random bits without NaN: zeros could run faster than real numbers do."""
    matrix = tiles.allocate(rows, columns, tile_format, device, lead, interleaved)
    words = matrix.data.view(torch.int32)
    words.random_().bitwise_and_(0x3F3F3F3F)
    if isinstance(tile_format, Fp8Tiles):
        tiles.scale_view(matrix).fill_(0.01)
    return matrix


def _activation(matrix: PackedMatrix, num_tokens: int, target: Target, device: torch.device | str) -> Activation:
    dtype = target.fp8_dtype if takes_fp8(matrix, target) else torch.bfloat16
    return quant.quantise(torch.randn(num_tokens, matrix.num_cols, device=device), dtype)


def _nearest(size: int, measured: list[tuple[int, Block]]) -> Block:
    return min(measured, key=lambda pair: abs(pair[0].bit_length() - size.bit_length()))[1]


def _resized(name: str, size: int, block: Block) -> Block:
    """The block for another number of tokens: the few-token product holds all of them."""
    return dataclasses.replace(block, bm=max(16, size)) if name.startswith("few") else block


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all: several processes may start at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, written = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(written, path)

"""Measuring on a GPU: times of captured work, and the card's own ceilings, taken in the same run.

Kernels of a few microseconds are timed as CUDA graphs: launched one by one, the gaps between them would be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from saddle.kernels import stream

ROUNDS = 15
FP8_SIZE = 8192


def graph_ms(work: Callable[[], object], rounds: int = ROUNDS, repeats: int = 1) -> float:
    """Milliseconds of `work`, the median of `rounds` replays of a graph that holds it.

    Args:
        work: enqueues kernels on the current stream; waits for nothing.
        repeats: replays between two events, for work so short that events would count.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles, and fills caches of the launchers
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()

    def run() -> None:
        for _ in range(repeats):
            graph.replay()

    return _timed(run, rounds) / repeats


def _timed(run: Callable[[], object], rounds: int) -> float:
    """Median milliseconds between events around `run`."""
    found = []
    torch.cuda.synchronize()
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)))
    return median(found)


def read_bytes_per_s(memory: Sequence[torch.Tensor], least_bytes: int = 4 << 30) -> float:
    """The rate at which the card reads, measured on tensors that are there anyway (several times its cache).

    Args:
        memory: contiguous tensors; read until `least_bytes` are together, over and over if they are fewer.
    """
    large = sorted(memory, key=lambda tensor: tensor.numel() * tensor.element_size(), reverse=True)
    chosen: list[torch.Tensor] = []
    total = 0
    for tensor in large:
        if total >= least_bytes:
            break
        chosen.append(tensor.view(-1).view(torch.uint8))
        total += chosen[-1].numel()
    out = torch.empty(max(stream.num_programs(one) for one in chosen), dtype=torch.int32, device=chosen[0].device)
    num_bytes = sum(stream.read(one, out) for one in chosen)
    return num_bytes / (_timed(lambda: [stream.read(one, out) for one in chosen], ROUNDS) * 1e-3)


def fp8_flops_per_s(size: int = FP8_SIZE) -> float | None:
    """What the library's FP8 product reaches (one scale a tensor): the ceiling of prompts. None: it has none here."""
    def product() -> object:
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    try:
        one = torch.ones((), device="cuda")
        a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        b = b.t()
        product()
    except (RuntimeError, ValueError, AttributeError):
        return None
    return 2 * size**3 / (_timed(lambda: [product() for _ in range(5)], ROUNDS) / 5 * 1e-3)

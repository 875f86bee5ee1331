"""What the sampling kernels must draw: torch's sampler, row by row, and the rows' table that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saddle.protocol import SamplingParams
from saddle.runner import truncation
from saddle.runner.device_rows import row_numbers
from saddle.runner.random import gumbel, keys_of

# Everything that takes a different way through the kernels.
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=40, top_p=0.95),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.5),
    SamplingParams(min_p=0.1),
    SamplingParams(top_p=0.999, temperature=2.0),
    SamplingParams(top_k=200),
    SamplingParams(top_k=300, top_p=0.9, min_p=0.01),
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_k=64, min_p=0.3),
    SamplingParams(min_p=1e-9),
    SamplingParams(top_k=1 << 20),
    SamplingParams(top_k=65, top_p=0.2, temperature=0.3),
)


def p_value(counts: torch.Tensor, probs: torch.Tensor, least: float = 20.0) -> tuple[float, int]:
    """Pearson's chi-square test that counts [V] are draws from probs [V].

    Ids that should come less than `least` times share one cell.

    Returns:
        The probability of counts at least as far off, 0 if something came that cannot, and the number of cells.
    """
    expected = probs.double() * counts.sum()
    if int(counts[expected == 0].sum()):
        return 0.0, 0
    own = expected >= least
    wanted, found = ([*part[own].tolist(), float(part[~own].sum())] for part in (expected, counts.double()))
    cells = [(w, f) for w, f in zip(wanted, found, strict=True) if w > 0]
    distance = sum((f - w) ** 2 / w for w, f in cells)
    half = torch.tensor([(len(cells) - 1) / 2, distance / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])), len(cells)


def state_of(params: Sequence[SamplingParams], seeds: Sequence[int], vocab_size: int) -> torch.Tensor:
    """[S, ROW_WIDTH] int32 as the rows of a device hold it."""
    numbers = [row_numbers(one, seed, 0, vocab_size) for one, seed in zip(params, seeds, strict=True)]
    return torch.tensor(numbers, dtype=torch.int32)


def scores(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> torch.Tensor:
    """[V] float64: noisy scores of one row's ids, -inf for those that are cut; the largest one is drawn."""
    vocab_size = logits.shape[-1]
    found = torch.full((vocab_size,), -torch.inf, dtype=torch.float64, device=logits.device)
    if params.is_greedy:
        return logits.double()

    def number(value: float) -> torch.Tensor:
        return torch.tensor([[value]], device=logits.device)

    limits = truncation.Limits(
        temperature=number(params.temperature),
        top_p=number(params.top_p),
        min_p=number(params.min_p),
        top_k=number(params.top_k if 0 < params.top_k < vocab_size else vocab_size),
    )
    is_cut = params.top_p < 1 or 0 < params.top_k < vocab_size
    kept, ids = truncation.candidates(logits[None].float(), limits, vocab_size if is_cut else 0)
    noise = gumbel(keys_of(seed)[None].to(ids.device), torch.tensor([position], device=ids.device), ids)
    found[ids[0]] = (noise + kept)[0]
    return found

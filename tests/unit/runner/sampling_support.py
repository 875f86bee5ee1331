"""A sampler over rows that the test sets up, and the plainest possible reference: a full softmax and a sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saddle.protocol import RowAdmit, RowSample, RowWork, SamplingParams, StepMask
from saddle.runner.rows import Rows
from saddle.runner.sampler import Sampler

CPU = torch.device("cpu")
EOS = frozenset({1})


@dataclass(frozen=True)
class Row:
    """A request at the point where it samples."""

    params: SamplingParams
    seed: int = 0
    prompt: Sequence[int] = (0,)
    output: Sequence[int] = ()


def sampler_over(requests: Sequence[Row], vocab_size: int, num_valid: int | None = None) -> tuple[Rows, Sampler]:
    """Rows that hold the requests, request i in row i, and their sampler."""
    longest = max(len(r.prompt) + len(r.output) for r in requests)
    rows = Rows(len(requests), longest + 8, 16, vocab_size, CPU)
    sampler = Sampler(rows, vocab_size if num_valid is None else num_valid, EOS)
    for row, request in enumerate(requests):
        ids = [*request.prompt, *request.output]
        admit = RowAdmit(row, 1, ids, len(request.prompt), 0, [], request.params, request.seed)
        rows.admit(admit)
        sampler.admit(admit)
    return rows, sampler


def sample(
    requests: Sequence[Row],
    logits: torch.Tensor,
    mask: StepMask | None = None,
    num_valid: int | None = None,
    order: Sequence[int] | None = None,
) -> list[RowSample]:
    """One sampling of all requests, in `order`.

    Args:
        logits: [V], the same for all, or [S, V].
    """
    rows, sampler = sampler_over(requests, logits.shape[-1], num_valid)
    order = range(len(requests)) if order is None else order
    lengths = [len(requests[row].prompt) + len(requests[row].output) for row in order]
    work = [RowWork(row, 1, length, 0, [], True, length) for row, length in zip(order, lengths, strict=True)]
    rows.begin(work)
    table = logits.expand(len(requests), -1)[list(order)].clone()
    return sampler.sample(table, work, torch.tensor(list(order)), torch.tensor(lengths), mask)


def ids(samples: Sequence[RowSample]) -> list[int]:
    return [token_id for sample in samples for token_id in sample.token_ids]


def draws(params: SamplingParams, logits: torch.Tensor, count: int, **request: Sequence[int]) -> list[int]:
    """Ids that `count` different seeds give."""
    return ids(sample([Row(params, seed, **request) for seed in range(count)], logits))


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[V] float64: what temperature, top_k, top_p and min_p leave, by sorting the whole vocabulary; no ties."""
    scaled = logits.double() / params.temperature
    order = scaled.argsort(descending=True)
    probs = scaled.softmax(-1)[order]
    if params.top_k > 0:
        probs[params.top_k :] = 0
        probs /= probs.sum()
    before = probs.cumsum(-1) - probs
    if params.top_p < 1:
        probs[before >= params.top_p] = 0
    probs[probs < params.min_p * probs[0]] = 0
    found = torch.zeros_like(probs)
    found[order] = probs / probs.sum()
    return found


def assert_drawn_from(found: Sequence[int], probs: torch.Tensor) -> None:
    """Pearson's chi-square of drawn ids against probabilities, five standard deviations allowed."""
    counts = torch.bincount(torch.tensor(found), minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0, "ids outside of the support were drawn"
    expected = probs * len(found)
    likely = expected >= 5
    cells = torch.cat((counts[likely], counts[~likely].sum()[None]))
    means = torch.cat((expected[likely], expected[~likely].sum()[None]))
    cells, means = cells[means > 0], means[means > 0]
    distance = float(((cells - means) ** 2 / means).sum())
    freedom = len(cells) - 1
    assert distance < freedom + 5 * math.sqrt(2 * freedom), f"chi-square {distance:.1f} at {freedom} degrees"

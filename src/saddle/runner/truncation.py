"""top_k, top_p and min_p without sorting the vocabulary.

Rows with a top_k (the family's default is 40) look at that many candidates only. Otherwise the cut
of top_p is found by bisection on the probability: forty passes give the exact set but for ties, on any device and
without waiting for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BISECTIONS = 40
FEW = 1024  # up to this top_k, candidates are gathered


@dataclass(frozen=True, slots=True)
class Limits:
    """Truncation of S rows, on the device; `largest_top_k` on the host: 0 if any row has none.

    top_k  [S] int64, the vocabulary's size where it is off
    top_p, min_p  [S] float32
    cuts_*  whether any row uses it
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    largest_top_k: int
    cuts_top_k: bool
    cuts_top_p: bool
    cuts_min_p: bool


def candidates(scaled: torch.Tensor, limits: Limits) -> tuple[torch.Tensor, torch.Tensor]:
    """What may be sampled.

    Args:
        scaled: [S, V] float32, logits over temperature.

    Returns:
        logits [S, K] float32, -inf for what is cut, and the token ids [S, K] they belong to.
    """
    if 0 < limits.largest_top_k <= FEW:
        return _few(scaled, limits)
    return _many(scaled, limits)


def _few(scaled: torch.Tensor, limits: Limits) -> tuple[torch.Tensor, torch.Tensor]:
    logits, ids = torch.topk(scaled, min(limits.largest_top_k, scaled.shape[1]), dim=-1)  # sorted, largest first
    ranks = torch.arange(logits.shape[1], device=logits.device)
    logits = logits.masked_fill(ranks >= limits.top_k.unsqueeze(1), -torch.inf)
    if limits.cuts_top_p or limits.cuts_min_p:
        probs = torch.softmax(logits, dim=-1)
        before = probs.cumsum(-1) - probs  # mass of more likely tokens; the first one always stays
        cut = (before >= limits.top_p.unsqueeze(1)) | (probs < limits.min_p.unsqueeze(1) * probs[:, :1])
        cut[:, 0] = False
        logits = logits.masked_fill(cut, -torch.inf)
    return logits, ids


def _many(scaled: torch.Tensor, limits: Limits) -> tuple[torch.Tensor, torch.Tensor]:
    size = scaled.shape[1]
    if limits.cuts_top_k:  # a top_k above FEW: rare enough for a sort
        ordered = scaled.sort(dim=-1, descending=True).values
        scaled = scaled.masked_fill(scaled < ordered.gather(1, (limits.top_k - 1).unsqueeze(1)), -torch.inf)
    if limits.cuts_top_p or limits.cuts_min_p:
        probs = torch.softmax(scaled, dim=-1)
        highest = probs.amax(-1, keepdim=True)
        threshold = torch.minimum(torch.maximum(_top_p_threshold(probs, limits.top_p.unsqueeze(1)),
                                                limits.min_p.unsqueeze(1) * highest), highest)  # fmt: skip
        scaled = scaled.masked_fill(probs < threshold, -torch.inf)
    ids = torch.arange(size, device=scaled.device).expand_as(scaled)
    return scaled, ids


def _top_p_threshold(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[S, 1]: the largest probability t such that the tokens of at least t have a mass of top_p."""
    low = torch.zeros_like(top_p)
    high = probs.amax(-1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mass = torch.where(probs >= middle, probs, 0).sum(-1, keepdim=True)
        enough = mass >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(top_p < 1, low, 0)

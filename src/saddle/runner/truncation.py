"""top_k, top_p and min_p without sorting the vocabulary.

Rows with a top_k (the family's default is 40) look at that many candidates only. Otherwise the cut of top_p is found
by bisection on the probability: forty passes give the exact set but for ties, on any device and without waiting for
it. A row's candidates are a function of its own logits and parameters, whatever rows are computed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BISECTIONS = 40
# Candidates that are gathered for rows with a top_k up to that many. Not the row's own top_k: what a search for the k
# largest does with ties may depend on k, and a row's neighbours must not change its tokens.
WIDTHS = (64, 1024)


def width_of(top_k: int, vocab_size: int) -> int:
    """Number of candidates to gather for a row; 0: its whole vocabulary is looked at."""
    if not 0 < top_k < vocab_size:
        return 0
    return next((min(width, vocab_size) for width in WIDTHS if top_k <= width), 0)


@dataclass(frozen=True, slots=True)
class Limits:
    """Parameters of S rows on the device, and on the host whether any of them needs a step.

    temperature, top_p, min_p  [S, 1] float32
    top_k  [S, 1] int64, the vocabulary's size where it is off
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    cuts_top_k: bool
    cuts_probs: bool  # top_p or min_p


def candidates(logits: torch.Tensor, limits: Limits, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What may be sampled.

    Args:
        logits: [S, V] float32, before temperature.
        width: from `width_of`, the same for all rows.

    Returns:
        logits over temperature [S, K] float32, -inf for what is cut, and the token ids [S, K] they belong to.
    """
    return _few(logits, limits, width) if width else _all(logits, limits)


def _few(logits: torch.Tensor, limits: Limits, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, ids = torch.topk(logits, width, dim=-1)  # sorted, largest first
    cut = torch.arange(width, device=logits.device) >= limits.top_k
    logits = (logits / limits.temperature).masked_fill_(cut, -torch.inf)
    if limits.cuts_probs:
        probs = torch.softmax(logits, dim=-1)
        before = probs.cumsum(-1) - probs  # mass of the more likely tokens
        cut = ((before >= limits.top_p) & (limits.top_p < 1)) | (probs < limits.min_p * probs[:, :1])
        cut[:, 0] = False  # the most likely one always stays
        logits.masked_fill_(cut, -torch.inf)
    return logits, ids


def _all(logits: torch.Tensor, limits: Limits) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits / limits.temperature
    if limits.cuts_top_k:  # a top_k above all widths: rare enough for a sort
        ordered = scaled.sort(dim=-1, descending=True).values
        scaled = scaled.masked_fill(scaled < ordered.gather(1, limits.top_k - 1), -torch.inf)
    if limits.cuts_probs:
        probs = torch.softmax(scaled, dim=-1)
        highest = probs.amax(-1, keepdim=True)
        least = torch.maximum(_top_p_threshold(probs, highest, limits.top_p), limits.min_p * highest)
        scaled = scaled.masked_fill(probs < torch.minimum(least, highest), -torch.inf)
    return scaled, torch.arange(scaled.shape[1], device=scaled.device).expand_as(scaled)


def _top_p_threshold(probs: torch.Tensor, highest: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[S, 1]: the largest probability t such that the tokens of at least t have a mass of top_p; 0 where it is off."""
    low, high = torch.zeros_like(top_p), highest
    for _ in range(BISECTIONS):
        middle = (low + high) * 0.5
        enough = torch.where(probs >= middle, probs, 0).sum(-1, keepdim=True) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(top_p < 1, low, 0)

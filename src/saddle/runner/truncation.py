"""top_k, top_p and min_p, without sorting the vocabulary where that can be avoided.

    top_k up to 1024      the largest 64 or 1024 logits are gathered (the family's default is top_k 40)
    top_p, larger top_k   the vocabulary is sorted: the only way to an exact set that waits for nothing
    neither               nothing is moved; min_p compares with the largest logit

A row's candidates are a function of its own logits and parameters, whatever rows are computed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saddle.protocol import SamplingParams

# Two, so that rows with different top_k share a call. Not the largest top_k of the rows: what a search for the k
# largest does with ties may depend on k, and a row's neighbours must not change its tokens.
WIDTHS = (64, 1024)


def width_of(params: SamplingParams, vocab_size: int) -> int:
    """Number of candidates to gather for a row; 0: all, in the order of the vocabulary."""
    if 0 < params.top_k < vocab_size:
        return min(next((width for width in WIDTHS if params.top_k <= width), vocab_size), vocab_size)
    return vocab_size if params.top_p < 1 else 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Parameters of S rows.

    temperature, top_p, min_p  [S, 1] float32
    top_k  [S, 1] int64, the vocabulary's size where it is off
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor


def candidates(logits: torch.Tensor, limits: Limits, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What may be sampled.

    Args:
        logits: [S, V] float32, before temperature.
        width: from `width_of`, the same for all rows.

    Returns:
        logits over temperature [S, K] float32, -inf for what is cut, and the token ids [S, K] they belong to.
    """
    if width == 0:
        scaled = logits / limits.temperature
        least = scaled.amax(-1, keepdim=True) + limits.min_p.log()
        ids = torch.arange(scaled.shape[1], device=scaled.device).expand_as(scaled)
        return scaled.masked_fill_(scaled < least, -torch.inf), ids
    if width == logits.shape[1]:
        ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    else:
        ordered, ids = torch.topk(logits, width, dim=-1)
    scaled = ordered / limits.temperature
    scaled.masked_fill_(torch.arange(width, device=logits.device) >= limits.top_k, -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    before = probs.cumsum(-1) - probs  # mass of the more likely ids; may round to 1 and a little more
    cut = ((before >= limits.top_p) & (limits.top_p < 1)) | (probs < limits.min_p * probs[:, :1])
    cut[:, 0] = False  # the most likely one always stays
    return scaled.masked_fill_(cut, -torch.inf), ids

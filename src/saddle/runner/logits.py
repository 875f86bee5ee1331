"""What a request does to its logits before anything is drawn: bias, permitted ids, penalties, grammar masks.

Most requests do nothing here, so state exists only for rows that ask, and a step touches only those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saddle.protocol import RowAdmit, SamplingParams


@dataclass(slots=True)
class RowEdits:
    """One row's edits; None where the request does not ask.

    bias_ids, bias   logit_bias
    banned     [V] bool: outside allowed_token_ids
    bad_words  sequences of two and more ids; the last id is banned after the others
    until_min  ids that must not come before `min_tokens`
    in_prompt, counts  [V] bool and [V] float32: for the penalties
    """

    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    banned: torch.Tensor | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    until_min: torch.Tensor | None = None
    in_prompt: torch.Tensor | None = None
    counts: torch.Tensor | None = None


def edits_of(admit: RowAdmit, vocab_size: int, eos_ids: frozenset[int], device: torch.device) -> RowEdits | None:
    """The edits that a request asks for, None for most."""
    params = admit.params
    edits = RowEdits()
    if params.logit_bias:
        edits.bias_ids = torch.tensor(list(params.logit_bias), device=device)
        edits.bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
    single = [word[0] for word in params.bad_words_ids if len(word) == 1]
    if params.allowed_token_ids is not None or single:
        edits.banned = torch.full((vocab_size,), params.allowed_token_ids is not None, device=device)
        if params.allowed_token_ids is not None:
            edits.banned[torch.tensor(params.allowed_token_ids, device=device)] = False
        if single:
            edits.banned[torch.tensor(single, device=device)] = True
    edits.bad_words = tuple(word for word in params.bad_words_ids if len(word) > 1)
    stops = {*params.stop_token_ids, *eos_ids}
    if params.min_tokens and stops:
        edits.until_min = torch.tensor(sorted(stops), device=device)
    if params.has_penalties:
        prompt = torch.tensor(admit.token_ids[: admit.num_prompt], device=device)
        output = torch.tensor(admit.token_ids[admit.num_prompt :], dtype=torch.int64, device=device)
        edits.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        edits.in_prompt[prompt] = True
        edits.counts = torch.bincount(output, minlength=vocab_size).to(torch.float32)
    return None if edits == RowEdits() else edits


def apply(
    logits: torch.Tensor, edits: RowEdits, params: SamplingParams, written: torch.Tensor, num_output: int
) -> None:
    """Edit one row's logits [V] in place, in the order that `SamplingParams` states.

    Args:
        written: [n] int64, all ids of the row so far.
        num_output: how many of them were generated.
    """
    if edits.bias_ids is not None and edits.bias is not None:
        logits[edits.bias_ids] += edits.bias
    if edits.banned is not None:
        logits.masked_fill_(edits.banned, -torch.inf)
    for word in edits.bad_words:
        _ban_completion(logits, word, written)
    if edits.until_min is not None and num_output < params.min_tokens:
        logits[edits.until_min] = -torch.inf
    if edits.in_prompt is not None and edits.counts is not None:
        penalise(logits, edits.in_prompt, edits.counts, params)


def penalise(logits: torch.Tensor, in_prompt: torch.Tensor, counts: torch.Tensor, params: SamplingParams) -> None:
    """Repetition penalty on ids of prompt and output; presence and frequency penalties on ids of the output."""
    came = counts > 0
    if params.repetition_penalty != 1.0:
        factor = torch.where(came | in_prompt, params.repetition_penalty, 1.0)
        logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits -= params.presence_penalty * came + params.frequency_penalty * counts


def _ban_completion(logits: torch.Tensor, word: tuple[int, ...], written: torch.Tensor) -> None:
    head = torch.tensor(word[:-1], device=written.device)
    if len(written) >= len(head):
        follows = (written[-len(head) :] == head).all()
        logits[word[-1]] = torch.where(follows, -torch.inf, logits[word[-1]])


def mask_bits(bits: bytes, vocab_size: int, device: torch.device) -> torch.Tensor:
    """[V] bool: True for the ids whose bit is set (little-endian bits, see `StepMask`)."""
    packed = torch.frombuffer(bytearray(bits), dtype=torch.uint8).to(device)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return ((packed.unsqueeze(1) >> shifts) & 1).flatten()[:vocab_size].to(torch.bool)

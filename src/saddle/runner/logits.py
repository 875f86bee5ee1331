"""What a request does to its logits before anything is drawn: bias, permitted ids, penalties, grammar masks.

Most requests do nothing here, so state exists only for rows that ask, and a step touches only those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saddle.protocol import RowAdmit, SamplingParams


@dataclass(frozen=True, slots=True)
class BadWords:
    """Forbidden sequences of one length: the last id is banned where the row ends with the others.

    heads  [n, length - 1] int64
    lasts  [n] int64
    """

    heads: torch.Tensor
    lasts: torch.Tensor


@dataclass(slots=True, eq=False)
class RowEdits:
    """One row's edits; None where the request does not ask.

    bias_ids, bias   logit_bias
    banned     [V] bool: outside allowed_token_ids, and bad words of one id
    bad_words  the longer ones
    until_min  ids that must not come before `min_tokens`
    in_prompt, counts  [V] bool and [V] float32, for the penalties; `counts` grows with every id drawn
    """

    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    banned: torch.Tensor | None = None
    bad_words: tuple[BadWords, ...] = ()
    until_min: torch.Tensor | None = None
    in_prompt: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        given = (self.bias, self.banned, self.until_min, self.counts)
        return not self.bad_words and all(one is None for one in given)


def edits_of(
    admit: RowAdmit, vocab_size: int, eos_ids: frozenset[int], device: torch.device
) -> RowEdits | None:
    """The edits that a request asks for, None for most."""
    params = admit.params

    def ids(values: list[int]) -> torch.Tensor:
        return _upload(values, torch.int64, device)

    edits = RowEdits(bad_words=_bad_words(params, device))
    if params.logit_bias:
        edits.bias_ids = ids(list(params.logit_bias))
        edits.bias = _upload(list(params.logit_bias.values()), torch.float32, device)
    single = [word[0] for word in params.bad_words_ids if len(word) == 1]
    if params.allowed_token_ids is not None or single:
        edits.banned = torch.full((vocab_size,), params.allowed_token_ids is not None, device=device)
        if params.allowed_token_ids is not None:
            edits.banned[ids(list(params.allowed_token_ids))] = False
        edits.banned[ids(single)] = True
    # Ids that cannot come need no ban, and EOS does not stop a request that ignores it.
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
    stops = {token for token in stops if 0 <= token < vocab_size}
    if params.min_tokens and stops:
        edits.until_min = ids(sorted(stops))
    if params.has_penalties:
        edits.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        edits.in_prompt[ids(admit.token_ids[: admit.num_prompt])] = True
        output = ids(admit.token_ids[admit.num_prompt :])
        edits.counts = torch.bincount(output, minlength=vocab_size).to(torch.float32)
    return None if edits.is_empty else edits


def _upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers on the device, without waiting for what it is busy with."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _bad_words(params: SamplingParams, device: torch.device) -> tuple[BadWords, ...]:
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for word in params.bad_words_ids:
        by_length[len(word)].append(word)
    found = []
    for length, words in by_length.items():
        if length > 1:
            table = _upload(words, torch.int64, device)
            found.append(BadWords(table[:, :-1], table[:, -1]))
    return tuple(found)


def apply(
    logits: torch.Tensor, edits: RowEdits, params: SamplingParams, written: torch.Tensor, num_output: int
) -> None:
    """Edit one row's logits [V] in place, in the order that `SamplingParams` states.

    Args:
        written: [n] int64, all ids of the row so far.
        num_output: how many of them were generated.
    """
    if edits.bias_ids is not None and edits.bias is not None:
        logits.index_add_(0, edits.bias_ids, edits.bias)
    if edits.banned is not None:
        logits.masked_fill_(edits.banned, -torch.inf)
    for words in edits.bad_words:
        _ban_completions(logits, words, written)
    if edits.until_min is not None and num_output < params.min_tokens:
        logits.index_fill_(0, edits.until_min, -torch.inf)
    if edits.in_prompt is not None and edits.counts is not None:
        penalise(logits, edits.in_prompt, edits.counts, params)


def penalise(logits: torch.Tensor, in_prompt: torch.Tensor, counts: torch.Tensor, params: SamplingParams) -> None:
    """Repetition penalty on ids of prompt and output; presence and frequency penalties on ids of the output."""
    came = counts > 0
    if params.repetition_penalty != 1.0:
        repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits.copy_(torch.where(came | in_prompt, repeated, logits))
    if params.presence_penalty:
        logits.sub_(came.to(logits.dtype), alpha=params.presence_penalty)
    if params.frequency_penalty:
        logits.sub_(counts, alpha=params.frequency_penalty)


def _ban_completions(logits: torch.Tensor, words: BadWords, written: torch.Tensor) -> None:
    length = words.heads.shape[1]
    if len(written) >= length:
        follows = (words.heads == written[-length:]).all(-1)
        # Added, not set: two words may end with the same id.
        logits.index_add_(0, words.lasts, torch.where(follows, -torch.inf, 0.0))


def check_mask(bits: bytes, vocab_size: int) -> None:
    """Raise ValueError unless there are as many bits as the vocabulary needs."""
    needed = 4 * -(-vocab_size // 32)
    if len(bits) != needed:
        raise ValueError(f"a mask of {vocab_size} ids has {needed} bytes, got {len(bits)}")


def mask_bits(bits: bytes, vocab_size: int, device: torch.device) -> torch.Tensor:
    """[V] bool: True for the ids whose bit is set (little-endian bits, see `StepMask`).

    Raises:
        ValueError: there are not as many bits as the vocabulary needs.
    """
    check_mask(bits, vocab_size)
    packed = torch.frombuffer(bytearray(bits), dtype=torch.uint8).to(device)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return ((packed.unsqueeze(1) >> shifts) & 1).flatten()[:vocab_size].to(torch.bool)

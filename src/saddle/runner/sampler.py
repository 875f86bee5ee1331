"""Logits in, token ids out, for the rows of a step.

    edits (bias, bans, penalties, grammar)  ->  temperature  ->  top_k, top_p, min_p  ->  argmax with Gumbel noise

Greedy rows take the argmax of the edited logits. Log-probabilities are those of the logits as the model gave them.
The host reads one small tensor a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saddle.protocol import RowAdmit, RowSample, RowWork, SamplingParams, StepMask, TokenLogprobs
from saddle.runner import logits as edit
from saddle.runner import truncation
from saddle.runner.random import gumbel
from saddle.runner.rows import Rows


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of n positions: sampled id's value and rank [n], and the best `top` ids [n, k]."""

    logprob: torch.Tensor
    rank: torch.Tensor
    top_logprobs: torch.Tensor
    top_ids: torch.Tensor


class Sampler:
    """Samples for rows whose edits it keeps.

    Args:
        vocab_size: width of the logits.
        num_valid_tokens: ids from here on are padding of the embedding and never sampled.
    """

    def __init__(self, rows: Rows, vocab_size: int, num_valid_tokens: int, eos_ids: frozenset[int]) -> None:
        self._rows = rows
        self._vocab_size = vocab_size
        self._num_valid = num_valid_tokens
        self._eos_ids = eos_ids
        self._edits: dict[int, edit.RowEdits] = {}

    def admit(self, admit: RowAdmit) -> None:
        """Prepare for a row's new request."""
        self._edits.pop(admit.row, None)
        edits = edit.edits_of(admit, self._vocab_size, self._eos_ids, self._rows.device)
        if edits is not None:
            self._edits[admit.row] = edits

    def sample(
        self, logits: torch.Tensor, work: list[RowWork], row_index: torch.Tensor, mask: StepMask | None
    ) -> list[RowSample]:
        """Draw one id for each row and write it to the rows.

        Args:
            logits: [S, V] float32; row i belongs to `work[i]`. May be overwritten.
            row_index: [S] int64, the rows of `work` on the device.
        """
        params = [self._rows.params[item.row] for item in work]
        scored = [i for i, p in enumerate(params) if p.logprobs is not None]
        raw = torch.log_softmax(logits[scored], dim=-1) if scored else None
        if self._num_valid < self._vocab_size:
            logits[:, self._num_valid :] = -torch.inf
        self._edit(logits, work, mask)
        positions = self._rows.num_computed[row_index]
        ids = self._choose(logits, params, self._rows.seeds[row_index], positions)
        self._rows.append(row_index, ids)
        self._count(ids, work)
        scores = None
        if raw is not None:
            index = torch.tensor(scored, device=ids.device)
            scores = score(raw, ids[index], max(params[i].logprobs or 0 for i in scored))
        return _to_host(work, params, ids, scored, scores)

    def _edit(self, logits: torch.Tensor, work: list[RowWork], mask: StepMask | None) -> None:
        if mask is not None:
            slots = {item.row: slot for slot, item in enumerate(work)}
            for row, bits in zip(mask.rows, mask.bits, strict=True):
                if row in slots:
                    allowed = edit.mask_bits(bits, self._vocab_size, logits.device)
                    logits[slots[row]].masked_fill_(~allowed, -torch.inf)
        if not self._edits:
            return
        rows = self._rows
        for slot, item in enumerate(work):
            edits = self._edits.get(item.row)
            if edits is not None:
                length = rows.computed_on_host[item.row]
                written = rows.token_ids[item.row, :length]
                edit.apply(logits[slot], edits, rows.params[item.row], written, length - rows.num_prompt[item.row])

    def _choose(
        self, logits: torch.Tensor, params: list[SamplingParams], seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        kinds: dict[str, list[int]] = {}
        for i, p in enumerate(params):
            few = 0 < p.top_k <= truncation.FEW
            kinds.setdefault("greedy" if p.is_greedy else "few" if few else "many", []).append(i)
        if len(kinds) == 1 and "greedy" not in kinds:
            return self._draw(logits, params, seeds, positions)
        ids = logits.argmax(-1)
        for kind, members in kinds.items():
            if kind != "greedy":
                index = torch.tensor(members, device=logits.device)
                ids[index] = self._draw(logits[index], [params[i] for i in members], seeds[index], positions[index])
        return ids

    def _draw(
        self, logits: torch.Tensor, params: list[SamplingParams], seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        size, device = logits.shape[1], logits.device
        values = torch.tensor([[p.temperature, p.top_p, p.min_p] for p in params], device=device)
        top_k = [p.top_k if 0 < p.top_k < size else size for p in params]
        limits = truncation.Limits(
            top_k=torch.tensor(top_k, device=device),
            top_p=values[:, 1],
            min_p=values[:, 2],
            largest_top_k=0 if size in top_k else max(top_k),
            cuts_top_k=any(k < size for k in top_k),
            cuts_top_p=any(p.top_p < 1 for p in params),
            cuts_min_p=any(p.min_p > 0 for p in params),
        )
        kept, ids = truncation.candidates(logits / values[:, :1], limits)
        noisy = kept.to(torch.float64) + gumbel(seeds, positions, ids)
        return ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1)

    def _count(self, ids: torch.Tensor, work: list[RowWork]) -> None:
        for slot, item in enumerate(work):
            edits = self._edits.get(item.row)
            if edits is not None and edits.counts is not None:
                edits.counts[ids[slot]] += 1


def score(logprobs: torch.Tensor, ids: torch.Tensor, num_top: int) -> Scores:
    """Value and rank of `ids` [n] and the `num_top` best in log-probabilities [n, V]."""
    own = logprobs.gather(1, ids.unsqueeze(1))
    top, top_ids = torch.topk(logprobs, min(num_top, logprobs.shape[1]), dim=-1)
    return Scores(own.squeeze(1), (logprobs > own).sum(-1) + 1, top, top_ids)


def to_logprobs(ids: list[int], scores: Scores, num_top: list[int]) -> list[TokenLogprobs]:
    """Scores as the engine takes them; `num_top[i]` of the best ids for position i."""
    own, rank = scores.logprob.tolist(), scores.rank.tolist()
    top, top_ids = scores.top_logprobs.tolist(), scores.top_ids.tolist()
    return [
        TokenLogprobs(token_id, own[i], rank[i], list(zip(top_ids[i][:count], top[i][:count], strict=True)))
        for i, (token_id, count) in enumerate(zip(ids, num_top, strict=True))
    ]


def _to_host(
    work: list[RowWork], params: list[SamplingParams], ids: torch.Tensor, scored: list[int], scores: Scores | None
) -> list[RowSample]:
    token_ids: list[int] = ids.tolist()
    found: dict[int, TokenLogprobs] = {}
    if scores is not None:
        entries = to_logprobs([token_ids[i] for i in scored], scores, [params[i].logprobs or 0 for i in scored])
        found = dict(zip(scored, entries, strict=True))
    return [
        RowSample(item.row, item.epoch, [token_ids[i]], [found[i]] if i in found else None)
        for i, item in enumerate(work)
    ]

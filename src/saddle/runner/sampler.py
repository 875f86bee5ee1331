"""Logits in, token ids out, for the rows of a step.

    edits (bias, bans, penalties, grammar)  ->  temperature  ->  top_k, top_p, min_p  ->  argmax with Gumbel noise

Greedy rows take the argmax of the edited logits. Log-probabilities are those of the logits as the model gave them,
over the ids that exist. The host reads one tensor a step.
"""

from __future__ import annotations

import torch

from saddle.protocol import RowAdmit, RowSample, RowWork, StepMask, TokenLogprobs
from saddle.runner import logits as edit
from saddle.runner import truncation
from saddle.runner.random import gumbel
from saddle.runner.rows import Rows

GREEDY = -1  # in place of a width of candidates
MAX_SCORED = 256  # positions whose log-probabilities over the vocabulary exist at once


class Sampler:
    """Samples for rows whose edits it keeps.

    Args:
        num_valid_tokens: ids from here on are padding of the embedding; they are never sampled and have no share in
            probabilities.
    """

    def __init__(self, rows: Rows, num_valid_tokens: int, eos_ids: frozenset[int]) -> None:
        self._rows = rows
        self._vocab_size = rows.vocab_size
        self._num_valid = num_valid_tokens
        self._eos_ids = eos_ids
        self._edits: dict[int, edit.RowEdits] = {}
        self._widths = [GREEDY] * len(rows.epochs)

    def admit(self, admit: RowAdmit) -> None:
        """Prepare for a row's new request."""
        row, params = admit.row, admit.params
        self._edits.pop(row, None)
        edits = edit.edits_of(admit, self._vocab_size, self._eos_ids, self._rows.device)
        if edits is not None:
            self._edits[row] = edits
        self._widths[row] = GREEDY if params.is_greedy else truncation.width_of(params, self._vocab_size)

    def sample(
        self, logits: torch.Tensor, work: list[RowWork], rows: torch.Tensor, positions: torch.Tensor,
        mask: StepMask | None,
    ) -> list[RowSample]:  # fmt: skip
        """Draw one id for each row and write it to the rows.

        Args:
            logits: [S, V] float32; row i belongs to `work[i]`. May be overwritten.
            rows, positions: [S] int64, the rows of `work` and the positions that the new tokens take.
        """
        self._hide_padding(logits)
        num_top = {slot: count for slot, item in enumerate(work)
                   if (count := self._rows.params[item.row].logprobs) is not None}  # fmt: skip
        raw = logits[list(num_top)] if num_top else None
        self._mask(logits, work, mask)
        self._edit(logits, work)
        ids = self._choose(logits, work, rows, positions)
        self._rows.append(rows, positions, ids)
        self._count(ids, work)
        if raw is None:
            token_ids: list[int] = ids.tolist()
            return [RowSample(item.row, item.epoch, [token_id])
                    for item, token_id in zip(work, token_ids, strict=True)]  # fmt: skip
        scores = score(raw, ids[list(num_top)], max(num_top.values()))
        numbers = torch.cat((ids.to(torch.float64), scores.flatten())).tolist()
        token_ids = [int(number) for number in numbers[: len(work)]]
        entries = to_logprobs(numbers[len(work) :], scores.shape[1], list(num_top.values()))
        found = dict(zip(num_top, entries, strict=True))
        return [RowSample(item.row, item.epoch, [token_ids[slot]], [found[slot]] if slot in found else None)
                for slot, item in enumerate(work)]  # fmt: skip

    def score_prompt(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
        """Log-probabilities of given ids.

        Args:
            logits: [N, V] float32. May be overwritten.
            token_ids: [N] int64.
        """
        self._hide_padding(logits)
        parts = [score(logits[start : start + MAX_SCORED], token_ids[start : start + MAX_SCORED], num_top)
                 for start in range(0, len(token_ids), MAX_SCORED)]  # fmt: skip
        scores = torch.cat(parts)
        return to_logprobs(scores.flatten().tolist(), scores.shape[1], [num_top] * len(token_ids))

    def _hide_padding(self, logits: torch.Tensor) -> None:
        if self._num_valid < self._vocab_size:
            logits[:, self._num_valid :] = -torch.inf

    def _mask(self, logits: torch.Tensor, work: list[RowWork], mask: StepMask | None) -> None:
        if mask is None:
            return
        slots = {item.row: slot for slot, item in enumerate(work)}
        for row, bits in zip(mask.rows, mask.bits, strict=True):
            if row in slots:
                allowed = edit.mask_bits(bits, self._vocab_size, logits.device)
                logits[slots[row]].masked_fill_(~allowed, -torch.inf)

    def _edit(self, logits: torch.Tensor, work: list[RowWork]) -> None:
        if not self._edits:
            return
        rows = self._rows
        for slot, item in enumerate(work):
            edits = self._edits.get(item.row)
            if edits is not None:
                length = rows.num_known[item.row]
                written = rows.token_ids[item.row, :length]
                edit.apply(logits[slot], edits, rows.params[item.row], written, length - rows.num_prompt[item.row])

    def _choose(
        self, logits: torch.Tensor, work: list[RowWork], rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        widths = [self._widths[item.row] for item in work]
        kinds = set(widths)
        if kinds == {GREEDY}:
            return logits.argmax(-1)
        if len(kinds) == 1:
            return self._draw(logits, rows, positions, widths[0])
        ids = logits.argmax(-1)
        for kind in kinds - {GREEDY}:
            members = [slot for slot, width in enumerate(widths) if width == kind]
            index = torch.tensor(members, device=logits.device)
            ids[index] = self._draw(logits[index], rows[index], positions[index], kind)
        return ids

    def _draw(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, width: int
    ) -> torch.Tensor:
        state = self._rows
        temperature, top_p, min_p = state.shaping.index_select(0, rows).chunk(3, dim=1)
        limits = truncation.Limits(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            top_k=state.top_k.index_select(0, rows).unsqueeze(1),
        )
        kept, ids = truncation.candidates(logits, limits, width)
        noise = gumbel(state.keys.index_select(0, rows), positions, ids)
        return ids.gather(1, noise.add_(kept).argmax(-1, keepdim=True)).squeeze(1)

    def _count(self, ids: torch.Tensor, work: list[RowWork]) -> None:
        if not self._edits:
            return
        for slot, item in enumerate(work):
            edits = self._edits.get(item.row)
            if edits is not None and edits.counts is not None:
                edits.counts.index_add_(0, ids[slot : slot + 1], edits.counts.new_ones(1))


def score(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> torch.Tensor:
    """Log-probabilities at n positions, ready for one copy to the host.

    Args:
        logits: [n, V] float32; ids: [n] int64.

    Returns:
        [n, 3 + 2 k] float64, k = min(num_top, V): id, its log-probability and rank, the k best log-probabilities,
        their ids. The rank is vLLM's: how many ids are at least as likely.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    own = logprobs.gather(1, ids.unsqueeze(1))
    rank = (logits >= logits.gather(1, ids.unsqueeze(1))).sum(-1, keepdim=True)
    top, top_ids = torch.topk(logprobs, min(num_top, logprobs.shape[1]), dim=-1)
    return torch.cat([part.to(torch.float64) for part in (ids.unsqueeze(1), own, rank, top, top_ids)], dim=1)


def to_logprobs(numbers: list[float], width: int, num_top: list[int]) -> list[TokenLogprobs]:
    """Rows of `score` as the engine takes them; the `num_top[i]` best ids for position i.

    Args:
        numbers: the rows, flattened; each has `width` numbers.
    """
    best = (width - 3) // 2
    found = []
    for place, count in enumerate(num_top):
        token_id, own, rank, *rest = numbers[place * width : (place + 1) * width]
        top = [(int(top_id), value) for top_id, value in zip(rest[best:], rest[:best], strict=True)]
        found.append(TokenLogprobs(int(token_id), own, int(rank), top[:count]))
    return found

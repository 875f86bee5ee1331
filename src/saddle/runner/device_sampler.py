"""Logits in, token ids out, on a GPU, without waiting for it.

Plain rows (greedy, temperature, top_k, top_p, min_p) take two launches in all, which can be a graph. What other rows
ask for is done in front, in place and for their slots alone, by one launch for all masks, one for all lists of edits
(bias, bans, least lengths) and one for all penalties. Log-probabilities are those of the logits as the model gave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saddle.kernels import logit_edits, logprobs, sampling
from saddle.protocol import RowAdmit, RowSample, RowWork, StepMask, TokenLogprobs
from saddle.runner import logits as edit
from saddle.runner.device_edits import DeviceEdits, device_edits_of
from saddle.runner.device_rows import DeviceRows
from saddle.runner.sampler import score, to_logprobs

MAX_SORTED = 16  # positions of which torch gives more of the best ids than the kernels do, at once


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew, still on the device.

    ids     [S] int32
    scores  [L, 3 + 2 k] float64 as `sampler.score` gives them, for the slots of `num_top`; None: nobody asks
    num_top slot -> how many log-probabilities it wants
    """

    work: list[RowWork]
    ids: torch.Tensor
    scores: torch.Tensor | None
    num_top: dict[int, int]


class DeviceSampler:
    """Samples for the rows of a GPU, whose edits it keeps.

    Args:
        num_valid_tokens: ids from here on are padding of the embedding; they are never sampled and have no share in
            probabilities.
    """

    def __init__(self, rows: DeviceRows, num_valid_tokens: int, eos_ids: frozenset[int]) -> None:
        num_rows = len(rows.epochs)
        self._rows = rows
        self._num_valid = num_valid_tokens
        self._eos_ids = eos_ids
        self._work = sampling.SamplingWork.allocate(num_rows, rows.vocab_size, rows.device)
        self._score_work = logprobs.LogprobWork.allocate(num_rows, rows.vocab_size, rows.device)
        self.ids = torch.zeros(num_rows, dtype=torch.int32, device=rows.device)
        self._edits: dict[int, DeviceEdits] = {}
        self._penalised: set[int] = set()
        self._scored: set[int] = set()
        self._counts: torch.Tensor | None = None  # made when the first row asks: it is as large as the logits

    @staticmethod
    def num_bytes(num_rows: int, vocab_size: int) -> int:
        """Work space, and the counts of penalties should they be asked for."""
        work = sampling.SamplingWork.num_bytes(num_rows, vocab_size)
        return work + logprobs.LogprobWork.num_bytes(num_rows, vocab_size) + 4 * num_rows * (vocab_size + 1)

    def admit(self, admit: RowAdmit) -> None:
        """Prepare for a row's new request; its tokens are in the rows already."""
        row, params = admit.row, admit.params
        self._edits.pop(row, None)
        self._penalised.discard(row)
        self._scored.discard(row)
        if params.logprobs is not None:
            self._scored.add(row)
        edits = device_edits_of(admit, self._rows.vocab_size, self._eos_ids, self._rows.device)
        if edits is not None:
            self._edits[row] = edits
        if params.has_penalties:
            self._penalised.add(row)
            tokens = self._rows.token_ids[row, : len(admit.token_ids)]
            logit_edits.mark_tokens(tokens, self._penalty_counts()[row], admit.num_prompt)

    def is_plain(self, work: list[RowWork], mask: StepMask | None) -> bool:
        """Whether no row asks for more than drawing."""
        special = self._edits.keys() | self._penalised | self._scored
        return mask is None and not (special and any(item.row in special for item in work))

    def launch(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Draw from logits as they are, write the ids to the rows and return them: [S] int32, static memory.

        Args:
            logits: [S, V] float32.
            rows, positions: [S] int32; row -1 pads.
        """
        ids = self.ids[: len(rows)]
        sampling.launch(logits, rows, positions, self._rows.state, self._work, self._rows.token_ids, ids,
                        self._num_valid)  # fmt: skip
        return ids

    def sample(
        self, logits: torch.Tensor, work: list[RowWork], rows: torch.Tensor, positions: torch.Tensor,
        mask: StepMask | None,
    ) -> Drawn:  # fmt: skip
        """Draw one id for each row that may ask for anything.

        Args:
            logits: [S, V] float32; row i belongs to `work[i]`, more than that are padding. Overwritten.
        """
        masked = set() if mask is None else set(mask.rows)
        changed = {slot for slot, item in enumerate(work)
                   if item.row in self._edits or item.row in self._penalised or item.row in masked}  # fmt: skip
        wanted = {slot: count for slot, item in enumerate(work)
                  if (count := self._rows.params[item.row].logprobs) is not None}  # fmt: skip
        # Only what is about to be edited has to be copied.
        kept, copied = [slot for slot in wanted if slot not in changed], [slot for slot in wanted if slot in changed]
        raw = logits.index_select(0, self._upload(copied)) if copied else None
        self._mask(logits, work, mask)
        self._edit(logits, work, positions)
        penalised = [slot for slot, item in enumerate(work) if item.row in self._penalised]
        slots = self._upload(penalised) if penalised else None
        if slots is not None:
            logit_edits.penalise_rows(logits, slots, rows, self._rows.state, self._penalty_counts())
        ids = self.launch(logits, rows, positions)
        if slots is not None:
            logit_edits.count_tokens(slots, rows, ids, self._penalty_counts())
        if not wanted:
            return Drawn(work, ids, None, {})
        most, parts = max(wanted.values()), []
        if kept:
            parts.append(self._score_rows(logits, self._upload(kept), ids, most))
        if raw is not None:
            parts.append(self.score(raw, ids.index_select(0, self._upload(copied)), most))
        num_top = {slot: wanted[slot] for slot in (*kept, *copied)}
        return Drawn(work, ids, parts[0] if len(parts) == 1 else torch.cat(parts), num_top)

    def score(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> torch.Tensor:
        """Log-probabilities of given ids, in the layout of `sampler.score`.

        Args:
            logits: [N, V] float32, at most as many positions as there are rows.
            token_ids: [N] int32.
        """
        return self._score_rows(logits, self._score_work.every[: len(token_ids)], token_ids, num_top)

    def _score_rows(
        self, logits: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor, num_top: int
    ) -> torch.Tensor:
        """`score` of some rows of the logits; `token_ids` are those of all of them."""
        num_top = min(num_top, self._num_valid)
        if num_top > logprobs.MAX_TOP:
            parts = [score(logits.index_select(0, some)[:, : self._num_valid],
                           token_ids.index_select(0, some).to(torch.int64), num_top)
                     for some in slots.split(MAX_SORTED)]  # type: ignore[no-untyped-call]  # fmt: skip
            return torch.cat(parts)
        out = torch.empty(len(slots), 3 + 2 * num_top, dtype=torch.float64, device=logits.device)
        logprobs.launch(logits, slots, token_ids, num_top, self._score_work, out, self._num_valid)
        return out

    def _penalty_counts(self) -> torch.Tensor:
        if self._counts is None:
            shape = len(self._rows.epochs), self._rows.vocab_size
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._rows.device)
        return self._counts

    def _mask(self, logits: torch.Tensor, work: list[RowWork], mask: StepMask | None) -> None:
        if mask is None:
            return
        places = {item.row: slot for slot, item in enumerate(work)}
        masked = [(places[row], bits) for row, bits in zip(mask.rows, mask.bits, strict=True) if row in places]
        if not masked:
            return
        num_words = -(-self._rows.vocab_size // 32)
        for _, bits in masked:
            edit.check_mask(bits, self._rows.vocab_size)
        packed = torch.empty(len(masked), num_words, dtype=torch.int32, pin_memory=logits.is_cuda)
        words = packed.numpy()  # a grammar's answer is waited for: written once, straight into pinned memory
        for place, (_, bits) in enumerate(masked):
            words[place] = np.frombuffer(bits, dtype=np.int32)
        table = packed.to(logits.device, non_blocking=True)
        logit_edits.mask_rows(logits, self._upload([slot for slot, _ in masked]), table)

    def _edit(self, logits: torch.Tensor, work: list[RowWork], positions: torch.Tensor) -> None:
        edited = [self._edits[item.row].numbers(slot, item.row) for slot, item in enumerate(work)
                  if item.row in self._edits]  # fmt: skip
        if edited:
            table = torch.tensor(edited, dtype=torch.int64, pin_memory=logits.is_cuda)
            logit_edits.edit_rows(logits, table.to(logits.device, non_blocking=True), positions, self._rows.token_ids)

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        """[N] int32 on the device, without waiting for it."""
        pinned = torch.tensor(numbers, dtype=torch.int32, pin_memory=self.ids.is_cuda)
        return pinned.to(self.ids.device, non_blocking=True)


def to_samples(drawn: Drawn, ids: list[int], numbers: list[float]) -> list[RowSample]:
    """What the host reads of a step.

    Args:
        ids: `drawn.ids`, at least as many as there is work.
        numbers: `drawn.scores`, flattened.
    """
    if drawn.scores is None:
        return [RowSample(item.row, item.epoch, [token_id])
                for item, token_id in zip(drawn.work, ids, strict=False)]  # fmt: skip
    entries = to_logprobs(numbers, drawn.scores.shape[1], list(drawn.num_top.values()))
    found: dict[int, TokenLogprobs] = dict(zip(drawn.num_top, entries, strict=True))
    return [RowSample(item.row, item.epoch, [ids[slot]], [found[slot]] if slot in found else None)
            for slot, item in enumerate(drawn.work)]  # fmt: skip

"""Logits in, token ids out, on a GPU, without waiting for it.

Plain rows (greedy, temperature, top_k, top_p, min_p) take two launches in all, which can be a graph. What other rows
ask for is done in front, in place and for their slots alone: masks and penalties by kernels, the rare edits (bias,
bans, min_tokens) by a few operations a row. Log-probabilities are those of the logits as the model gave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saddle.kernels import logit_edits, sampling
from saddle.protocol import RowAdmit, RowSample, RowWork, StepMask, TokenLogprobs
from saddle.runner import logits as edit
from saddle.runner.device_rows import DeviceRows
from saddle.runner.sampler import score, to_logprobs

MAX_SCORED = 64  # positions whose log-probabilities exist at once: 51 MB at M2's vocabulary, and as much to rank them


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
        self.ids = torch.zeros(num_rows, dtype=torch.int32, device=rows.device)
        self._edits: dict[int, edit.RowEdits] = {}
        self._penalised: set[int] = set()
        self._scored: set[int] = set()
        self._counts: torch.Tensor | None = None  # made when the first row asks: it is as large as the logits

    @staticmethod
    def num_bytes(num_rows: int, vocab_size: int) -> int:
        """Work space, and the counts of penalties should they be asked for."""
        return sampling.SamplingWork.num_bytes(num_rows, vocab_size) + 4 * num_rows * (vocab_size + 1)

    def admit(self, admit: RowAdmit) -> None:
        """Prepare for a row's new request; its tokens are in the rows already."""
        row, params = admit.row, admit.params
        self._edits.pop(row, None)
        self._penalised.discard(row)
        self._scored.discard(row)
        if params.logprobs is not None:
            self._scored.add(row)
        edits = edit.edits_of(admit, self._rows.vocab_size, self._eos_ids, self._rows.device, penalties=False)
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
        num_top = {slot: count for slot, item in enumerate(work)
                   if (count := self._rows.params[item.row].logprobs) is not None}  # fmt: skip
        raw = logits.index_select(0, self._upload(list(num_top))) if num_top else None
        self._mask(logits, work, mask)
        self._edit(logits, work)
        penalised = [slot for slot, item in enumerate(work) if item.row in self._penalised]
        slots = self._upload(penalised) if penalised else None
        if slots is not None:
            logit_edits.penalise_rows(logits, slots, rows, self._rows.state, self._penalty_counts())
        ids = self.launch(logits, rows, positions)
        if slots is not None:
            logit_edits.count_tokens(slots, rows, ids, self._penalty_counts())
        scores = None
        if raw is not None:
            chosen = ids.index_select(0, self._upload(list(num_top))).to(torch.int64)
            scores = self.score(raw, chosen, max(num_top.values()))
        return Drawn(work, ids, scores, num_top)

    def score(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> torch.Tensor:
        """Log-probabilities of given ids, as `sampler.score`, at most `MAX_SCORED` positions at a time.

        Args:
            logits: [N, V] float32. Overwritten.
            token_ids: [N] int64.
        """
        if self._num_valid < logits.shape[1]:
            logits[:, self._num_valid :] = -torch.inf
        parts = [score(logits[start : start + MAX_SCORED], token_ids[start : start + MAX_SCORED], num_top)
                 for start in range(0, len(token_ids), MAX_SCORED)]  # fmt: skip
        return torch.cat(parts)

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

    def _edit(self, logits: torch.Tensor, work: list[RowWork]) -> None:
        rows = self._rows
        for slot, item in enumerate(work):
            edits = self._edits.get(item.row)
            if edits is not None:
                length = rows.num_known[item.row]
                written = rows.token_ids[item.row, :length]
                edit.apply(logits[slot], edits, rows.params[item.row], written, length - rows.num_prompt[item.row])

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

"""Rows that ask for every kind of edit, edited by the kernel and by its reference."""

from __future__ import annotations

import random

import torch

from saddle.kernels import logit_edits
from saddle.protocol import RowAdmit, SamplingParams
from saddle.runner import logits as edit
from saddle.runner.device_edits import device_edits_of

EOS = frozenset({2, 9})
LENGTHS = [40, 3, 41, 90, 17, 33, 50, 29, 60]  # tokens written by each row, of which 20 or fewer are its prompt
WRITTEN = 100


def requests(written: list[list[int]], vocab_size: int) -> list[SamplingParams]:
    """One row for each way of asking; row 7 ends with what forbidden words begin with."""
    rng = random.Random(4)
    tail = written[7][LENGTHS[7] - 3 : LENGTHS[7]]
    return [
        SamplingParams(),
        SamplingParams(logit_bias={5: 100.0, vocab_size - 1: -7.5, 0: 0.25}),
        SamplingParams(allowed_token_ids=(1, 31, 32, vocab_size - 1), logit_bias={31: 2.0, 40: 9.0}),
        SamplingParams(bad_words_ids=((7,), (11,), (7,)), logit_bias={7: 3.0}),
        SamplingParams(min_tokens=30, stop_token_ids=(2, 100)),
        SamplingParams(logit_bias={rng.randrange(vocab_size): rng.uniform(-5, 5) for _ in range(200)}),
        SamplingParams(min_tokens=5),
        SamplingParams(bad_words_ids=((*tail, 50), (tail[-1], 51), (tail[0], 52), (1, *tail, 53), (*([4] * 60), 54),
                                      (*tail[1:], 50))),
        SamplingParams(min_tokens=99, ignore_eos=True, stop_token_ids=(8,), allowed_token_ids=(8, 9)),
    ]  # fmt: skip


def edited_both_ways(vocab_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [rows, vocab] as the kernel leaves them, as torch does, and as they were. Slot i belongs to row n - i."""
    rng = random.Random(3)
    written = [rng.choices(range(vocab_size), k=WRITTEN) for _ in LENGTHS]
    params = requests(written, vocab_size)
    count = len(params)
    raw = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(0)).to(device)
    rows = torch.tensor(written, dtype=torch.int32, device=device).flip(0).contiguous()
    wanted, table, kept = raw.clone(), [], []
    for slot, (one, length) in enumerate(zip(params, LENGTHS, strict=True)):
        num_prompt = min(20, length)
        admit = RowAdmit(count - 1 - slot, 1, written[slot][:length], num_prompt, 0, [], one, 0)
        mine = device_edits_of(admit, vocab_size, EOS, device)
        theirs = edit.edits_of(admit, vocab_size, EOS, device)
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            kept.append(mine)
            table.append(mine.numbers(slot, count - 1 - slot))
            known = torch.tensor(written[slot][:length], device=device)
            edit.apply(wanted[slot], theirs, one, known, length - num_prompt)
    found = raw.clone()
    positions = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    logit_edits.edit_rows(found, torch.tensor(table, dtype=torch.int64, device=device), positions, rows)
    return found, wanted, raw

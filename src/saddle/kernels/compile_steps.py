"""The launches between two forward passes, for `compile_table`: step inputs, edits of logits, sampling."""

from __future__ import annotations

import torch

from saddle.kernels import logit_edits, logprobs, sampling, step_inputs
from saddle.kernels.row_state import ROW_WIDTH
from saddle.kernels.target import Target

ROWS, VOCAB, LENGTH, BLOCK_SIZE = 8, 200_064, 204_801, 64


def _numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_sampling(_: Target) -> None:
    """Drawing, masks, lists of edits, penalties and log-probabilities."""
    logits, state, slots = _numbers(ROWS, VOCAB, dtype=torch.float32), _numbers(ROWS, ROW_WIDTH), _numbers(ROWS)
    work = sampling.SamplingWork.allocate(ROWS, VOCAB, torch.device("meta"))
    for num_valid in (VOCAB, 1024):  # of a small vocabulary each id is a group
        sampling.launch(logits, slots, slots, state, work, _numbers(ROWS, LENGTH), slots, num_valid)
    counts = _numbers(ROWS, VOCAB)
    logit_edits.mask_rows(logits, slots, _numbers(ROWS, VOCAB // 32))
    logit_edits.penalise_rows(logits, slots, slots, state, counts)
    logit_edits.count_tokens(slots, slots, slots, counts)
    logit_edits.mark_tokens(_numbers(LENGTH), counts[0], 100)
    logit_edits.edit_rows(logits, _numbers(ROWS, 6, dtype=torch.int64), slots, _numbers(ROWS, LENGTH))
    scoring = logprobs.LogprobWork.allocate(ROWS, VOCAB, torch.device("meta"))
    logprobs.launch(logits, slots, slots, 20, scoring, _numbers(ROWS, 43, dtype=torch.float64), VOCAB)


def launch_inputs(_: Target) -> None:
    """Inputs of decode steps and of others."""
    state, tokens, tables = _numbers(ROWS, ROW_WIDTH), _numbers(ROWS, LENGTH), _numbers(ROWS, LENGTH // BLOCK_SIZE + 1)
    ids, slots = _numbers(ROWS), _numbers(ROWS, dtype=torch.int64)
    step_inputs.launch_decode(ids, ids, state, tokens, tables, ids, ids, slots, ids, BLOCK_SIZE)
    step_inputs.launch_rows(_numbers(ROWS, 8), ids, 1, state, tokens, tables, ids, _numbers(ROWS + 1), ids, ids, ids,
                            ids, ids, slots, BLOCK_SIZE)  # fmt: skip

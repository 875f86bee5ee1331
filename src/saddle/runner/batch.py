"""From a plan and the rows to the inputs of the model.

Ids, positions, slots and lengths are worked out on the device from the rows, in a dozen vectorised operations,
because the ids of the last step may not be known to the host yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saddle.model.inputs import StepInputs
from saddle.protocol import RowWork
from saddle.runner.rows import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one step, and which logits belong to whom.

    The first `len(sampling)` logits are those of the rows that sample; then come those of `scored`, one for each
    prompt position whose successor's log-probability is asked for.

    sampling   work of the rows that sample, in order
    scored     (work, first position) of the rows with prompt_logprobs; one logit for each of its tokens
    """

    inputs: StepInputs
    sampling: list[RowWork]
    sampling_rows: torch.Tensor
    scored: list[tuple[RowWork, int]]


def build(work: list[RowWork], rows: Rows) -> Batch:
    """Build a step's inputs and advance the rows.

    Args:
        work: not empty.
    """
    device, block_size = rows.device, rows.block_size
    lengths = [item.num_tokens for item in work]
    total, longest = sum(lengths), max(lengths)
    bounds = [(item.num_tokens, rows.computed_on_host[item.row] + item.num_tokens) for item in work]
    ends, last_tokens = 0, []
    for length in lengths:
        ends += length
        last_tokens.append(ends - 1)

    sampling = [item for item in work if item.samples]
    row_index = torch.tensor([item.row for item in work], device=device)
    length_index = torch.tensor(lengths, device=device)
    computed = rows.num_computed[row_index]
    if longest == 1:
        row_of, positions = row_index, computed
        query_starts = torch.arange(total + 1, dtype=torch.int32, device=device)
    else:
        query_starts = torch.zeros(len(work) + 1, dtype=torch.int32, device=device)
        query_starts[1:] = length_index.cumsum(0)
        member = torch.repeat_interleave(length_index, output_size=total)
        row_of = row_index[member]
        positions = computed[member] + torch.arange(total, device=device) - query_starts[:-1][member]
    blocks = rows.block_tables[row_of, positions // block_size]
    scored = [(item, context - length) for item, (length, context) in zip(work, bounds, strict=True)
              if _is_scored(item, rows, context - length)]  # fmt: skip
    inputs = StepInputs(
        token_ids=rows.token_ids[row_of, positions],
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        block_tables=rows.block_tables[row_index],
        query_starts=query_starts,
        context_lens=(computed + length_index).to(torch.int32),
        logit_index=torch.tensor(_logit_tokens(work, last_tokens, scored), dtype=torch.int64, device=device),
        max_query_len=longest,
        max_context_len=max(context for _, context in bounds),
        row_bounds=bounds,
    )
    rows.advance(row_index, length_index, work)
    sampling_rows = row_index
    if len(sampling) < len(work):
        sampling_rows = torch.tensor([item.row for item in sampling], dtype=torch.int64, device=device)
    return Batch(inputs, sampling, sampling_rows, scored)


def _is_scored(item: RowWork, rows: Rows, first: int) -> bool:
    return rows.params[item.row].prompt_logprobs is not None and first < rows.num_prompt[item.row] - 1


def _logit_tokens(work: list[RowWork], last_tokens: list[int], scored: list[tuple[RowWork, int]]) -> list[int]:
    wanted = [last for item, last in zip(work, last_tokens, strict=True) if item.samples]
    for item, _ in scored:
        last = last_tokens[next(i for i, other in enumerate(work) if other is item)]
        wanted += range(last - item.num_tokens + 1, last + 1)
    return wanted

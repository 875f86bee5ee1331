"""From a plan and the rows to the inputs of the model.

Ids, positions, slots and lengths are worked out on the device from the rows, in a dozen vectorised operations,
because the ids of the last step may not be known to the host yet. What only the host knows goes up in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from saddle.model.inputs import StepInputs
from saddle.protocol import RowWork
from saddle.runner.rows import Rows, upload


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one step, and which logits belong to whom.

    The first `len(sampling)` logits are those of the rows that sample; then come those of `scored`, one for each
    prompt position whose successor's log-probability is asked for.

    sampling   work of the rows that sample, in order
    rows, positions   [S] int64, the rows of `sampling` and the positions that their new tokens take
    scored     (work, first position) of the rows with prompt_logprobs; one logit for each of its tokens
    """

    inputs: StepInputs
    sampling: list[RowWork]
    rows: torch.Tensor
    positions: torch.Tensor
    scored: list[tuple[RowWork, int]]


@dataclass(frozen=True, slots=True)
class _Uploaded:
    """The host's part of a step, on the device; `sampling` holds places within the work."""

    rows: torch.Tensor
    lengths: torch.Tensor
    logit_index: torch.Tensor
    sampling: torch.Tensor


def build(work: list[RowWork], rows: Rows) -> Batch:
    """Build a step's inputs and advance the rows.

    Args:
        work: not empty, at most one a row.

    Raises:
        ValueError: the plan is for another request than the one in its row.
    """
    lengths = [item.num_tokens for item in work]
    ends = list(accumulate(lengths))
    members = [index for index, item in enumerate(work) if item.samples]
    scored = [index for index, item in enumerate(work) if _is_scored(item, rows)]
    logit_tokens = [ends[index] - 1 for index in members]
    for index in scored:
        logit_tokens += range(ends[index] - lengths[index], ends[index])
    up = _upload(work, rows, lengths, logit_tokens, members)
    bounds = [(item.num_tokens, rows.num_known[item.row]) for item in work]

    total, longest, block_size = ends[-1], max(lengths), rows.block_size
    max_context = max(context for _, context in bounds)
    computed = rows.num_computed.index_select(0, up.rows)
    contexts = computed + up.lengths
    tables = rows.block_tables[:, : -(-max_context // block_size)].index_select(0, up.rows)
    if longest == 1:
        row_of, positions = up.rows, computed
        blocks = tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
        starts = torch.arange(total + 1, dtype=torch.int32, device=rows.device)
    else:
        starts = torch.zeros(len(work) + 1, dtype=torch.int32, device=rows.device)
        torch.cumsum(up.lengths, 0, dtype=torch.int32, out=starts[1:])
        member = torch.repeat_interleave(up.lengths, output_size=total)
        row_of = up.rows.index_select(0, member)
        positions = torch.arange(total, device=rows.device) + (computed - starts[:-1]).index_select(0, member)
        blocks = tables[member, positions // block_size]
    inputs = StepInputs(
        token_ids=rows.token_ids.view(-1).index_select(0, row_of * rows.token_ids.shape[1] + positions),
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        block_tables=tables,
        query_starts=starts,
        context_lens=contexts.to(torch.int32),
        logit_index=up.logit_index,
        max_query_len=longest,
        max_context_len=max_context,
        row_bounds=bounds,
    )
    rows.num_computed.index_copy_(0, up.rows, contexts)
    taken = (up.rows, contexts)
    if len(members) < len(work):
        taken = (up.rows.index_select(0, up.sampling), contexts.index_select(0, up.sampling))
    first_scored = [(work[index], bounds[index][1] - lengths[index]) for index in scored]
    return Batch(inputs, [work[index] for index in members], *taken, first_scored)


def _upload(
    work: list[RowWork], rows: Rows, lengths: list[int], logit_tokens: list[int], members: list[int]
) -> _Uploaded:
    """One copy to the device of all that the host knows, and the rows brought up to date with it."""
    changes = rows.begin(work)
    parts = ([item.row for item in work], lengths, logit_tokens, members,
             changes.table_index, changes.block_ids, changes.num_cached)  # fmt: skip
    packed = upload([value for part in parts for value in part], rows.device)
    row_index, length_index, logit_index, sampling, table_index, block_ids, num_cached = torch.split(
        packed, [len(part) for part in parts]
    )
    if changes.block_ids:
        rows.block_tables.view(-1).index_copy_(0, table_index, block_ids)
    if changes.num_cached:
        rows.num_computed.index_add_(0, row_index, num_cached)
    return _Uploaded(row_index, length_index, logit_index, sampling)


def _is_scored(item: RowWork, rows: Rows) -> bool:
    """Whether the row wants log-probabilities of its prompt, and this step computes any. It reads no cached block."""
    wants = rows.params[item.row].prompt_logprobs is not None
    return wants and rows.num_known[item.row] < rows.num_prompt[item.row] - 1

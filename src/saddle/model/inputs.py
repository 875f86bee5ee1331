"""`StepInputs`: all that `forward` needs to know about a step, as one explicit argument."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's ragged batch. T tokens of R rows lie one after the other; row r owns
    `token_ids[query_starts[r]:query_starts[r + 1]]`.

        token_ids     [T] int64
        positions     [T] int64    position of each token in its sequence
        slots         [T] int64    where its K and V go: block_id * block_size + offset
        block_tables  [R, max_blocks] int64   blocks of each row; entries past its context are never read
        query_starts  [R + 1] int32
        context_lens  [R] int32    tokens of the row in the cache once this step has written its own
        logit_index   [S] int64    which of the T tokens need logits

    The rest are upper bounds known on the host, so that nothing has to wait for the device:

        max_query_len, max_context_len   over the rows
        row_bounds    (query length, context length) of each row, exact on a CPU; None where only the device knows
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    logit_index: torch.Tensor
    max_query_len: int
    max_context_len: int
    row_bounds: list[tuple[int, int]] | None = None

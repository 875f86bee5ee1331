"""`StepInputs` and `DeviceInputs`: all that `forward` needs to know about a step, as one explicit argument."""

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


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """One step's ragged batch as the fused kernels take it: static buffers on the device, padded to a size.

    T tokens of R rows. Rows with one new token come first, so tokens [0, num_decode_rows) are theirs; the tokens of
    the other rows (prompts) follow, one row after the other. Padding changes nothing: such a row has context 0,
    such a token position -1; it writes no KV and touches no expert, its logits are rubbish.

        token_ids     [T] int32
        positions     [T] int32    -1: padding
        slots         [T] int64    where its K and V go: block_id * block_size + offset; -1: nowhere
        block_tables  [num_rows, max_blocks] int32   of all rows of the device; kernels index it by row id
        row_ids       [R] int32
        query_starts  [R + 1] int32
        context_lens  [R] int32    tokens of the row in the cache once this step has written its own; 0: padding
        logit_index   [S] int32    which of the T tokens need logits

    The rest are known on the host:

        num_decode_rows   rows with one token; R in a decode step
        query_lens        tokens of each row, exact; None in a decode step
        max_query_len, max_context_len   upper bounds over the rows
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    row_ids: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    logit_index: torch.Tensor
    num_decode_rows: int
    max_query_len: int
    max_context_len: int
    query_lens: tuple[int, ...] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the rows that are no decode rows; what pads is not counted where lengths are known."""
        total = len(self.token_ids) if self.query_lens is None else sum(self.query_lens)
        return total - self.num_decode_rows

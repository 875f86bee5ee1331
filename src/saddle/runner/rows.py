"""The persistent rows of a device: everything that outlives a step.

A row keeps its place from admission to the end of its request. Its next token id is written here by sampling, so the
next step can be enqueued before anybody has read that id. What the host needs as exact bounds (how many tokens are
computed) is mirrored on the host: plans run in order, so both sides add up the same numbers.
"""

from __future__ import annotations

import torch

from saddle.protocol import RowAdmit, RowWork, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class Rows:
    """State of `num_rows` rows of at most `max_len` tokens.

    token_ids     [rows, max_len + 1] int64   prompt and generated ids; the last column takes the id after the end
    num_computed  [rows] int64                tokens whose KV is written
    block_tables  [rows, max_blocks] int64
    seeds         [rows] int64
    """

    def __init__(self, num_rows: int, max_len: int, block_size: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.device = device
        self.block_size = block_size
        self.token_ids = zeros(num_rows, max_len + 1)
        self.num_computed = zeros(num_rows)
        self.block_tables = zeros(num_rows, -(-max_len // block_size))
        self.seeds = zeros(num_rows)
        self.epochs = [-1] * num_rows
        self.params = [GREEDY] * num_rows
        self.num_prompt = [0] * num_rows
        self.computed_on_host = [0] * num_rows
        self._num_blocks = [0] * num_rows

    def admit(self, admit: RowAdmit) -> None:
        """Give a row to a request."""
        row, length = admit.row, len(admit.token_ids)
        self.token_ids[row, :length] = torch.tensor(admit.token_ids, dtype=torch.int64)
        self.num_computed[row] = admit.num_computed
        self.seeds[row] = admit.seed
        self.epochs[row] = admit.epoch
        self.params[row] = admit.params
        self.num_prompt[row] = admit.num_prompt
        self.computed_on_host[row] = admit.num_computed
        self._num_blocks[row] = 0
        self._append_blocks(row, admit.block_ids)

    def prepare(self, work: list[RowWork]) -> None:
        """Append new blocks and skip cached tokens, before a step reads the rows."""
        for item in work:
            if item.epoch != self.epochs[item.row]:
                raise ValueError(f"row {item.row} is at epoch {self.epochs[item.row]}, the plan says {item.epoch}")
            if item.new_block_ids:
                self._append_blocks(item.row, item.new_block_ids)
            if item.num_cached:
                self.num_computed[item.row] += item.num_cached
                self.computed_on_host[item.row] += item.num_cached

    def advance(self, rows: torch.Tensor, lengths: torch.Tensor, work: list[RowWork]) -> None:
        """Count the tokens of a step as computed."""
        self.num_computed[rows] += lengths
        for item in work:
            self.computed_on_host[item.row] += item.num_tokens

    def append(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Write the ids that rows sampled behind their computed tokens."""
        self.token_ids[rows, self.num_computed[rows]] = token_ids

    def _append_blocks(self, row: int, block_ids: list[int]) -> None:
        start = self._num_blocks[row]
        stop = self._num_blocks[row] = start + len(block_ids)
        if block_ids:
            self.block_tables[row, start:stop] = torch.tensor(block_ids, dtype=torch.int64)

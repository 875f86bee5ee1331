"""The persistent rows of a device: everything that outlives a step.

A row keeps its place from admission to the end of its request. Its next token id is written here by sampling, so the
next step can be enqueued before anybody has read that id. What the host needs as exact bounds (how many tokens are
computed) is mirrored on the host: plans run in order, so both sides add up the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saddle.protocol import RowAdmit, RowWork, SamplingParams
from saddle.runner.random import keys_of

GREEDY = SamplingParams(temperature=0.0)


def upload(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """[n] int64 on the device, without waiting for what it is busy with.

    A GPU reads from pinned memory, which torch gives out again only when the copy is done: nothing that a plan in
    flight reads is overwritten.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


@dataclass(slots=True)
class Changes:
    """What a plan's work does to the rows before a step reads them; lists for one upload.

    table_index   places in the flattened block tables, and `block_ids` that go there
    num_cached    tokens skipped by each row, in the order of the work; empty if none skips any
    """

    table_index: list[int]
    block_ids: list[int]
    num_cached: list[int]


class RowMirror:
    """What the host knows of the rows, by row.

    epochs      -1: no request yet
    params, num_prompt
    num_known   tokens computed when all steps built so far have run
    num_blocks  length of the block table
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self.block_size = block_size
        self.epochs = [-1] * num_rows
        self.params = [GREEDY] * num_rows
        self.num_prompt = [0] * num_rows
        self.num_known = [0] * num_rows
        self.num_blocks = [0] * num_rows

    def mirror(self, admit: RowAdmit) -> None:
        """A row was given to a request."""
        row = admit.row
        self.epochs[row] = admit.epoch
        self.params[row] = admit.params
        self.num_prompt[row] = admit.num_prompt
        self.num_known[row] = admit.num_computed
        self.num_blocks[row] = len(admit.block_ids)

    def check(self, work: list[RowWork]) -> None:
        """Raise ValueError if the plan is for another request than the one in its row."""
        for item in work:
            if item.epoch != self.epochs[item.row]:
                raise ValueError(f"row {item.row} is at epoch {self.epochs[item.row]}, the plan says {item.epoch}")


class Rows(RowMirror):
    """State of `num_rows` rows of at most `max_len` tokens.

    token_ids     [rows, max_len + 1] int64   prompt and generated ids; the last column takes the id after the end
    num_computed  [rows] int64                tokens whose KV is written
    block_tables  [rows, max_blocks] int64
    keys          [rows, 2] int64             of the random numbers, from the seed
    top_k         [rows] int64                the vocabulary's size where it is off
    shaping       [rows, 3] float32           temperature, top_p, min_p

    and the host's mirror of them.
    """

    def __init__(
        self, num_rows: int, max_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        super().__init__(num_rows, block_size)
        self.device = device
        self.vocab_size = vocab_size
        self.token_ids = zeros(num_rows, max_len + 1)
        self.num_computed = zeros(num_rows)
        self.block_tables = zeros(num_rows, -(-max_len // block_size))
        self.keys = zeros(num_rows, 2)
        self.top_k = zeros(num_rows)
        self.shaping = torch.ones(num_rows, 3, dtype=torch.float32, device=device)

    def admit(self, admit: RowAdmit) -> None:
        """Give a row to a request."""
        row, params, length = admit.row, admit.params, len(admit.token_ids)
        num_blocks = len(admit.block_ids)
        found = upload([*admit.token_ids, *admit.block_ids], self.device)
        self.token_ids[row, :length] = found[:length]
        self.block_tables[row, :num_blocks] = found[length:]
        self.num_computed[row] = admit.num_computed
        self.keys[row] = keys_of(admit.seed)
        self.top_k[row] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        for column, value in enumerate((params.temperature, params.top_p, params.min_p)):
            self.shaping[row, column] = value
        self.mirror(admit)

    def begin(self, work: list[RowWork]) -> Changes:
        """Advance the host's mirror over a step, and say what has to change on the device.

        Raises:
            ValueError: the plan is for another request than the one in its row; nothing was changed.
        """
        self.check(work)
        changes = Changes([], [], [])
        width = self.block_tables.shape[1]
        for item in work:
            row = item.row
            if item.new_block_ids:
                start = row * width + self.num_blocks[row]
                changes.table_index += range(start, start + len(item.new_block_ids))
                changes.block_ids += item.new_block_ids
                self.num_blocks[row] += len(item.new_block_ids)
            self.num_known[row] += item.num_cached + item.num_tokens
        if any(item.num_cached for item in work):
            changes.num_cached = [item.num_cached for item in work]
        return changes

    def append(self, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Write the ids that rows sampled; all [S] int64."""
        self.token_ids.view(-1).index_copy_(0, rows * self.token_ids.shape[1] + positions, token_ids)

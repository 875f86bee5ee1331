"""From a plan to the inputs of a step on a GPU: one small upload, then kernels read the rows.

A step in which every row computes one token and samples (most steps) has static buffers, so that it can be a graph:
only row ids and fresh blocks go up, and nothing if they are those of the step before. Other steps get buffers of
their own size, but for the tokens of steps whose pieces are graphs: these are static too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from saddle.kernels import step_inputs
from saddle.model.inputs import DeviceInputs
from saddle.protocol import RowWork
from saddle.runner.device_rows import DeviceRows, host_int32

ALIGNMENT = 4  # int32 numbers: parts of a buffer begin at 16 bytes, so that kernels see equally aligned pointers


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The inputs of one step, and which logits belong to whom.

    sampling   work of the rows that sample, in the order of the logits
    rows, positions   [S] int32, their rows and the positions that the new tokens take; more than `sampling` where
        a step is padded
    scored     (work, first position) of the rows with prompt_logprobs; their logits, one for each token, come last
    size       rows of the graph that the step may be; 0: none
    num_tokens tokens, padding included, of the graphs that the step's pieces may be; 0: none
    """

    inputs: DeviceInputs
    sampling: list[RowWork]
    rows: torch.Tensor
    positions: torch.Tensor
    scored: list[tuple[RowWork, int]]
    size: int = 0
    num_tokens: int = 0


def aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class DeviceBatcher:
    """Builds batches over rows.

    Args:
        max_context: longest context that a row may have; the bound that graphs are captured with.
        max_padded: tokens of the largest step with prompts that is padded.
    """

    def __init__(self, rows: DeviceRows, max_context: int, max_padded: int = 0) -> None:
        num_rows, device = len(rows.epochs), rows.device
        self._rows = rows
        self._max_context = max_context
        width = aligned(num_rows)

        def numbers(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(aligned(count), dtype=dtype, device=device)

        self._host = torch.full((2 * width,), -1, dtype=torch.int32)  # what lies in `_meta`
        self._meta = torch.full((2 * width,), -1, dtype=torch.int32, device=device)  # row ids, then fresh blocks
        self._row_ids, self._new_blocks = self._meta[:width], self._meta[width:]
        self._token_ids, self._positions = numbers(num_rows), numbers(num_rows)
        self._context_lens = numbers(num_rows)
        self._slots = numbers(num_rows, torch.int64)
        self._counting = torch.arange(aligned(num_rows + 1), dtype=torch.int32, device=device)
        self._decodes = {}  # type: dict[int, DeviceInputs]
        self._mixed_ids = numbers(max_padded)
        self._mixed_positions = numbers(max_padded).fill_(-1)
        self._mixed_slots = numbers(max_padded, torch.int64).fill_(-1)

    # decode steps ------------------------------------------------------------------------------------------------

    def decode_inputs(self, size: int) -> DeviceInputs:
        """The static inputs of a decode step of `size` rows; `launch_decode` fills them."""
        if size not in self._decodes:
            self._decodes[size] = DeviceInputs(
                token_ids=self._token_ids[:size],
                positions=self._positions[:size],
                slots=self._slots[:size],
                block_tables=self._rows.block_tables,
                row_ids=self._row_ids[:size],
                query_starts=self._counting[: size + 1],
                context_lens=self._context_lens[:size],
                logit_index=self._counting[:size],
                num_decode_rows=size,
                max_query_len=1,
                max_context_len=self._max_context,
            )
        return self._decodes[size]

    def launch_decode(self, size: int) -> None:
        """Fill the inputs of a decode step from the rows; part of its graph."""
        rows, inputs = self._rows, self.decode_inputs(size)
        step_inputs.launch_decode(
            self._row_ids[:size], self._new_blocks[:size], rows.state, rows.token_ids, rows.block_tables,
            inputs.token_ids, inputs.positions, inputs.slots, inputs.context_lens, rows.block_size,
        )  # fmt: skip

    def pad(self) -> None:
        """Let all slots be padding: a decode step does nothing then."""
        self._host.fill_(-1)
        self._meta.fill_(-1)

    def is_decode(self, work: list[RowWork]) -> bool:
        """Whether each row computes one token and samples, in a block that it has or that comes alone."""
        rows = self._rows
        for item in work:
            if item.num_tokens != 1 or not item.samples or item.num_cached or len(item.new_block_ids) > 1:
                return False
            known = rows.num_known[item.row]
            if item.new_block_ids and rows.num_blocks[item.row] * rows.block_size != known:
                return False
            if rows.params[item.row].prompt_logprobs is not None and known < rows.num_prompt[item.row] - 1:
                return False
        return True

    def decode(self, work: list[RowWork], size: int) -> DeviceBatch:
        """Upload a decode step, without filling its inputs.

        Args:
            size: rows of its graph, at least as many as there is work; 0: no graph, and no padding.

        Raises:
            ValueError: the plan is for another request than the one in its row; nothing was changed.
        """
        rows = self._rows
        rows.check(work)
        width, count = len(self._host) // 2, len(work)
        ids, blocks = [-1] * width, [-1] * width
        for index, item in enumerate(work):
            row = item.row
            ids[index] = row
            rows.num_known[row] += 1
            if item.new_block_ids:
                blocks[index] = item.new_block_ids[0]
                rows.num_blocks[row] += 1
        self._send(ids + blocks)
        inputs = self.decode_inputs(size or count)
        return DeviceBatch(inputs, work, inputs.row_ids, inputs.context_lens, [], size)

    def _send(self, numbers: list[int]) -> None:
        wanted = host_int32(numbers, self._meta.is_cuda)
        if not torch.equal(wanted, self._host):
            # Pinned memory is a new piece each time: a copy that waits behind a step in flight is not overwritten.
            self._meta.copy_(wanted, non_blocking=True)
            self._host = wanted

    # steps with prompts ------------------------------------------------------------------------------------------

    def piece_inputs(self, size: int) -> DeviceInputs:
        """What the pieces of steps of `size` tokens read, for capture: the tokens alone."""
        none = self._row_ids[:0]
        return DeviceInputs(
            self._mixed_ids[:size], self._mixed_positions[:size], self._mixed_slots[:size], self._rows.block_tables,
            none, self._counting[:1], none, none, 0, size, self._max_context, (),
        )  # fmt: skip

    def mixed(self, work: list[RowWork], size: int = 0) -> DeviceBatch:
        """Upload and fill a step in which rows compute any number of tokens; rows with one come first.

        Args:
            size: tokens to pad the step to, at least as many as there are; 0: no padding.

        Raises:
            ValueError: the plan is for another request than the one in its row; nothing was changed.
        """
        rows = self._rows
        rows.check(work)
        work = sorted(work, key=lambda item: item.num_tokens > 1)  # stable
        lengths = [item.num_tokens for item in work]
        starts = [0, *accumulate(lengths)]
        scored = [(item, start, rows.num_known[item.row] + item.num_cached)
                  for item, start in zip(work, starts, strict=False) if self._is_scored(item)]  # fmt: skip
        sampling = [item for item in work if item.samples]
        logit_tokens = [start + item.num_tokens - 1 for item, start in zip(work, starts, strict=False) if item.samples]
        for item, start, _ in scored:
            logit_tokens += range(start, start + item.num_tokens)
        table, block_ids = self._describe(work, starts)
        contexts = [rows.num_known[item.row] for item in work]
        inputs, taken = self._fill(table, block_ids, lengths, logit_tokens, len(sampling), max(contexts), size)
        first_scored = [(item, first) for item, _, first in scored]
        return DeviceBatch(inputs, sampling, *taken, first_scored, num_tokens=size)

    def _describe(self, work: list[RowWork], starts: Sequence[int]) -> tuple[list[int], list[int]]:
        """The table of `step_inputs.launch_rows` and its block ids; advances the host's mirror."""
        rows = self._rows
        table: list[int] = []
        block_ids: list[int] = []
        slot = 0
        for item, start in zip(work, starts, strict=False):
            row, fresh = item.row, item.new_block_ids
            table += (row, item.num_tokens, item.num_cached, rows.num_blocks[row], len(block_ids), len(fresh),
                      slot if item.samples else -1, start)  # fmt: skip
            slot += item.samples
            block_ids += fresh
            rows.num_blocks[row] += len(fresh)
            rows.num_known[row] += item.num_cached + item.num_tokens
        return table, block_ids

    def _fill(
        self, table: list[int], block_ids: list[int], lengths: list[int], logit_tokens: list[int], num_samples: int,
        max_context: int, size: int,
    ) -> tuple[DeviceInputs, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
        rows, num_rows, total = self._rows, len(lengths), sum(lengths)
        up_table, up_blocks, logit_index = self._upload(table, block_ids, logit_tokens)
        own = 0 if size else total
        counts = (num_rows, num_rows + 1, num_rows, num_samples, num_samples, own, own)
        row_ids, query_starts, context_lens, sample_rows, sample_positions, token_ids, positions = _cut(
            torch.empty(sum(map(aligned, counts)), dtype=torch.int32, device=rows.device), counts
        )
        if size:
            token_ids, positions = self._mixed_ids[:size], self._mixed_positions[:size]
            slots = self._mixed_slots[:size]
        else:
            slots = torch.empty(total, dtype=torch.int64, device=rows.device)
        step_inputs.launch_rows(
            up_table.view(num_rows, -1), up_blocks, max(*lengths, size - total), rows.state, rows.token_ids,
            rows.block_tables, row_ids, query_starts, context_lens, sample_rows, sample_positions, token_ids,
            positions, slots, rows.block_size,
        )  # fmt: skip
        inputs = DeviceInputs(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            block_tables=rows.block_tables,
            row_ids=row_ids,
            query_starts=query_starts,
            context_lens=context_lens,
            logit_index=logit_index,
            num_decode_rows=sum(length == 1 for length in lengths),
            max_query_len=max(lengths),
            max_context_len=max_context,
            query_lens=tuple(lengths),
        )
        return inputs, (sample_rows, sample_positions)

    def _upload(self, *parts: list[int]) -> list[torch.Tensor]:
        """Lists of numbers in one copy."""
        counts = [len(part) for part in parts]
        packed: list[int] = []
        for part in parts:
            packed += part
            packed += [0] * (aligned(len(part)) - len(part))
        device = self._rows.device
        return _cut(host_int32(packed, device.type == "cuda").to(device, non_blocking=True), counts)

    def _is_scored(self, item: RowWork) -> bool:
        """Whether the row wants log-probabilities of its prompt, and this step computes any."""
        rows = self._rows
        return (
            rows.params[item.row].prompt_logprobs is not None
            and rows.num_known[item.row] < rows.num_prompt[item.row] - 1
        )


def _cut(buffer: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Views of the given lengths, each beginning at 16 bytes."""
    parts, start = [], 0
    for count in counts:
        parts.append(buffer[start : start + count])
        start += aligned(count)
    return parts

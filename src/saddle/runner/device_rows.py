"""The persistent rows of a GPU whose kernels read them: int32 tables, and one small copy to admit a request.

The same contract as `rows.Rows`, in the numbers that kernels take. All parameters of a row lie in one table
(`kernels.row_state`), so that admitting costs three copies whatever it asks for and no launch.
"""

from __future__ import annotations

import struct
from array import array

import torch

from saddle.kernels.row_state import ROW_WIDTH
from saddle.protocol import RowAdmit, SamplingParams
from saddle.runner.random import key_numbers
from saddle.runner.rows import RowMirror


def float_bits(value: float) -> int:
    """The bits of a float32 as int32."""
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


def _signed(value: int) -> int:
    """A 32-bit number as int32."""
    return value - (1 << 32) if value >= 1 << 31 else value


def row_numbers(params: SamplingParams, seed: int, num_computed: int, vocab_size: int) -> list[int]:
    """A row of the table, in the order of the columns of `kernels.row_state`."""
    first, second = (_signed(key) for key in key_numbers(seed))
    numbers = [
        num_computed,
        first,
        second,
        params.top_k if 0 < params.top_k < vocab_size else 0,
        float_bits(0.0 if params.is_greedy else params.temperature),
        float_bits(params.top_p),
        float_bits(params.min_p),
        float_bits(params.repetition_penalty),
        float_bits(params.presence_penalty),
        float_bits(params.frequency_penalty),
    ]
    return numbers + [0] * (ROW_WIDTH - len(numbers))


def host_int32(values: list[int], pinned: bool) -> torch.Tensor:
    """Numbers on the host, one-dimensional, at a quarter of what `torch.tensor` takes.

    Pinned memory comes from torch's cache, which gives it out again only when a copy from it is done: nothing that a
    plan in flight reads is overwritten.
    """
    if not values:
        return torch.empty(0, dtype=torch.int32, pin_memory=pinned)
    found = torch.frombuffer(array("i", values), dtype=torch.int32)
    return found.pin_memory() if pinned else found


def upload_int32(values: list[int], into: torch.Tensor) -> None:
    """Copy numbers into a one-dimensional int32 tensor on the device, without waiting for it."""
    if values:
        into.copy_(host_int32(values, into.is_cuda), non_blocking=True)


class DeviceRows(RowMirror):
    """State of `num_rows` rows of at most `max_len` tokens.

    token_ids     [rows, max_len + 1] int32   prompt and generated ids; the last column takes the id after the end
    block_tables  [rows, max_blocks] int32
    state         [rows, ROW_WIDTH] int32     see `kernels.row_state`; column 0 is `num_computed`
    """

    def __init__(
        self, num_rows: int, max_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        super().__init__(num_rows, block_size)
        self.device = device
        self.vocab_size = vocab_size
        self.max_len = max_len
        self.token_ids = torch.zeros(num_rows, max_len + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_rows, -(-max_len // block_size), dtype=torch.int32, device=device)
        self.state = torch.zeros(num_rows, ROW_WIDTH, dtype=torch.int32, device=device)

    @staticmethod
    def num_bytes(num_rows: int, max_len: int, block_size: int) -> int:
        return 4 * num_rows * (max_len + 1 + -(-max_len // block_size) + ROW_WIDTH)

    def admit(self, admit: RowAdmit) -> None:
        """Give a row to a request."""
        row = admit.row
        upload_int32(admit.token_ids, self.token_ids[row, : len(admit.token_ids)])
        upload_int32(admit.block_ids, self.block_tables[row, : len(admit.block_ids)])
        upload_int32(row_numbers(admit.params, admit.seed, admit.num_computed, self.vocab_size), self.state[row])
        self.mirror(admit)

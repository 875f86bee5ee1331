"""The same requests in the rows that torch reads and in those that kernels read: both must give the same inputs."""

from __future__ import annotations

import random

import torch

from saddle.protocol import RowAdmit, RowWork, SamplingParams
from saddle.runner import batch as batching
from saddle.runner.device_batch import DeviceBatch, DeviceBatcher
from saddle.runner.device_rows import DeviceRows
from saddle.runner.rows import Rows

MAX_LEN, BLOCK, VOCAB = 3000, 16, 500


class Both:
    """The same requests in the rows of both kinds."""

    def __init__(self, num_rows: int, device: str = "cpu", max_padded: int = 0) -> None:
        self.torch_rows = Rows(num_rows, MAX_LEN, BLOCK, VOCAB, torch.device("cpu"))
        self.rows = DeviceRows(num_rows, MAX_LEN, BLOCK, VOCAB, torch.device(device))
        self.batcher = DeviceBatcher(self.rows, MAX_LEN, max_padded)
        self.free = random.Random(1).sample(range(5000), 5000)
        self.blocks: dict[int, int] = {}
        self.computed: dict[int, int] = {}

    def admit(
        self, row: int, num_tokens: int, num_cached_blocks: int = 0, params: SamplingParams | None = None
    ) -> None:
        ids = random.Random(row).choices(range(VOCAB), k=num_tokens)
        blocks = [self.free.pop() for _ in range(num_cached_blocks)]
        admit = RowAdmit(row, 1, ids, num_tokens, num_cached_blocks * BLOCK, blocks, params or SamplingParams(), row)
        self.torch_rows.admit(admit)
        self.rows.admit(admit)
        self.blocks[row], self.computed[row] = num_cached_blocks, num_cached_blocks * BLOCK

    def work(self, row: int, num_tokens: int, samples: bool, num_cached_blocks: int = 0) -> RowWork:
        self.computed[row] += num_cached_blocks * BLOCK + num_tokens
        missing = -(-self.computed[row] // BLOCK) - self.blocks[row]
        self.blocks[row] += missing
        new = [self.free.pop() for _ in range(missing)]
        return RowWork(row, 1, num_tokens, num_cached_blocks * BLOCK, new, samples, self.computed[row])

    def compare(self, work: list[RowWork], batch: DeviceBatch) -> None:
        """`batch` was built of `work`; torch's comes out the same, in the order of the device's rows."""
        torch_work = sorted(work, key=lambda item: item.num_tokens > 1)
        wanted = batching.build(torch_work, self.torch_rows)
        inputs, count, tokens = batch.inputs, len(work), len(wanted.inputs.token_ids)
        for name in ("token_ids", "positions", "slots"):
            found = getattr(inputs, name)
            assert found[:tokens].tolist() == getattr(wanted.inputs, name).tolist(), name
        assert inputs.positions[tokens:].tolist() == [-1] * (len(inputs.positions) - tokens)
        assert inputs.slots[tokens:].tolist() == [-1] * (len(inputs.slots) - tokens)
        assert inputs.row_ids[:count].tolist() == [item.row for item in torch_work]
        assert inputs.query_starts[: count + 1].tolist() == wanted.inputs.query_starts.tolist()
        assert inputs.context_lens.tolist() == wanted.inputs.context_lens.tolist() + [0] * (
            len(inputs.context_lens) - count
        )
        assert inputs.logit_index[: len(wanted.inputs.logit_index)].tolist() == wanted.inputs.logit_index.tolist()
        samples = len(wanted.sampling)
        assert batch.sampling == wanted.sampling
        assert batch.rows[:samples].tolist() == wanted.rows.tolist()
        assert batch.positions[:samples].tolist() == wanted.positions.tolist()
        assert batch.scored == wanted.scored
        assert self.rows.num_known == self.torch_rows.num_known
        assert self.rows.state[:, 0].tolist() == self.torch_rows.num_computed.tolist()
        assert torch.equal(self.rows.block_tables.cpu().long(), self.torch_rows.block_tables)

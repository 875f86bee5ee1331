"""Inputs that kernels make of the rows equal those that torch makes, step after step, in Triton's interpreter."""

from __future__ import annotations

import random

import pytest
import torch

from saddle.protocol import RowAdmit, RowWork, SamplingParams
from saddle.runner import batch as batching
from saddle.runner.device_batch import DeviceBatch, DeviceBatcher
from saddle.runner.device_rows import DeviceRows
from saddle.runner.rows import Rows
from tests.support.interpreted import in_interpreter, outside, run_file

CPU = torch.device("cpu")
MAX_LEN, BLOCK, VOCAB = 3000, 16, 500


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


class Both:
    """The same requests in the rows of both kinds."""

    def __init__(self, num_rows: int) -> None:
        self.torch_rows = Rows(num_rows, MAX_LEN, BLOCK, VOCAB, CPU)
        self.rows = DeviceRows(num_rows, MAX_LEN, BLOCK, VOCAB, CPU)
        self.batcher = DeviceBatcher(self.rows, MAX_LEN)
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
        assert torch.equal(self.rows.block_tables.long(), self.torch_rows.block_tables)


@in_interpreter
def test_prompts_in_chunks_cached_blocks_and_decoding_rows() -> None:
    both = Both(6)
    both.admit(4, 2100)
    both.admit(1, 40, num_cached_blocks=2)
    work = [both.work(4, 1500, False), both.work(1, 8, True)]
    both.compare(work, both.batcher.mixed(work))
    both.admit(2, 50)
    work = [both.work(2, 50, True), both.work(1, 1, True), both.work(4, 10, False, num_cached_blocks=3)]
    batch = both.batcher.mixed(work)
    assert batch.inputs.num_decode_rows == 1 and batch.inputs.query_lens == (1, 50, 10)
    both.compare(work, batch)


@in_interpreter
@pytest.mark.parametrize("size", [5, 8])
def test_decode_steps_over_the_ends_of_blocks(size: int) -> None:
    both = Both(8)
    lengths = {0: 15, 3: 16, 7: 31, 2: 1, 5: 700}
    for row, length in lengths.items():
        both.admit(row, length)
    work = [both.work(row, length, True) for row, length in lengths.items()]
    both.compare(work, both.batcher.mixed(work))
    for step in range(4):
        order = random.Random(step).sample(sorted(lengths), 5 if step < 3 else 3)
        work = [both.work(row, 1, True) for row in order]
        assert both.batcher.is_decode(work)
        batch = both.batcher.decode(work, size)
        both.batcher.launch_decode(size)
        both.compare(work, batch)
        assert batch.inputs.token_ids[len(work) :].tolist() == [0] * (size - len(work))
        assert batch.rows[len(work) :].tolist() == [-1] * (size - len(work))


@in_interpreter
def test_what_is_no_decode_step() -> None:
    both = Both(8)
    for row in range(5):
        both.admit(row, 40)
    for row in range(4):
        both.rows.num_known[row] = 39
    good = RowWork(0, 1, 1, 0, [], True, 40)
    assert both.batcher.is_decode([good])
    assert not both.batcher.is_decode([good, RowWork(1, 1, 2, 0, [], True, 41)])
    assert not both.batcher.is_decode([good, RowWork(1, 1, 1, 0, [], False, 40)])
    assert not both.batcher.is_decode([good, RowWork(1, 1, 1, 16, [3], True, 40)])
    assert not both.batcher.is_decode([good, RowWork(1, 1, 1, 0, [3, 4], True, 40)])
    assert not both.batcher.is_decode([good, RowWork(1, 1, 1, 0, [3], True, 40)])  # in the middle of a block


@in_interpreter
def test_rows_with_prompt_logprobs_get_a_logit_for_each_token() -> None:
    both = Both(3)
    both.admit(0, 20, params=SamplingParams(prompt_logprobs=1))
    both.admit(1, 9)
    work = [both.work(0, 12, False), both.work(1, 9, True)]
    both.compare(work, both.batcher.mixed(work))
    work = [both.work(0, 8, True), both.work(1, 1, True)]
    both.compare(work, both.batcher.mixed(work))


@in_interpreter
def test_a_plan_for_another_request_changes_nothing() -> None:
    both = Both(2)
    both.admit(0, 5)
    for build in (both.batcher.mixed, lambda work: both.batcher.decode(work, 1)):
        with pytest.raises(ValueError, match="row 0 is at epoch 1, the plan says 2"):
            build([RowWork(0, 2, 1, 0, [], True, 1)])
    assert both.rows.num_known == [0, 0] and both.rows.state[:, 0].tolist() == [0, 0]

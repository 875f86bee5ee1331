"""Inputs that kernels make of the rows equal those that torch makes, step after step, in Triton's interpreter."""

from __future__ import annotations

import random

import pytest

from saddle.protocol import RowWork, SamplingParams
from tests.support.both_rows import Both
from tests.support.interpreted import in_interpreter, outside, run_file


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


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
def test_steps_with_prompts_are_padded_in_memory_that_stays() -> None:
    both = Both(4, max_padded=64)
    both.admit(0, 60)
    both.admit(2, 30)
    static = both.batcher.piece_inputs(64)
    for lengths, size in (((40, 9), 64), ((3, 1), 16), ((17, 20), 64)):
        work = [both.work(0, lengths[0], True), both.work(2, lengths[1], True)]
        batch = both.batcher.mixed(work, size)
        both.compare(work, batch)
        assert len(batch.inputs.token_ids) == batch.num_tokens == size
        assert batch.inputs.num_prompt_tokens == sum(length for length in lengths if length > 1)
        assert batch.inputs.token_ids[sum(lengths) :].tolist() == [0] * (size - sum(lengths))
        for name in ("token_ids", "positions", "slots"):
            assert getattr(batch.inputs, name).data_ptr() == getattr(static, name).data_ptr()


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

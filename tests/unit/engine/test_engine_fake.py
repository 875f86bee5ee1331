"""The scripted device finds what it claims to find: each fault of a host is one broken plan."""

from __future__ import annotations

import time
from typing import Any

import pytest
from engine_support import VOCAB, bench, expected, request, token_at

from saddle.errors import EngineError
from saddle.executor.fake import DeviceContractError, FakeExecutor, first_allowed, from_function
from saddle.protocol import RowAdmit, RowWork, SamplingParams, StepMask, StepPlan, StepResult

PROMPT = [2, 3, 4, 5, 6, 7]
PARAMS = SamplingParams()


def device(**options: Any) -> FakeExecutor:
    return FakeExecutor(from_function(token_at), num_blocks=8, block_size=4, vocab_size=VOCAB, **options)


def admit(row: int = 0, ids: list[int] = PROMPT, cached: tuple[int, ...] | list[int] = (), **params: Any) -> RowAdmit:
    return RowAdmit(row, 1, ids, len(ids), 4 * len(cached), list(cached), SamplingParams(**params), 0)


def work(row: int = 0, tokens: int = 6, blocks: tuple[int, ...] = (0, 1), samples: bool = True, *, epoch: int = 1,
         cached: int = 0, bound: int = 99) -> RowWork:  # fmt: skip
    return RowWork(row, epoch, tokens, cached, list(blocks), samples, bound)


def run(on: FakeExecutor, step_id: int, admits: list[RowAdmit], rows: list[RowWork]) -> StepResult:
    on.forward(StepPlan(step_id, admits, rows, []))
    on.sample(step_id, None)
    result = on.collect(None)
    assert result is not None
    return result


def test_a_sound_life() -> None:
    fake = device()
    first = run(fake, 0, [admit()], [work()])
    second = run(fake, 1, [], [work(tokens=1, blocks=())])
    assert [first.samples[0].token_ids, second.samples[0].token_ids] == [[token_at(PROMPT, 0)], [token_at(PROMPT, 1)]]
    third = run(fake, 2, [admit(row=1, cached=[0])], [work(row=1, tokens=2, blocks=(2,))])
    assert third.samples[0].token_ids == [token_at(PROMPT, 0)]
    assert (fake.num_steps, fake.num_tokens_computed, fake.num_rows_seen) == (3, 9, 2)


@pytest.mark.parametrize(
    ("admits", "rows", "message"),
    [
        ([admit()], [work(tokens=5)], "samples at the wrong place"),
        ([admit()], [work(samples=False)], "samples at the wrong place"),
        ([admit()], [work(tokens=7)], "tokens past those that exist"),
        ([admit()], [work(tokens=0, samples=False)], "no tokens"),
        ([admit()], [work(blocks=(0,))], "positions without a block"),
        ([admit()], [work(blocks=(0, 0))], "a block twice"),
        ([admit()], [work(epoch=2)], "the row has epoch 1"),
        ([admit()], [work(bound=5)], "the context is longer than its bound"),
        ([admit(cached=[3])], [work(tokens=2, blocks=(1,))], "block 3 does not hold tokens 0 to 4"),
        ([admit()], [work(tokens=2, cached=4)], "block 0 does not hold tokens 0 to 4"),
        ([admit(), admit(row=1)], [work(), work(row=1)], r"slot \(0, 0\) is written twice"),
        ([admit(cached=[0, 1])], [work()], "nothing to compute"),
        ([RowAdmit(0, 1, PROMPT, 6, 3, [0], PARAMS, 0)], [work()], "cached blocks do not add up"),
        ([admit(cached=[0], prompt_logprobs=0)], [work()], "reads the cache"),
        ([admit(prompt_logprobs=0)], [work(tokens=2, cached=4)], "reads the cache"),
    ],
)
def test_a_wrong_plan(admits: list[RowAdmit], rows: list[RowWork], message: str) -> None:
    with pytest.raises(DeviceContractError, match=message):
        run(device(), 0, admits, rows)


def test_a_block_taken_from_a_row_that_still_runs() -> None:
    fake = device()
    run(fake, 0, [admit()], [work()])
    run(fake, 1, [admit(row=1, ids=[9] * 3)], [work(row=1, tokens=3, blocks=(0,))])
    with pytest.raises(DeviceContractError, match="block 0 does not hold tokens 0 to 4"):
        run(fake, 2, [], [work(tokens=1, blocks=())])


def test_cached_tokens_behind_other_ones() -> None:
    """The same four ids, but something else before them."""
    fake = device()
    run(fake, 0, [admit(ids=[9, 9, 9, 9, 4, 4, 4, 4, 9])], [work(tokens=9, blocks=(0, 1, 2))])
    with pytest.raises(DeviceContractError, match="block 1 does not hold tokens 0 to 4"):
        run(fake, 1, [admit(row=1, ids=[4] * 5, cached=[1])], [work(row=1, tokens=1, blocks=(3,))])


def test_what_a_failed_step_left_behind() -> None:
    fake = device(fail_steps={0})
    assert run(fake, 0, [admit()], [work()]).error == "step 0 is scripted to fail"
    with pytest.raises(DeviceContractError, match="block 0 does not hold"):
        run(fake, 1, [admit(row=1, cached=[0])], [work(row=1, tokens=2, blocks=(2,))])


def test_steps_issued_before_a_failure_was_known_are_not_judged() -> None:
    fake = device(fail_steps={0})
    for step, plan in enumerate([([admit()], [work()]), ([], [work(tokens=1, blocks=())])]):
        fake.forward(StepPlan(step, *plan, []))
        fake.sample(step, None)
    first, second = fake.collect(None), fake.collect(None)
    assert first is not None and first.error is not None
    assert second is not None and second.samples[0].token_ids == [VOCAB - 1]


def test_an_epoch_again() -> None:
    fake = device()
    run(fake, 0, [admit()], [work()])
    with pytest.raises(DeviceContractError, match="epoch 1 again"):
        run(fake, 1, [admit()], [work(blocks=(2, 3))])


def test_launches_in_a_wrong_order() -> None:
    fake = device()
    plan = StepPlan(3, [admit()], [work()], [])
    with pytest.raises(DeviceContractError, match="sample without forward"):
        fake.sample(3, None)
    fake.forward(plan)
    with pytest.raises(DeviceContractError, match="forward before the previous step was sampled"):
        fake.forward(StepPlan(4, [], [], []))
    with pytest.raises(DeviceContractError, match="sample of step 4, forward was step 3"):
        fake.sample(4, None)
    fake.sample(3, None)
    with pytest.raises(DeviceContractError, match="step 3 after step 3"):
        fake.forward(plan)
    fake.stop()
    with pytest.raises(DeviceContractError, match="forward after stop"):
        fake.forward(StepPlan(5, [], [], []))


@pytest.mark.parametrize(
    ("masked", "mask", "message"),
    [
        ([0], None, "a mask for each masked row, or none"),
        ([], StepMask(0, [], []), "a mask for each masked row, or none"),
        ([0], StepMask(1, [0], [b"\xff" * 8]), "other mask"),
        ([0], StepMask(0, [1], [b"\xff" * 8]), "other mask"),
        ([0], StepMask(0, [0], [b"\xff" * 7]), "a mask of 7 bytes for 64 ids"),
        ([0], StepMask(0, [0], [bytes(8)]), "a mask that allows nothing"),
    ],
)
def test_a_wrong_mask(masked: list[int], mask: StepMask | None, message: str) -> None:
    fake = device()
    fake.forward(StepPlan(0, [admit()], [work()], masked))
    with pytest.raises(DeviceContractError, match=message):
        fake.sample(0, mask)
        fake.collect(None)


def test_the_mask_decides() -> None:
    assert first_allowed(b"\xff" * 8, 5, 64) == 5
    assert first_allowed(b"\x00\x04" + b"\xff" * 6, 5, 64) == 10
    assert first_allowed(b"\xff" * 8, 33, 34) == 33


def test_a_result_that_will_never_come() -> None:
    with pytest.raises(EngineError, match="No step is in flight"):
        device().collect(None)


def test_results_take_their_time() -> None:
    fake = device(step_s=0.05)
    began = time.monotonic()
    fake.forward(StepPlan(0, [admit()], [work()], []))
    fake.sample(0, None)
    assert fake.collect(0.0) is None
    assert time.monotonic() - began < 0.04
    result = fake.collect(None)
    assert time.monotonic() - began >= 0.05
    assert result is not None and result.device_s == 0.05


def test_a_script_resumes_where_a_preempted_row_was() -> None:
    resumed = RowAdmit(0, 1, [*PROMPT, 9, 9], len(PROMPT), 0, [], PARAMS, 0)
    answers = from_function(token_at)(resumed)
    assert [next(answers), next(answers)] == expected(PROMPT, 4)[2:]


def test_host_time_of_a_step_of_256_rows() -> None:
    """Schedule and update together stay under a millisecond."""
    made = bench(num_blocks=4096, block_size=16, max_num_seqs=256, max_num_batched_tokens=8192)
    made.device._verify = False
    for n in range(256):
        made.core.submit(request(f"r{n}", [2 + n % 60] * (20 + n % 16), 200))
    for _ in range(4):
        made.core.step()
    taken = []
    for _ in range(60):
        before = made.core.stats.host_s
        assert len(made.core.step()) == 256
        taken.append(made.core.stats.host_s - before)
    assert sorted(taken)[len(taken) // 2] < 1e-3

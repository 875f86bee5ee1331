"""Plans made by hand on a real model: a row's tokens depend on nothing but its own request."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from saddle.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig
from saddle.errors import EngineError
from saddle.executor.inproc import InprocExecutor
from saddle.protocol import DeviceInfo, RowWork, SamplingParams, StepMask, StepPlan, TokenLogprobs
from saddle.runner.runner import Runner
from tests.support.checkpoint import M2_LIKE, SMALL, write_random_checkpoint
from tests.support.plans import GREEDY, Plans, prompt_of

OUTPUT = 20
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 48, 5, 64, 80, 3, 100, 40, 23, 129]
SAMPLED = SamplingParams(temperature=1.2, top_k=40, top_p=0.95)


@pytest.fixture(scope="module", params=["head_dim 64", "head_dim 128"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, DeviceInfo]:
    shape = SMALL if request.param == "head_dim 64" else M2_LIKE
    folder = write_random_checkpoint(tmp_path_factory.mktemp("model"), shape)
    config = EngineConfig(
        load=LoadConfig(model=str(folder)),
        cache=CacheConfig(block_size=16, kv_cache_memory_bytes=32 << 20),
        scheduler=SchedulerConfig(max_model_len=256, max_num_seqs=18),
    )
    runner = Runner(config, folder)
    return runner, InprocExecutor(runner).start(lambda phase, share, note: None)


@pytest.fixture
def plans(loaded: tuple[Runner, DeviceInfo]) -> Plans:
    return Plans(*loaded)


@pytest.fixture(scope="module")
def alone(loaded: tuple[Runner, DeviceInfo]) -> dict[int, list[int]]:
    """What each prompt of LENGTHS, even ones greedy, gives by itself."""
    plans = Plans(*loaded, order=5)
    return {i: plans.generate(prompt_of(n, i), OUTPUT, params_of(i), seed=i) for i, n in enumerate(LENGTHS)}


def params_of(number: int) -> SamplingParams:
    return SAMPLED if number % 2 else GREEDY


# the same tokens, whatever the plans ---------------------------------------------------------------------------------


def test_outputs_differ_and_are_no_loops(alone: dict[int, list[int]]) -> None:
    """Else the tests below would show little."""
    assert len({tuple(found) for found in alone.values()}) == len(LENGTHS)
    assert all(len(set(found)) > 5 for number, found in alone.items() if number % 2)


def test_a_batch_of_sixteen(plans: Plans, alone: dict[int, list[int]]) -> None:
    admits = [plans.admit(i, prompt_of(n, i), params_of(i), seed=i) for i, n in enumerate(LENGTHS)]
    plans.step(*(plans.work(i, n) for i, n in enumerate(LENGTHS)), admits=admits)
    plans.finish(range(16), OUTPUT)
    assert {i: plans.output(i) for i in range(16)} == alone


@pytest.mark.parametrize("chunk", [16, 7])
def test_prompts_in_chunks_beside_rows_that_decode(plans: Plans, alone: dict[int, list[int]], chunk: int) -> None:
    """Every third request starts later, and rows end at different times."""
    waiting = {i: 2 * (i % 3) for i in range(16)}
    for tick in range(200):
        admits = [plans.admit(i, prompt_of(LENGTHS[i], i), params_of(i), seed=i)
                  for i, begin in waiting.items() if begin == tick]  # fmt: skip
        work = []
        for row, state in plans.rows.items():
            left = max(len(state.ids), state.num_prompt) - state.computed
            if len(plans.output(row)) < OUTPUT:
                work.append(plans.work(row, min(left, chunk)))
        if not work:
            break
        plans.step(*work, admits=admits)
    assert {i: plans.output(i) for i in range(16)} == alone


def test_blocks_from_the_cache_at_admission_and_inside_a_prompt(plans: Plans, alone: dict[int, list[int]]) -> None:
    prompt = prompt_of(LENGTHS[15], 15)
    plans.start(0, prompt, params_of(15), seed=15)
    blocks = plans.rows[0].blocks
    # At admission: all full blocks are there. In the same step another row skips forward inside its prompt.
    second = plans.admit(1, prompt, params_of(15), seed=15, cached=blocks[:8])
    third = plans.admit(2, prompt, params_of(15), seed=15)
    plans.step(plans.work(1, 1), plans.work(2, 16), admits=[second, third])
    plans.step(plans.work(2, 16 * 3 + 1, cached=blocks[1:5]), plans.work(1, 1))
    plans.finish(range(3), OUTPUT)
    assert [plans.output(row) for row in range(3)] == [alone[15]] * 3


def test_a_block_is_read_in_the_step_that_writes_it(plans: Plans, alone: dict[int, list[int]]) -> None:
    prompt = prompt_of(LENGTHS[12], 12)
    first = plans.admit(0, prompt)
    work = plans.work(0, len(prompt))
    second = plans.admit(1, prompt, cached=plans.rows[0].blocks[:6])
    plans.step(work, plans.work(1, len(prompt) - 96), admits=[first, second])
    plans.finish([0, 1], OUTPUT)
    assert [plans.output(0), plans.output(1)] == [alone[12]] * 2


def test_readmission_after_some_tokens(plans: Plans, alone: dict[int, list[int]]) -> None:
    """As after a preemption: another row, other blocks, the generated ids computed again, in chunks too."""
    for number in (8, 9):  # one greedy, one sampled
        prompt = prompt_of(LENGTHS[number], number)
        plans.start(3, prompt, params_of(number), seed=number)
        plans.finish([3], 9)
        ids = plans.rows[3].ids
        plans.release(3)
        again = plans.admit(5, ids, params_of(number), seed=number, num_prompt=len(prompt))
        plans.step(plans.work(5, len(ids) - 4), admits=[again])
        plans.step(plans.work(5, 4))
        plans.finish([5], OUTPUT)
        assert plans.output(5) == alone[number]
        plans.release(5)


def test_plans_are_built_before_ids_are_known(plans: Plans, alone: dict[int, list[int]]) -> None:
    """All plans of a request exist before the first of them runs."""
    prompts = {row: prompt_of(LENGTHS[row], row) for row in (2, 5, 7)}
    admits = [plans.admit(row, ids, params_of(row), seed=row) for row, ids in prompts.items()]
    queue = [plans.plan(admits, [plans.work(row, len(ids)) for row, ids in prompts.items()])]
    queue += [plans.plan([], [plans.work(row, 1) for row in prompts]) for _ in range(OUTPUT - 1)]
    for plan in queue:
        plans.runner.forward(plan)
        plans.take(plans.runner.sample(plan.step_id, None).wait())
    assert {row: plans.output(row) for row in prompts} == {row: alone[row] for row in prompts}


def test_the_context_may_be_filled_to_its_end(plans: Plans) -> None:
    prompt = prompt_of(250, 1)
    found = plans.generate(prompt, 6)
    assert len(found) == 6
    longer = plans.generate([*prompt, *found[:5]], 1)
    assert longer == found[5:]


# what a plan says is what is done ------------------------------------------------------------------------------------


def test_only_rows_that_reach_their_end_sample(plans: Plans) -> None:
    ids = prompt_of(40, 2)
    admits = [plans.admit(0, ids), plans.admit(1, ids[:10]), plans.admit(2, ids)]
    result = plans.step(plans.work(0, 20), plans.work(1, 10), plans.work(2, 40), admits=admits)
    assert [(sample.row, sample.epoch) for sample in result.samples] == [(1, 1), (2, 1)]
    assert plans.step(plans.work(0, 4)).samples == []


def test_an_empty_plan(plans: Plans) -> None:
    result = plans.step()
    assert (result.samples, result.prompt_logprobs, result.error) == ([], [], None)


def test_a_masked_row_takes_what_its_mask_allows(plans: Plans) -> None:
    ids = prompt_of(12, 4)
    admits = [plans.admit(0, ids), plans.admit(1, ids)]
    plan = plans.plan(admits, [plans.work(0, 12), plans.work(1, 12)], masked=[1])
    size = plans.vocab_size
    result = plans.run(plan, StepMask(plan.step_id, [1], [(1 << 77).to_bytes(4 * -(-size // 32), "little")]))
    free, bound = (sample.token_ids for sample in result.samples)
    assert bound == [77] and free != [77]
    # The row goes on from the id that it was made to take.
    plans.finish([1], 4)
    assert plans.output(1)[1:] == plans.generate([*ids, 77], 3, row=2)


# failures ------------------------------------------------------------------------------------------------------------


def test_a_plan_for_an_older_epoch_fails_and_the_row_goes_on(plans: Plans, alone: dict[int, list[int]]) -> None:
    prompt = prompt_of(LENGTHS[4], 4)
    plans.start(4, prompt)
    before = list(plans.runner.path.rows.num_known)
    result = plans.run(plans.plan([], [RowWork(4, plans.epochs[4] + 1, 1, 0, [], True, 99)]))
    assert result.error is not None and "row 4 is at epoch 1, the plan says 2" in result.error
    assert result.samples == [] and plans.runner.path.rows.num_known == before
    plans.finish([4], OUTPUT)
    assert plans.output(4) == alone[4]


def test_a_failed_step_leaves_the_other_rows_as_they_were(
    plans: Plans, alone: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(LENGTHS[6], 6)
    plans.start(6, prompt)
    plans.finish([6], 5)

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(cast(Any, plans.runner.path)._model, "forward", broken)
        other = plans.admit(0, prompt_of(30, 1))
        result = plans.run(plans.plan([other], [plans.work(0, 30)]))
    assert result.error == "RuntimeError: out of order" and result.samples == []
    plans.finish([6], OUTPUT)
    assert plans.output(6) == alone[6]
    plans.release(0)
    # The row that failed takes a new request.
    assert plans.generate(prompt_of(LENGTHS[0], 0), OUTPUT, row=0) == alone[0]


def test_failed_sampling_is_a_failed_step(plans: Plans) -> None:
    admit = plans.admit(0, [5, 6])
    plan = plans.plan([admit], [plans.work(0, 2)], masked=[0])
    result = plans.run(plan, StepMask(plan.step_id, [0], [b"\x01"]))
    assert result.error is not None and "a mask of" in result.error


def test_sampling_what_was_not_computed_is_an_error(plans: Plans) -> None:
    with pytest.raises(EngineError, match="Step 12345 was to be sampled"):
        plans.runner.sample(12345, None)
    plans.runner.forward(StepPlan(7, [], [], []))
    plans.runner.sample(7, None)
    with pytest.raises(EngineError, match="Step 7 was to be sampled"):
        plans.runner.sample(7, None)


# prompt_logprobs -----------------------------------------------------------------------------------------------------


def all_logprobs(plans: Plans, ids: list[int]) -> torch.Tensor:
    """[n, V]: after each prefix, sampled one by one with logprobs of the whole vocabulary."""
    params = SamplingParams(temperature=0.0, logprobs=plans.vocab_size)
    table = torch.zeros(len(ids), plans.vocab_size)
    for length in range(1, len(ids) + 1):
        admit = plans.admit(17, ids[:length], params)
        (sample,) = plans.step(plans.work(17, length), admits=[admit]).samples
        assert sample.logprobs is not None
        for token_id, value in sample.logprobs[0].top:
            table[length - 1, token_id] = value
        plans.release(17)
    return table


@pytest.mark.parametrize("chunks", [[20], [7, 6, 7], [19, 1], [1] * 20], ids=str)
def test_prompt_logprobs_in_any_chunks(plans: Plans, chunks: list[int]) -> None:
    ids = prompt_of(20, 8)
    expected = all_logprobs(plans, ids)
    admit = plans.admit(0, ids, SamplingParams(temperature=0.0, prompt_logprobs=2))
    other = plans.admit(1, prompt_of(50, 9))
    found: list[TokenLogprobs] = []
    for number, size in enumerate(chunks):
        work = [plans.work(0, size)] + ([plans.work(1, 50)] if number == 0 else [])
        result = plans.step(*work[::-1], admits=[admit, other] if number == 0 else [])
        for part in result.prompt_logprobs:
            assert (part.row, part.epoch, part.start) == (0, 1, len(found) + 1)
            found += part.logprobs
    assert [entry.token_id for entry in found] == ids[1:]
    for place, entry in enumerate(found):
        row = expected[place]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        assert [token_id for token_id, _ in entry.top] == row.topk(2).indices.tolist()
    # Decoding goes on without them.
    assert plans.step(plans.work(0, 1)).prompt_logprobs == []


def test_prompt_logprobs_of_several_rows_at_once(plans: Plans) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=1)
    prompts = [prompt_of(n, n) for n in (9, 14, 5)]
    alone = []
    for ids in prompts:
        alone += plans.start(4, ids, params).prompt_logprobs
        plans.release(4)
    admits = [plans.admit(row, ids, params) for row, ids in enumerate(prompts)]
    found = plans.step(*(plans.work(row, len(ids)) for row, ids in enumerate(prompts)), admits=admits).prompt_logprobs
    assert [part.row for part in found] == [0, 1, 2]
    for one, other in zip(found, alone, strict=True):
        assert [(entry.token_id, entry.rank) for entry in one.logprobs] == [
            (entry.token_id, entry.rank) for entry in other.logprobs
        ]
        assert [entry.logprob for entry in one.logprobs] == pytest.approx(
            [entry.logprob for entry in other.logprobs], abs=1e-4
        )

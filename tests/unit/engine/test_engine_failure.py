"""Failed steps, refused requests and the counters, on the scripted device."""

from __future__ import annotations

import pytest
from engine_support import VOCAB, bench, expected, request

from saddle.errors import EngineError
from saddle.executor.fake import from_function
from saddle.protocol import Accepted, FinishReason, Refused, RowSample, StepPlan, StepResult

PROMPT = list(range(2, 12))

in_flight = pytest.mark.parametrize("plans", [0, 1, 2])


# ---------------------------------------------------------------------------------------------------------------
# failure


@in_flight
def test_a_failed_step_ends_its_rows_and_those_of_plans_in_flight(plans: int) -> None:
    made = bench(plans_in_flight=plans, fail_steps={3}, max_num_batched_tokens=16)
    made.submit(request("a", PROMPT, 50), request("b", [9, *PROMPT], 50))
    made.run()
    for outcome in made.outcomes.values():
        assert outcome.last is not None and outcome.reason is FinishReason.ERROR
        assert "step 3 is scripted to fail" in (outcome.last.error or "")
        assert outcome.token_ids == expected(PROMPT if outcome is made.outcomes["a"] else [9, *PROMPT],
                                             len(outcome.token_ids))  # fmt: skip
    assert made.core.stats.num_failed_steps == 1
    assert made.core.stats.num_cached_blocks == 0, "also what they wrote before is forgotten"
    made.submit(request("c", PROMPT, 5))
    assert made.run()["c"].token_ids == expected(PROMPT, 5)


@in_flight
def test_rows_and_waiting_requests_outside_the_plans_in_flight_survive(plans: int) -> None:
    made = bench(plans_in_flight=plans, fail_steps={3}, max_num_seqs=2, max_num_batched_tokens=8, policy="priority")
    made.submit(request("runs", [5] * 60, 8, priority=1))
    made.step()
    made.submit(request("fails", [6] * 40, 8), request("waits", PROMPT, 8, priority=2))
    made.run()
    assert {work.row for plan in made.plans[1 : 4 + plans] for work in plan.work} == {1}
    assert made.outcomes["fails"].reason is FinishReason.ERROR
    assert made.outcomes["runs"].token_ids == expected([5] * 60, 8)
    assert made.outcomes["waits"].token_ids == expected(PROMPT, 8)
    assert made.core.stats.num_preemptions == 0


@in_flight
def test_a_failed_step_leaves_nothing_in_the_cache(plans: int) -> None:
    made = bench(plans_in_flight=plans, fail_steps={0})
    made.submit(request("a", PROMPT, 50), request("b", PROMPT, 50))
    made.run()
    assert made.core.stats.num_cached_blocks == 0
    made.submit(request("c", PROMPT, 5))
    assert made.run()["c"].token_ids == expected(PROMPT, 5)
    assert made.outcomes["c"].deltas[0].num_cached_tokens == 0


@pytest.mark.parametrize("plans", [1, 2])
def test_blocks_of_a_request_aborted_before_its_step_failed_are_forgotten(plans: int) -> None:
    made = bench(plans_in_flight=plans, fail_steps={plans})
    made.submit(request("other", [9, 9], 50))
    for _ in range(plans):
        made.step()
    made.submit(request("a", PROMPT, 50))
    made.step()  # issues the step that fails, lands an earlier one
    made.core.abort(["a"])
    made.run()
    made.submit(request("b", PROMPT, 5))
    assert made.run()["b"].token_ids == expected(PROMPT, 5)
    assert made.outcomes["b"].deltas[0].num_cached_tokens == 0


def test_a_result_of_another_step_is_an_error() -> None:
    made = bench()
    made.submit(request("a", PROMPT, 5))
    plan = made.scheduler.schedule()
    with pytest.raises(EngineError, match="Step 0 was due, the device answered step 7"):
        made.scheduler.update(plan, StepResult(7, [], []))


@pytest.mark.parametrize("samples", [[], [RowSample(1, 1, [2])], [RowSample(0, 2, [2])]])
def test_a_missing_token_is_an_error(samples: list[RowSample]) -> None:
    made = bench()
    made.submit(request("a", PROMPT, 5))
    plan = made.scheduler.schedule()
    with pytest.raises(EngineError, match="Step 0 gave no token for row 0"):
        made.scheduler.update(plan, StepResult(0, samples, []))


def test_a_scheduler_that_plans_nothing_ends_the_engine_instead_of_spinning() -> None:
    made = bench()
    made.submit(request("a", PROMPT, 5))
    made.scheduler.schedule = lambda: StepPlan(0, [], [], [])  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="plans none of them"):
        made.core.step()


# ---------------------------------------------------------------------------------------------------------------
# refusal, statistics, speed


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        ([], "prompt", "at least one token"),
        ([2, VOCAB], "prompt", "between 0 and 63"),
        ([-1], "prompt", "between 0 and 63"),
        ([2] * 32, "prompt", "The prompt has 32 tokens; with room for one more the context holds 32."),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], param: str, message: str) -> None:
    made = bench(num_blocks=8, max_model_len=100)
    (answer,) = made.submit(request("a", prompt))
    assert isinstance(answer, Refused)
    assert (answer.param, answer.status) == (param, 400)
    assert message in answer.message
    assert not made.core.has_work
    assert made.submit(request("a", [2] * 31)) == [Accepted("a")]
    assert made.run(100)["a"].reason is FinishReason.LENGTH


def test_an_id_runs_once_at_a_time() -> None:
    made = bench()
    assert made.submit(request("a", PROMPT)) == [Accepted("a")]
    (answer,) = made.submit(request("a", PROMPT))
    assert isinstance(answer, Refused) and answer.param == "request_id"
    made.run()
    assert made.submit(request("a", PROMPT)) == [Accepted("a")]


def test_a_full_queue_refuses() -> None:
    made = bench(max_queued=2, max_num_seqs=1)
    answers = made.submit(*(request(f"r{n}", PROMPT) for n in range(3)))
    assert [type(answer) for answer in answers] == [Accepted, Accepted, Refused]
    assert isinstance(answers[2], Refused) and answers[2].status == 429
    made.step()
    assert made.submit(request("r3", PROMPT)) == [Accepted("r3")]


def test_statistics() -> None:
    made = bench(plans_in_flight=0, num_blocks=20, max_num_seqs=1)
    made.submit(request("a", PROMPT, 4), request("b", PROMPT, 4))
    made.step()
    stats = made.core.stats
    assert (stats.num_running, stats.num_waiting, stats.num_blocks) == (1, 1, 20)
    assert (stats.num_free_blocks, stats.num_cached_blocks) == (17, 0)
    assert (stats.last_step_tokens, stats.num_prompt_tokens, stats.num_generated_tokens) == (10, 10, 1)
    made.run()
    stats = made.core.stats
    assert (stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_steps) == (20, 8, 8)
    assert stats.host_s > 0


@in_flight
def test_the_first_delta_says_how_long_it_took(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_seqs=1, step_s=0.002)
    made.submit(request("a", PROMPT, 4), request("b", PROMPT, 4))
    made.run()
    first, second = made.outcomes["a"].deltas[0], made.outcomes["b"].deltas[0]
    assert first.queued_s is not None and first.prefill_s is not None and second.queued_s is not None
    assert first.prefill_s >= 0.002
    assert second.queued_s >= first.queued_s + 0.006
    assert all(delta.queued_s is None for delta in made.outcomes["a"].deltas[1:])


def test_seeds_are_the_requests_own_or_drawn() -> None:
    made = bench()
    made.submit(request("a", PROMPT, seed=77), request("b", PROMPT), request("c", PROMPT))
    made.run()
    first, second, third = [admit.seed for plan in made.plans for admit in plan.admits]
    assert first == 77
    assert second != third


def test_a_plan_is_not_changed_after_it_was_issued() -> None:
    """The lists of a plan are its own: a request that grows does not reach into plans in flight."""
    made = bench(plans_in_flight=2)
    made.submit(request("a", PROMPT, 12))
    made.step()
    (admit,) = made.plans[0].admits
    before = (list(admit.token_ids), list(admit.block_ids), list(made.plans[0].work[0].new_block_ids))
    made.run()
    assert before == (admit.token_ids, admit.block_ids, made.plans[0].work[0].new_block_ids)


def test_rows_beyond_the_token_budget_are_not_used() -> None:
    made = bench(from_function(lambda prompt, index: 2), max_num_batched_tokens=2, max_num_seqs=8)
    made.submit(*(request(f"r{n}", [2 + n], 4) for n in range(4)))
    made.run()
    assert {work.row for plan in made.plans for work in plan.work} == {0, 1}
    assert {len(plan.work) for plan in made.plans} == {2}

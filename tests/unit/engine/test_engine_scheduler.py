"""What the scheduler promises, each on the scripted device with 0, 1 and 2 plans in flight."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from engine_support import EOS, Bench, bench, expected, request, stops_after

from saddle.executor.fake import from_function
from saddle.protocol import FinishReason

PROMPT = list(range(2, 12))

in_flight = pytest.mark.parametrize("plans", [0, 1, 2])


# ---------------------------------------------------------------------------------------------------------------
# the same tokens whatever the way


@in_flight
@pytest.mark.parametrize("budget", [1, 3, 16, 64])
@pytest.mark.parametrize("caching", [True, False])
def test_tokens_do_not_depend_on_chunks_batches_and_cache(plans: int, budget: int, caching: bool) -> None:
    made = bench(max_num_batched_tokens=budget, plans_in_flight=plans, caching=caching, num_blocks=200)
    prompts = {f"r{n}": [2 + (n + i) % 5 for i in range(3 * n + 1)] for n in range(16)}
    made.submit(*(request(name, prompt, 12) for name, prompt in prompts.items()))
    made.submit(*(request(name + " again", prompt, 12) for name, prompt in prompts.items()))
    for name, outcome in made.run().items():
        assert outcome.token_ids == expected(prompts[name.removesuffix(" again")], 12), name
        assert outcome.reason is FinishReason.LENGTH
    assert max(plan.num_tokens for plan in made.plans) <= budget
    assert (made.core.stats.num_cache_hits > 0) == caching


@in_flight
def test_pressure_preempts_and_all_get_on(plans: int) -> None:
    made = bench(num_blocks=12, plans_in_flight=plans, max_num_batched_tokens=16)
    prompts = {f"r{n}": [2 + n, *PROMPT[:5]] for n in range(6)}
    made.submit(*(request(name, prompt, 30) for name, prompt in prompts.items()))
    outcomes = made.run(600)
    assert {name: outcome.token_ids for name, outcome in outcomes.items()} == {
        name: expected(prompt, 30) for name, prompt in prompts.items()
    }
    assert made.core.stats.num_preemptions > 0
    readmitted = [admit for plan in made.plans for admit in plan.admits if len(admit.token_ids) > admit.num_prompt]
    assert readmitted


@in_flight
def test_the_first_request_is_never_preempted(plans: int) -> None:
    made = bench(num_blocks=10, plans_in_flight=plans)
    made.submit(*(request(f"r{n}", [2 + n] * 6, 30) for n in range(5)))
    made.run(600)
    first_row = made.plans[0].admits[0]
    assert first_row.token_ids == [2] * 6
    again = [admit for plan in made.plans[1:] for admit in plan.admits if admit.token_ids[:6] == [2] * 6]
    assert again == []
    assert made.core.stats.num_preemptions > 0


@in_flight
def test_small_worlds(plans: int) -> None:
    """Hundreds of short lives with hardly any memory: what happens only when several things come together."""
    chance = random.Random(plans)
    num_preemptions = 0
    for _ in range(300):
        made = bench(plans_in_flight=plans, num_blocks=chance.randint(5, 10), block_size=2,
                     max_num_batched_tokens=chance.choice([2, 3, 5, 16]), policy=chance.choice(["fcfs", "priority"]),
                     caching=chance.random() < 0.7)  # fmt: skip
        asked = {}
        for n in range(chance.randint(2, 6)):
            prompt = [chance.choice([2, 3])] * chance.randint(1, 7)
            asked[f"r{n}"] = prompt, chance.randint(1, 9)
            made.submit(request(f"r{n}", *asked[f"r{n}"], priority=chance.randint(0, 2)))
            for _ in range(chance.randint(0, 3)):
                if made.core.has_work:
                    made.step()
        for name, outcome in made.run(400).items():
            prompt, num_tokens = asked[name]
            assert outcome.token_ids == expected(prompt, min(num_tokens, made.scheduler._max_total - len(prompt)))
        num_preemptions += made.core.stats.num_preemptions
    assert num_preemptions > 100


@pytest.mark.parametrize("plans", [1, 2])
def test_ids_in_flight_of_a_preempted_row_are_kept(plans: int) -> None:
    """It is admitted again with every id that was on its way, never earlier."""
    made = bench(num_blocks=8, plans_in_flight=plans)
    made.submit(request("first", [2] * 6, 24), request("second", [3] * 6, 24))
    made.run(600)
    assert made.core.stats.num_preemptions > 0
    num_issued: Counter[int] = Counter()  # ids asked of a request so far, by the first token of its prompt
    owner: dict[tuple[int, int], int] = {}
    for plan in made.plans:
        for admit in plan.admits:
            prompt = admit.token_ids[:6]
            owner[admit.row, admit.epoch] = prompt[0]
            assert admit.token_ids[6:] == expected(prompt, num_issued[prompt[0]])
        for work in plan.work:
            num_issued[owner[work.row, work.epoch]] += work.samples
    assert made.outcomes["first"].token_ids == expected([2] * 6, 24)
    assert made.outcomes["second"].token_ids == expected([3] * 6, 24)


@in_flight
def test_a_victim_is_not_admitted_again_in_the_step_that_preempted_it(plans: int) -> None:
    made = bench(num_blocks=8, plans_in_flight=plans)
    made.submit(request("first", [2] * 6, 24), request("second", [3] * 6, 24))
    while made.core.has_work:
        before = made.core.stats.num_preemptions
        made.step()
        if made.core.stats.num_preemptions > before:
            assert made.plans[-1].admits == []
    assert made.core.stats.num_preemptions > 0


# ---------------------------------------------------------------------------------------------------------------
# ends


@in_flight
def test_nothing_past_a_stop_is_emitted_counted_or_cached(plans: int) -> None:
    made = bench(stops_after(5), plans_in_flight=plans)
    made.submit(request("a", PROMPT, 50))  # 10 + 6 tokens fill four blocks, the last ends with EOS
    outcome = made.run()["a"]
    ids = [*expected(PROMPT, 5), EOS]
    assert outcome.token_ids == ids
    assert outcome.reason is FinishReason.STOP
    assert outcome.last is not None and outcome.last.stop_token_id is None
    assert made.core.stats.num_generated_tokens == 6
    made.submit(request("b", [*PROMPT, *ids, 9, 9], 1))
    made.run()
    assert made.outcomes["b"].deltas[0].num_cached_tokens == 12


@in_flight
def test_generated_blocks_are_cached_for_the_next_turn(plans: int) -> None:
    made = bench(plans_in_flight=plans)
    made.submit(request("a", PROMPT, 11))
    turn = [*PROMPT, *made.run()["a"].token_ids]
    made.submit(request("b", [*turn, 9, 9, 9, 9], 1))
    made.run()
    assert made.outcomes["b"].deltas[0].num_cached_tokens == 20


@in_flight
def test_stop_ids_and_what_they_report(plans: int) -> None:
    made = bench(from_function(lambda prompt, index: 7 if index == 3 else 9), plans_in_flight=plans)
    made.submit(
        request("stop id", PROMPT, 6, stop_token_ids=(7,)),
        request("other", PROMPT, 6, stop_token_ids=(EOS,)),
    )
    made.run()
    stopped, other = made.outcomes["stop id"], made.outcomes["other"]
    assert (stopped.reason, len(stopped.token_ids)) == (FinishReason.STOP, 4)
    assert stopped.last is not None and stopped.last.stop_token_id == 7
    assert (other.reason, len(other.token_ids)) == (FinishReason.LENGTH, 6)


@in_flight
@pytest.mark.parametrize(
    ("params", "num_tokens", "reason"),
    [
        ({}, 3, FinishReason.STOP),
        ({"ignore_eos": True}, 8, FinishReason.LENGTH),
        ({"min_tokens": 3}, 3, FinishReason.STOP),
        ({"min_tokens": 4}, 8, FinishReason.LENGTH),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, 3, FinishReason.STOP),
    ],
)
def test_eos(plans: int, params: dict[str, object], num_tokens: int, reason: FinishReason) -> None:
    made = bench(stops_after(2), plans_in_flight=plans)
    made.submit(request("a", PROMPT, 8, **params))
    outcome = made.run()["a"]
    assert (len(outcome.token_ids), outcome.reason) == (num_tokens, reason)
    assert outcome.last is not None and outcome.last.stop_token_id is None


@in_flight
def test_length_ends_without_computing_a_token_too_many(plans: int) -> None:
    made = bench(max_model_len=16, plans_in_flight=plans)
    made.submit(request("by tokens", PROMPT, 3), request("by context", [20, *PROMPT], 100))
    made.run()
    assert len(made.outcomes["by tokens"].token_ids) == 3
    assert len(made.outcomes["by context"].token_ids) == 5
    assert {outcome.reason for outcome in made.outcomes.values()} == {FinishReason.LENGTH}
    assert made.device.num_tokens_computed == len(PROMPT) + 2 + len(PROMPT) + 1 + 4


@in_flight
def test_abort_frees_within_one_step_and_says_nothing_more(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_seqs=2)
    made.submit(request("a", PROMPT, 50), request("b", [9, *PROMPT], 50), request("waiting", PROMPT, 50))
    for _ in range(4):
        made.step()
    num_deltas = len(made.outcomes["a"].deltas)
    made.core.abort(["a", "waiting", "nobody"])
    made.step()
    stats = made.core.stats
    assert (stats.num_running, stats.num_waiting) == (1, 0)
    used = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
    assert used == made.scheduler.kv.num_blocks_of(11 + len(made.outcomes["b"].token_ids) + plans)
    made.run()
    assert len(made.outcomes["a"].deltas) == num_deltas
    assert made.outcomes["waiting"].deltas == []
    assert made.outcomes["b"].token_ids == expected([9, *PROMPT], 50)


@in_flight
def test_abort_of_all_leaves_an_idle_engine(plans: int) -> None:
    made = bench(plans_in_flight=plans)
    made.submit(request("a", PROMPT, 50), request("b", PROMPT, 50))
    made.step()
    made.core.abort(["a", "b"])
    assert made.core.has_work
    made.run(10)


@in_flight
def test_a_row_given_away_does_not_get_the_late_ids_of_its_last_owner(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_seqs=1)
    made.submit(request("a", PROMPT, 50), request("b", [9, *PROMPT], 20))
    for _ in range(3):
        made.step()
    made.core.abort(["a"])
    made.run()
    assert made.outcomes["b"].token_ids == expected([9, *PROMPT], 20)
    assert [admit.row for plan in made.plans for admit in plan.admits] == [0, 0]
    assert [admit.epoch for plan in made.plans for admit in plan.admits] == [1, 2]


@in_flight
def test_finish_corrects_the_counters_and_drops_what_follows(plans: int) -> None:
    made = bench(plans_in_flight=plans)
    made.submit(request("a", PROMPT, 50))
    while len(made.outcomes["a"].token_ids) < 9:
        made.step()
    reported = made.core.stats.num_generated_tokens
    assert reported == 9
    made.core.finish("a", FinishReason.STOP, 6)
    made.run()
    assert len(made.outcomes["a"].deltas) == 9
    assert made.core.stats.num_generated_tokens == reported  # a counter never falls
    made.submit(request("b", [9, *PROMPT], 5))
    made.run()
    assert made.core.stats.num_generated_tokens == 6 + 5
    made.core.finish("nobody", FinishReason.STOP, 0)
    assert made.core.stats.num_generated_tokens == 11


# ---------------------------------------------------------------------------------------------------------------
# order


@in_flight
def test_decoding_rows_go_first_and_in_every_step(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_batched_tokens=8)
    made.submit(request("decodes", PROMPT[:4], 30))
    made.step()
    made.submit(request("long", [5] * 60, 1))
    made.run()
    busy = made.plans[1 : 1 + 60 // 7]
    assert all(plan.work[0].num_tokens == 1 and plan.work[0].row == 0 for plan in busy)
    assert all(plan.num_tokens > 4 for plan in busy)


@in_flight
def test_requests_are_served_as_they_come(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_seqs=2)
    made.submit(*(request(f"r{n}", [2 + n] * 5, 3 + n, priority=-n) for n in range(5)))
    made.run()
    assert [admit.token_ids[0] for plan in made.plans for admit in plan.admits] == [2, 3, 4, 5, 6]


@in_flight
def test_the_smaller_priority_value_goes_first(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_seqs=1, policy="priority")
    made.submit(*(request(f"r{n}", [2 + n] * 5, 3, priority=p) for n, p in enumerate([1, 2, 0, 1, -5])))
    made.run()
    assert [admit.token_ids[0] - 2 for plan in made.plans for admit in plan.admits] == [4, 2, 0, 3, 1]


@in_flight
def test_the_least_important_row_is_preempted(plans: int) -> None:
    made = bench(plans_in_flight=plans, num_blocks=12, policy="priority")
    made.submit(request("low", [2] * 6, 30, priority=5))
    made.step()
    made.submit(request("high", [3] * 6, 30, priority=0))
    made.run(300)
    again = {admit.token_ids[0] for plan in made.plans for admit in plan.admits if len(admit.token_ids) > 6}
    assert again == {2}


@in_flight
def test_an_urgent_prompt_goes_before_the_rest_of_a_long_one(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_batched_tokens=8, policy="priority")
    made.submit(request("long", [5] * 60, 1, priority=1))
    made.step()
    made.submit(request("urgent", [6] * 16, 1, priority=0))
    made.run()
    ends = {name: outcome.deltas[-1] for name, outcome in made.outcomes.items()}
    assert set(ends) == {"long", "urgent"}
    assert [work.row for plan in made.plans[1:3] for work in plan.work] == [1, 1]


def tokens_by_step(made: Bench) -> list[dict[int, int]]:
    """For each plan, the tokens that each row computes."""
    return [{work.row: work.num_tokens for work in plan.work} for plan in made.plans]


@in_flight
def test_a_long_prompt_leaves_half_to_a_short_one_behind_it(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_batched_tokens=16, block_size=4)
    made.submit(request("long", [5] * 80, 1), request("short", [6] * 19, 1))
    made.run()
    steps = tokens_by_step(made)
    assert [step.get(0) for step in steps[:3]] == [8, 8, 12] and [step.get(1) for step in steps[:3]] == [8, 8, 3]
    assert [step.get(0) for step in steps[3:6]] == [16, 16, 16]


@in_flight
def test_prompts_of_one_length_come_one_after_the_other(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_batched_tokens=16, block_size=4)
    made.submit(request("a", [5] * 40, 1), request("b", [6] * 40, 1), request("c", [7] * 24, 1))
    made.run()
    steps = tokens_by_step(made)
    assert [step.get(0) for step in steps[:3]] == [16, 16, 8]
    assert not any(1 in step for step in steps[:2])


@in_flight
def test_prompts_that_begin_alike_share_what_each_computes(plans: int) -> None:
    """The short one skips what the long one has, computes on from there, and the long one skips that."""
    made = bench(plans_in_flight=plans, max_num_batched_tokens=16, block_size=4)
    made.submit(request("long", [5] * 90, 1))
    made.step()
    made.submit(request("short", [5] * 30 + [6, 7], 1))
    made.run()
    steps = tokens_by_step(made)
    assert steps[1] == {0: 8, 1: 8} and made.device.num_tokens_computed == 90 + 4


@in_flight
@pytest.mark.parametrize("priority", [-1, 1])
@pytest.mark.parametrize("caching", [True, False])
def test_decoding_rows_eat_the_memory_of_a_prompt_under_way(plans: int, priority: int, caching: bool) -> None:
    """It is the victim if it comes last; else it waits for memory, and rows of the plan are left alone."""
    made = bench(plans_in_flight=plans, num_blocks=19, max_num_batched_tokens=4, policy="priority", caching=caching)
    made.submit(request("a", [2] * 6, 24), request("b", [3] * 6, 24))
    for _ in range(6):
        made.step()
    made.submit(request("prompt", [5] * 40, 4, priority=priority))
    made.run(600)
    assert {name: outcome.token_ids for name, outcome in made.outcomes.items()} == {
        "a": expected([2] * 6, 24), "b": expected([3] * 6, 24), "prompt": expected([5] * 40, 4),
    }  # fmt: skip
    num_admits = Counter(admit.token_ids[0] for plan in made.plans for admit in plan.admits)
    assert num_admits == ({2: 1, 3: 1, 5: 2} if priority > 0 else {2: 1, 3: 2, 5: 1})


@in_flight
def test_cached_blocks_that_a_prompt_would_use_are_no_room_for_the_rest_of_it(plans: int) -> None:
    made = bench(plans_in_flight=plans, num_blocks=8)
    made.submit(request("before", [5] * 16, 1))
    made.run()
    made.submit(request("runs", [6] * 7, 8), request("after", [5] * 31, 1))
    made.run()
    first, second = [plan.step_id for plan in made.plans[1:] for _ in plan.admits]
    assert second - first >= 8
    assert made.outcomes["after"].deltas[0].num_cached_tokens == 16


@in_flight
def test_a_prompt_waits_until_all_of_it_fits(plans: int) -> None:
    made = bench(plans_in_flight=plans, num_blocks=16, caching=False)
    made.submit(request("a", [2] * 20, 8), request("b", [3] * 44, 8))
    made.run()
    first, second = [plan.step_id for plan in made.plans for _ in plan.admits]
    assert second - first >= 8
    assert made.core.stats.num_preemptions == 0

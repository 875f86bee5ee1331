"""What the prefix cache saves, on the scripted device, which compares every block read with the tokens behind it."""

from __future__ import annotations

import pytest
from engine_support import VOCAB, bench, expected, request

PROMPT = list(range(2, 12))

in_flight = pytest.mark.parametrize("plans", [0, 1, 2])


@in_flight
@pytest.mark.parametrize("budget", [512, 8192])
def test_eight_equal_prompts_compute_their_prefix_once(plans: int, budget: int) -> None:
    made = bench(plans_in_flight=plans, num_blocks=600, block_size=16, max_model_len=8192,
                 max_num_batched_tokens=budget)  # fmt: skip
    prompt = [2 + i * i % (VOCAB - 2) for i in range(4096)]
    made.submit(*(request(f"r{n}", prompt, 4) for n in range(8)))
    outcomes = made.run()
    assert {tuple(outcome.token_ids) for outcome in outcomes.values()} == {tuple(expected(prompt, 4))}
    # Once the prompt, for the others the block that holds the last token, and three decoding steps each.
    assert made.device.num_tokens_computed == 4096 + 7 * 16 + 8 * 3
    assert made.core.stats.num_cache_hits == 7 * (4096 - 16)
    assert made.core.stats.num_cache_queries == 8 * 4096
    if budget == 8192:
        assert len(made.plans[0].admits) == 8, "hits within the same step"


@in_flight
@pytest.mark.parametrize("budget", [24, 26])
def test_equal_beginnings_are_computed_once(plans: int, budget: int) -> None:
    made = bench(plans_in_flight=plans, num_blocks=200, max_num_batched_tokens=budget)
    system = [2 + i % 7 for i in range(64)]
    made.submit(*(request(f"r{n}", [*system, 20 + n, *[30 + n] * n], 1) for n in range(8)))
    made.run()
    assert made.device.num_tokens_computed == 64 + sum(1 + n for n in range(8))


@in_flight
def test_a_prompt_under_way_skips_what_another_computed_meanwhile(plans: int) -> None:
    made = bench(plans_in_flight=plans, max_num_batched_tokens=10, policy="priority")
    prompt = [2 + i % 9 for i in range(40)]
    made.submit(request("late", prompt, 2, priority=1))
    made.step()
    made.submit(request("first", prompt, 2, priority=0))
    made.run()
    skips = [work.num_cached for plan in made.plans for work in plan.work if work.num_cached]
    assert skips == [28]
    assert made.outcomes["late"].token_ids == expected(prompt, 2)
    assert made.outcomes["late"].deltas[0].num_cached_tokens == 28


def test_the_last_token_of_a_prompt_publishes_its_block_when_planned() -> None:
    made = bench(plans_in_flight=2, max_num_batched_tokens=3)
    made.submit(request("a", PROMPT[:4], 9))
    made.step()
    made.step()
    made.submit(request("b", PROMPT, 2))
    made.step()
    assert made.outcomes["a"].deltas == [], "no result has landed"
    assert [admit.num_computed for admit in made.plans[2].admits] == [4]
    made.run()


@in_flight
def test_a_preempted_row_resumes_from_its_own_blocks(plans: int) -> None:
    made = bench(num_blocks=12, plans_in_flight=plans)
    made.submit(request("first", [2] * 8, 30), request("second", [3] * 8, 30))
    made.run(300)
    (again,) = [admit for plan in made.plans for admit in plan.admits if len(admit.token_ids) > 8]
    assert again.num_computed > 0
    assert made.outcomes["second"].deltas[0].num_cached_tokens == 0  # its own blocks are no hit
    assert made.core.stats.num_cache_hits == 0


@in_flight
def test_reset_cache(plans: int) -> None:
    made = bench(plans_in_flight=plans)
    made.submit(request("a", PROMPT, 2))
    made.run()
    assert made.core.stats.num_cached_blocks > 0
    made.core.reset_cache()
    assert made.core.stats.num_cached_blocks == 0
    made.submit(request("b", PROMPT, 2))
    made.run()
    assert made.core.stats.num_cache_hits == 0


@in_flight
@pytest.mark.parametrize("num_blocks", [9, 64])
def test_prompt_logprobs_are_whole_and_in_order(plans: int, num_blocks: int) -> None:
    made = bench(plans_in_flight=plans, num_blocks=num_blocks, max_num_batched_tokens=8)
    made.submit(request("other", [9] * 12, 20), request("a", [9] * 12, 12, prompt_logprobs=0, logprobs=1))
    outcome = made.run()["a"]
    first = outcome.deltas[0].prompt_logprobs
    assert first is not None
    assert [entry and entry.token_id for entry in first] == [None, *[9] * 11]
    assert all(delta.prompt_logprobs is None for delta in outcome.deltas[1:])
    assert [entry.token_id for delta in outcome.deltas for entry in delta.logprobs or ()] == outcome.token_ids
    assert outcome.deltas[0].num_cached_tokens == 0

"""Prompt tokens beside decoding rows fill a step up to the time asked for, whatever they cost."""

from __future__ import annotations

import pytest
from engine_support import bench, request

from saddle.engine.pacing import FIRST_TOKENS, Pacer
from saddle.protocol import RowWork, StepPlan

LEAST = 16


def plan(num_decodes: int, *prompts: int) -> StepPlan:
    lengths = [1] * num_decodes + list(prompts)
    return StepPlan(0, [], [RowWork(row, 1, count, 0, [], True, count) for row, count in enumerate(lengths)], [])


def settle(pacer: Pacer, decode_s: float, fixed_s: float, token_s: float, steps: int = 40) -> tuple[int, float]:
    """Tokens and seconds of the last of many steps of 8 decoding rows, each as long as the pacer lets it be."""
    pacer.observe(plan(8), decode_s)
    tokens, seconds = 0, 0.0
    for _ in range(steps):
        tokens = pacer.limit(8192, 8)
        seconds = decode_s + fixed_s + token_s * tokens
        pacer.observe(plan(8, tokens), seconds)
    return tokens, seconds


def test_without_a_bound_or_decoding_rows_the_budget_stays() -> None:
    free, bound = Pacer(None, False, LEAST), Pacer(0.001, False, LEAST)
    for pacer in (free, bound):
        pacer.observe(plan(4, 100), 1.0)
    assert free.limit(8192, 4) == 8192
    assert bound.limit(8192, 0) == 8192 and bound.limit(8192, 4) == LEAST


def test_before_anything_was_measured_a_few_tokens_join() -> None:
    pacer = Pacer(0.06, False, LEAST)
    assert pacer.limit(8192, 4) == FIRST_TOKENS and pacer.limit(100, 4) == 100


@pytest.mark.parametrize("fixed_s", [0.0, 0.01])
@pytest.mark.parametrize("token_s", [1e-5, 1e-4])
def test_steps_come_to_take_what_was_asked_for(fixed_s: float, token_s: float) -> None:
    tokens, seconds = settle(Pacer(0.06, False, LEAST), 0.015, fixed_s, token_s)
    assert seconds == pytest.approx(0.06, rel=0.02)
    assert tokens == pytest.approx((0.06 - 0.015 - fixed_s) / token_s, rel=0.02)


def test_a_bound_below_the_decoding_rows_leaves_the_least() -> None:
    assert settle(Pacer(0.06, False, LEAST), 0.08, 0.0, 1e-4)[0] == LEAST


def test_prompts_get_half_where_no_bound_was_asked_for() -> None:
    tokens, seconds = settle(Pacer(0.06, True, LEAST), 0.08, 0.0, 1e-4)
    assert seconds == pytest.approx(0.16, rel=0.02) and tokens == pytest.approx(800, rel=0.02)


def test_cost_that_grows_along_a_prompt_is_followed() -> None:
    pacer = Pacer(0.06, False, LEAST)
    pacer.observe(plan(8), 0.01)
    found = []
    for step in range(200):
        tokens = pacer.limit(8192, 8)
        seconds = 0.01 + tokens * 1e-5 * (1 + step / 20)
        pacer.observe(plan(8, tokens), seconds)
        found.append(seconds)
    assert all(0.05 < seconds < 0.066 for seconds in found[10:])


@pytest.mark.parametrize("plans", [0, 1, 2])
def test_the_scheduler_keeps_steps_short_while_rows_decode(plans: int) -> None:
    """Eight rows decode beside a long prompt; a token costs 0.2 ms, a row 0.25 ms."""
    def step_s(plan: StepPlan) -> float:
        return sum(2.5e-4 if work.num_tokens == 1 else 2e-4 * work.num_tokens for work in plan.work)

    made = bench(plans_in_flight=plans, max_num_batched_tokens=512, num_blocks=600, max_model_len=2048,
                 max_num_seqs=9, step_s=step_s, max_step_s=0.006)  # fmt: skip
    made.submit(*(request(f"r{row}", [2 + row] * 5, 100) for row in range(8)))
    for _ in range(5):
        made.step()
    made.submit(request("long", [9] * 900, 4))
    made.run()
    mixed = [step_s(plan) for plan in made.plans[5:] if any(work.num_tokens > 1 for work in plan.work)]
    assert len(mixed) > 900 * 2e-4 / 0.006
    assert max(mixed[plans + 2 :]) < 0.0075 and sum(mixed) / len(mixed) > 0.004

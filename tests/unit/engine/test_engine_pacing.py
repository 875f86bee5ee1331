"""Prompt tokens beside decoding rows fill a step up to the time asked for, whatever they cost.

The device of the simulations costs what steps of 16 full-width layers were measured to cost on an H100.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from engine_support import bench, request

from saddle.engine.pacing import FIRST_TOKENS, Pacer, solve
from saddle.protocol import RowWork, StepPlan

LEAST = 64
BOUND_S = 0.06
BUDGET = 8192

# Prompt tokens, where they end, and milliseconds of every second step of 65,536 tokens beside 32 rows, as measured on
# an H100 whose attention split its keys for chunks of up to 640 tokens alone: hence the fall at 41,000.
LONG_PROMPT = [
    (4288, 4288, 57.7), (3328, 11328, 67.3), (2112, 15936, 65.9), (1600, 19392, 58.6), (1472, 22400, 60.9),
    (1216, 25728, 55.1), (1152, 28032, 57.0), (1088, 30208, 61.7), (960, 32192, 58.1), (896, 34048, 58.1),
    (832, 35776, 60.0), (832, 37440, 61.1), (768, 38976, 62.9), (704, 40384, 63.9), (640, 41664, 47.8),
    (640, 42944, 48.8), (640, 44224, 50.3), (640, 45504, 50.2), (640, 46784, 51.4), (640, 48064, 52.7),
    (640, 49344, 53.2), (640, 50624, 54.5), (640, 51904, 55.3), (640, 53184, 54.5), (576, 54400, 53.8),
    (576, 55552, 54.3), (576, 56704, 55.0), (576, 57856, 55.9), (576, 59008, 57.3), (576, 60160, 57.8),
    (576, 61312, 58.8), (576, 62464, 59.1), (512, 63552, 58.8), (512, 64576, 58.1), (448, 65536, 47.8),
]  # fmt: skip


def rows(count: int, context: int) -> list[RowWork]:
    return [RowWork(row, 1, 1, 0, [], True, context) for row in range(count)]


def prompt(num_tokens: int, start: int = 0) -> RowWork:
    return RowWork(99, 1, num_tokens, 0, [], True, start + num_tokens)


def plan(*work: RowWork) -> StepPlan:
    return StepPlan(0, [], list(work), [])


@dataclass
class Device:
    """Seconds of a step: weights of the experts that its tokens touch, products, attention, keys of decoding rows.

    A token costs more where tensor cores are the limit. Kernels of prompts of 512, 2,048 and 8,192 tokens: 24.1, 32.4
    and 106.2 ms; steps of 10, 16 and 32 rows at 2,048 tokens of context: 7.0, 9.7 and 14.6 ms.
    """

    dense_s: float = 0.0012
    experts_s: float = 0.0195
    token_s: float = 5e-6
    late_token_s: float = 7.75e-6
    pair_s: float = 0.84e-9
    key_s: float = 22e-9
    noise: float = 0.03
    outliers: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(5))

    def __call__(self, plan: StepPlan) -> float:
        touched = 1 - (1 - 8 / 256) ** plan.num_tokens
        keys = sum(work.context_bound for work in plan.work if work.num_tokens == 1)
        seconds = self.dense_s + self.experts_s * touched + self.key_s * keys
        prompts = [work for work in plan.work if work.num_tokens > 1]
        if prompts:
            late = max(plan.num_tokens - 2048, 0)
            seconds += self.token_s * (plan.num_tokens - late) + self.late_token_s * late
        for work in prompts:
            seconds += self.pair_s * work.num_tokens * (work.context_bound - work.num_tokens / 2)
        far = 3 if self.random.random() < self.outliers else 1
        return seconds * far * (1 + self.random.gauss(0, self.noise))


def test_the_device_is_the_one_that_was_measured() -> None:
    device = Device(noise=0.0)
    prompts = [1e3 * device(plan(prompt(count))) for count in (512, 2048, 8192)]
    assert prompts == pytest.approx([24.1, 32.4, 106.2], rel=0.05)
    decodes = [1e3 * device(plan(*rows(count, 2048))) for count in (10, 16, 32)]
    assert decodes == pytest.approx([7.0, 9.7, 14.6], rel=0.05)


@dataclass
class Engine:
    """A pacer and a device whose results come a step late, as in the engine."""

    pacer: Pacer
    device: Device
    contexts: list[int]
    late: deque[tuple[StepPlan, float]] = field(default_factory=deque)
    mixed: list[tuple[int, float]] = field(default_factory=list)

    def step(self, prompts: list[list[int]]) -> None:
        """One step of all rows; `prompts` are [computed, left], the leader first, and lose what they are given."""
        work = [RowWork(row, 1, 1, 0, [], True, context) for row, context in enumerate(self.contexts)]
        (room_s, budget), given = self.pacer.room(work, BUDGET), 0
        for index, each in enumerate(prompts):
            start, left = each
            count = min(left, self.pacer.fit(room_s, start, budget, leads=index == 0))
            count -= count % LEAST if count < left else 0
            if count == 0:
                break
            if room_s is not None:
                room_s -= self.pacer.cost_s(count, start)
            each[:] = start + count, left - count
            work.append(RowWork(100 + index, 1, count, 0, [], left == count, start + count))
            budget -= count
            given += count
        seconds = self.device(made := plan(*work))
        self.late.append((made, seconds))
        if len(self.late) > 1:
            self.pacer.observe(*self.late.popleft())
        self.contexts = [context + 1 for context in self.contexts]
        if given and self.contexts:
            self.mixed.append((given, seconds))

    def run(self, *prompts: tuple[int, int]) -> None:
        """Compute prompts of (cached, new) tokens that came together."""
        left = [list(each) for each in prompts]
        while left:
            self.step(left)
            left = [each for each in left if each[1]]

    def rest(self, steps: int = 5) -> None:
        for _ in range(steps):
            self.step([])

    def share_over(self, seconds: float) -> float:
        return sum(each > seconds for _, each in self.mixed) / len(self.mixed)

    @property
    def mean_s(self) -> float:
        return sum(seconds for _, seconds in self.mixed) / len(self.mixed)


def engine(num_rows: int = 32, context: int = 1000, device: Device | None = None) -> Engine:
    made = Engine(Pacer(BOUND_S, True, LEAST), device or Device(), [context] * num_rows)
    if num_rows:
        made.rest(30)
    return made


def test_equations_are_solved() -> None:
    matrix, found = [[4.0, 2.0, 1.0], [2.0, 5.0, 3.0], [1.0, 3.0, 6.0]], (0.5, -1.0, 2.0)
    right = [sum(a * b for a, b in zip(row, found, strict=True)) for row in matrix]
    assert solve(matrix, right) == pytest.approx(found)


def test_without_a_bound_or_decoding_rows_prompts_take_what_they_like() -> None:
    for pacer, decodes in ((Pacer(None, False, LEAST), rows(4, 100)), (Pacer(0.001, False, LEAST), [])):
        pacer.observe(plan(*rows(4, 100), prompt(100)), 1.0)
        room_s, budget = pacer.room(decodes, BUDGET)
        assert room_s is None and pacer.fit(room_s, 0, budget, leads=True) == BUDGET


def test_the_leader_gets_on_even_if_there_is_no_room_and_others_do_not() -> None:
    pacer = Pacer(0.01, False, LEAST)
    pacer.observe(plan(*rows(8, 100)), 0.02)
    room_s, _ = pacer.room(rows(8, 100), BUDGET)
    assert room_s is not None and room_s < 0
    assert pacer.fit(room_s, 0, BUDGET, leads=True) == LEAST and pacer.fit(room_s, 0, 9, leads=True) == 9
    assert pacer.fit(room_s, 0, BUDGET, leads=False) == 0


def test_before_anything_was_measured_a_few_tokens_join() -> None:
    pacer = Pacer(BOUND_S, False, LEAST)
    room_s, budget = pacer.room(rows(4, 100), BUDGET)
    assert FIRST_TOKENS / 2 < pacer.fit(room_s, 0, budget, leads=True) <= FIRST_TOKENS


def test_measured_steps_are_predicted_one_ahead() -> None:
    pacer = Pacer(BOUND_S, True, LEAST)
    pacer.observe(plan(*rows(2, 2048)), 0.00243)
    for _ in range(4):
        pacer.observe(plan(prompt(2048)), 0.0330)
    pacer.observe(plan(*rows(32, 1000)), 0.0146)
    errors = []
    for count, end, milliseconds in LONG_PROMPT:
        work = *rows(32, 1100), prompt(count, end - count)
        errors.append(1e-3 * milliseconds / pacer.predict_s(work) - 1)
        pacer.observe(plan(*work), 1e-3 * milliseconds)
    assert sum(map(abs, errors)) / len(errors) < 0.08
    assert max(errors[1:]) < 0.2 and min(errors) > -0.35


def test_prompts_of_one_length_and_a_few_rows_tell_reading_from_computing() -> None:
    """Measured: 2 rows alone 2.43 ms, prompts of 2,048 tokens 33 ms; later 4,160 tokens beside 7 rows 55.4 ms."""
    pacer = Pacer(BOUND_S, True, LEAST)
    for _ in range(8):
        pacer.observe(plan(prompt(2048)), 0.033)
        pacer.observe(plan(*rows(2, 2048)), 0.00243)
    room_s, budget = pacer.room(rows(7, 2048), BUDGET)
    assert room_s is not None and budget == 2 * 2048
    assert 1e3 * pacer.predict_s([*rows(7, 2048), prompt(2048), prompt(2112)]) == pytest.approx(55.4, rel=0.3)
    assert 1e3 * pacer.predict_s([*rows(7, 2048), prompt(512)]) == pytest.approx(24.1, rel=0.25)


def test_tokens_are_never_free() -> None:
    """Rows alone took longer than any prompt later: by that, reading the weights would explain more than all."""
    pacer = Pacer(BOUND_S, True, LEAST)
    pacer.observe(plan(*rows(1, 100)), 0.01)
    for _ in range(8):
        pacer.observe(plan(prompt(2048)), 0.03)
    assert 0.001 < pacer.cost_s(2048, 0) < pacer.predict_s([prompt(2048)])
    assert pacer.predict_s([prompt(2048)]) == pytest.approx(0.03, rel=0.35)


def test_a_device_that_becomes_slower_or_faster_is_followed() -> None:
    made = engine()
    for factor in (1.6, 1.0):
        made.device.token_s, made.device.late_token_s = 5e-6 * factor, 7.75e-6 * factor
        made.device.experts_s = 0.0195 * factor
        made.run((0, 60_000))
        made.mixed.clear()
        made.run((0, 30_000))
        assert made.share_over(0.075) == 0 and made.mean_s > 0.05


def test_what_fits_costs_what_there_is_room_for() -> None:
    made = engine()
    made.run((0, 20_000), (0, 20_000))
    for start in (0, 5000, 100_000):
        count = made.pacer.fit(0.03, start, 100_000, leads=False)
        assert made.pacer.cost_s(count, start) == pytest.approx(0.03, rel=0.02)


def test_prompts_of_ordinary_length_fill_steps_soon() -> None:
    """Ten come at once, later some at a time beside those that decode, as where ten clients wait for each other."""
    made = engine(0)
    made.run(*[(0, 2048)] * 4)
    made.contexts = [2048] * 4
    made.rest()
    made.run(*[(0, 2048)] * 6)
    made.contexts = [3000] * 8
    made.rest()
    for _ in range(4):
        made.run((0, 2048), (0, 2048), (0, 2048))
        made.rest()
    full = [seconds for _, seconds in made.mixed if seconds > 0.05]
    assert len(full) >= 6 and max(full) < 0.075
    assert len(made.mixed) < 16


def test_a_long_prompt_beside_decoding_rows_keeps_steps_short_and_full() -> None:
    """32 rows decode beside 65,536 tokens; 500 more come in the middle."""
    made = engine()
    prompts = [[0, 65_536]]
    while prompts:
        made.step(prompts)
        if len(made.mixed) == 20:
            prompts.append([0, 500])
        prompts = [each for each in prompts if each[1]]
    assert made.share_over(0.075) == 0
    assert made.mean_s > 0.054
    assert max(count for count, _ in made.mixed) > 2 * min(count for count, _ in made.mixed[:-1])


def test_steps_stay_short_when_contexts_change_from_step_to_step() -> None:
    """Turns of agents: few new tokens behind a long cached context, beside fresh prompts and short turns."""
    made = engine()
    for _ in range(15):
        made.run((100_000, 2000))
        made.rest()
        made.run((0, 4096), (0, 1000))
        made.rest()
        made.run((30_000, 300))
        made.rest()
    assert made.share_over(0.072) < 0.01
    assert made.mean_s > 0.045


@pytest.mark.parametrize(("num_rows", "context"), [(8, 2000), (32, 1000), (16, 100_000), (64, 2000)])
def test_rows_that_decode_are_counted_as_what_they_cost(num_rows: int, context: int) -> None:
    made = engine(8, 1000)
    made.contexts = [context] * num_rows
    without_s = made.device(plan(*rows(num_rows, context), prompt(LEAST)))
    longest_s = max(BOUND_S, 1.5 * without_s)
    made.run((0, 40_000))
    assert made.share_over(1.25 * longest_s) == 0 and made.mean_s > 0.8 * longest_s
    made.contexts = [500] * 4  # most of them end
    made.mixed.clear()
    made.run((0, 20_000))
    assert made.share_over(0.075) == 0 and made.mean_s > 0.04


def test_a_few_steps_that_were_held_up_change_little() -> None:
    calm, held_up = engine(), engine(device=Device(outliers=0.03))
    for made in (calm, held_up):
        for _ in range(10):
            made.run((0, 20_000))
    tokens = [sum(count for count, _ in made.mixed) / len(made.mixed) for made in (calm, held_up)]
    assert tokens[1] > 0.75 * tokens[0]
    assert held_up.share_over(0.075) < 0.06


def test_a_device_slower_than_the_bound_gives_prompts_half_as_long_as_all_else() -> None:
    slow = Device(dense_s=0.02, experts_s=0.1, token_s=6e-5, late_token_s=6e-5, noise=0.0)
    made = engine(device=slow)
    without_s = slow.dense_s + slow.experts_s + slow.key_s * 32 * 1000
    made.run((0, 20_000))
    median_s = sorted(seconds for _, seconds in made.mixed)[len(made.mixed) // 2]
    assert without_s > BOUND_S and median_s == pytest.approx(1.5 * without_s, rel=0.1)
    bound = Engine(Pacer(BOUND_S, False, LEAST), slow, [1000] * 32)
    bound.rest()
    bound.run((0, 1000))
    assert [count for count, _ in bound.mixed[5:-1]] == [LEAST] * (len(bound.mixed) - 6)


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
    assert max(mixed[2 * plans + 4 :]) < 0.0075 and sum(mixed) / len(mixed) > 0.004

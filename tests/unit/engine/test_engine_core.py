"""The loop body: the order of launches and results, and structured output between them."""

from __future__ import annotations

import pytest
from engine_support import EOS, Bench, EvenGrammar, bench, expected, request

from saddle.executor.fake import from_function
from saddle.protocol import Accepted, FinishReason, GrammarSpec, Refused, StepMask, StepPlan, StepResult

PROMPT = list(range(2, 12))
EVEN = GrammarSpec(kind="regex", source="even")
ODD = from_function(lambda prompt, index: 21 + 2 * (index % 8))

in_flight = pytest.mark.parametrize("plans", [0, 1, 2])


def trace(made: Bench) -> list[tuple[str, int]]:
    """Records the calls of the device from now on."""
    calls: list[tuple[str, int]] = []
    device = made.device
    forward, sample, collect = device.forward, device.sample, device.collect

    def traced_forward(plan: StepPlan) -> None:
        calls.append(("forward", plan.step_id))
        forward(plan)

    def traced_sample(step_id: int, mask: StepMask | None) -> None:
        calls.append(("sample", step_id))
        sample(step_id, mask)

    def traced_collect(timeout_s: float | None) -> StepResult | None:
        result = collect(timeout_s)
        assert result is not None
        calls.append(("collect", result.step_id))
        return result

    device.forward, device.sample, device.collect = (  # type: ignore[method-assign]
        traced_forward, traced_sample, traced_collect,
    )  # fmt: skip
    return calls


def test_without_plans_in_flight_every_result_is_awaited() -> None:
    made = bench(plans_in_flight=0)
    calls = trace(made)
    made.submit(request("a", PROMPT, 2))
    made.run()
    assert calls == [(what, step) for step in range(2) for what in ("forward", "sample", "collect")]


def test_with_plans_in_flight_results_are_awaited_later() -> None:
    made = bench(plans_in_flight=2)
    calls = trace(made)
    made.submit(request("a", PROMPT, 4))
    assert [len(made.step()) for _ in range(6)] == [0, 0, 1, 1, 1, 1]
    assert calls[:7] == [
        ("forward", 0), ("sample", 0), ("forward", 1), ("sample", 1), ("forward", 2), ("sample", 2), ("collect", 0),
    ]  # fmt: skip
    assert calls[-3:] == [("collect", 1), ("collect", 2), ("collect", 3)]


@pytest.mark.parametrize("plans", [1, 2])
def test_only_sampling_waits_for_a_mask(plans: int) -> None:
    """Forward N+1 is issued before the ids of step N are known, its sampling after."""
    made = bench(plans_in_flight=plans, grammar=EvenGrammar())
    calls = trace(made)
    made.submit(request("a", PROMPT, 3, grammar=EVEN))
    made.run()
    assert calls == [
        ("forward", 0), ("sample", 0),
        ("forward", 1), ("collect", 0), ("sample", 1),
        ("forward", 2), ("collect", 1), ("sample", 2),
        ("collect", 2),
    ]  # fmt: skip


@in_flight
def test_masked_rows_follow_the_grammar_and_others_do_not_notice(plans: int) -> None:
    made = bench(ODD, plans_in_flight=plans, grammar=EvenGrammar())
    made.submit(request("free", [9, *PROMPT], 6), request("masked", PROMPT, 6, grammar=EVEN))
    made.run()
    assert made.outcomes["masked"].token_ids == [0] * 6  # the smallest even id
    assert made.outcomes["free"].token_ids == [21, 23, 25, 27, 29, 31]
    rows = {admit.token_ids[0]: admit.row for plan in made.plans for admit in plan.admits}
    assert all(plan.masked_rows == [rows[2]] for plan in made.plans)


@in_flight
def test_a_grammar_binds_after_its_token_and_sees_every_id(plans: int) -> None:
    grammar = EvenGrammar()
    made = bench(ODD, plans_in_flight=plans, grammar=grammar, max_num_batched_tokens=4)
    spec = GrammarSpec(kind="regex", source="even", after_token_id=25)
    made.submit(request("a", PROMPT, 6, grammar=spec))
    made.run()
    assert made.outcomes["a"].token_ids == [21, 23, 25, 0, 0, 0]
    assert grammar.accepted[0] == [21, 23, 25, 0, 0]  # the last one ends it
    assert [plan.masked_rows for plan in made.plans[:2]] == [[], []], "inside the prompt nothing is sampled"
    assert grammar.num_fills == 6


@in_flight
def test_a_grammar_survives_preemption(plans: int) -> None:
    made = bench(ODD, plans_in_flight=plans, grammar=EvenGrammar(), num_blocks=12, max_num_batched_tokens=16)
    spec = GrammarSpec(kind="regex", source="even", after_token_id=27)
    made.submit(*(request(f"r{n}", [2 + n, *PROMPT[:5]], 30, grammar=spec) for n in range(6)))
    made.run(900)
    assert made.core.stats.num_preemptions > 0
    assert {tuple(outcome.token_ids) for outcome in made.outcomes.values()} == {(21, 23, 25, 27, *[0] * 26)}


@pytest.mark.parametrize("plans", [1, 2])
def test_a_step_of_ended_masked_rows_still_gets_its_mask(plans: int) -> None:
    """The device asserts that it comes; rows without bits sample freely, and nobody listens."""
    made = bench(from_function(lambda p, i: EOS if i == 2 else 4), plans_in_flight=plans, grammar=EvenGrammar())
    masks: list[StepMask | None] = []
    sample = made.device.sample

    def record(step_id: int, mask: StepMask | None) -> None:
        masks.append(mask)
        sample(step_id, mask)

    made.device.sample = record  # type: ignore[method-assign]
    spec = GrammarSpec(kind="regex", source="even", after_token_id=63)
    made.submit(request("a", PROMPT, 20, grammar=spec))
    made.run()
    assert made.outcomes["a"].token_ids == [4, 4, EOS]
    assert [(mask.step_id, mask.rows) for mask in masks if mask] == [(0, [0]), (1, [0]), (2, [0]), (3, [])]


def test_an_aborted_masked_row_in_flight() -> None:
    made = bench(plans_in_flight=1, grammar=EvenGrammar())
    made.submit(request("a", PROMPT, 20, grammar=EVEN), request("b", [9, *PROMPT], 9))
    made.step()
    made.core.abort(["a"])
    made.run()
    assert made.outcomes["a"].deltas == []
    assert made.outcomes["b"].token_ids == expected([9, *PROMPT], 9)


def test_stopping_closes_the_backend() -> None:
    grammar = EvenGrammar()
    made = bench(grammar=grammar)
    assert not grammar.closed
    made.core.stop()
    made.core.stop()
    assert grammar.closed


def test_without_a_backend_grammars_are_refused() -> None:
    made = bench()
    (answer,) = made.submit(request("a", PROMPT, grammar=EVEN))
    assert answer == Refused("a", "This server was started without structured output.", "grammar", 400)


def test_a_wrong_grammar_is_refused_before_anything_runs() -> None:
    made = bench(grammar=EvenGrammar())
    (answer,) = made.submit(request("a", PROMPT, grammar=GrammarSpec(kind="regex", source="refuse")))
    assert answer == Refused("a", "The grammar is wrong.", "response_format", 400)
    assert not made.core.has_work


def test_a_compiler_that_breaks_refuses_its_request() -> None:
    made = bench(grammar=EvenGrammar())
    (answer,) = made.submit(request("a", PROMPT, grammar=GrammarSpec(kind="regex", source="break compile")))
    assert answer == Refused("a", "The grammar could not be compiled.", "grammar", 400)


def test_what_cannot_run_is_refused_before_its_grammar_is_compiled() -> None:
    made = bench(grammar=EvenGrammar())
    (answer,) = made.submit(request("a", [], grammar=GrammarSpec(kind="regex", source="slow")))
    assert isinstance(answer, Refused) and answer.param == "prompt"
    assert not made.core.is_compiling


def test_a_slow_grammar_stalls_nobody() -> None:
    grammar = EvenGrammar()
    made = bench(grammar=grammar)
    slow = request("slow", PROMPT, 4, grammar=GrammarSpec(kind="regex", source="slow"))
    assert made.submit(slow, request("quick", PROMPT, 4)) == [Accepted("quick")]
    assert made.run()["quick"].token_ids == expected(PROMPT, 4)
    assert made.core.is_compiling and not made.core.has_work
    (again,) = made.submit(slow)
    assert isinstance(again, Refused) and again.param == "request_id"
    grammar.release()
    assert made.submit() == [Accepted("slow")]
    assert made.run()["slow"].reason is FinishReason.LENGTH


def test_a_request_aborted_while_its_grammar_compiles_is_gone() -> None:
    grammar = EvenGrammar()
    made = bench(grammar=grammar)
    made.submit(request("slow", PROMPT, 4, grammar=GrammarSpec(kind="regex", source="slow")))
    made.core.abort(["slow"])
    grammar.release()
    assert made.submit() == []
    assert not made.core.has_work and not made.core.is_compiling


@in_flight
@pytest.mark.parametrize("fault", ["break fill", "break accept"])
def test_a_grammar_that_breaks_ends_its_request_alone(plans: int, fault: str) -> None:
    made = bench(plans_in_flight=plans, grammar=EvenGrammar())
    broken = GrammarSpec(kind="regex", source=fault)
    made.submit(request("broken", PROMPT, 9, grammar=broken), request("fine", [9, *PROMPT], 9))
    made.run()
    assert made.outcomes["broken"].reason is FinishReason.ERROR
    assert made.outcomes["broken"].last is not None
    assert made.outcomes["broken"].last.error == "The structured output of this request failed."
    assert made.outcomes["fine"].token_ids == expected([9, *PROMPT], 9)
    assert made.core._states == {}


def test_states_do_not_outlive_their_requests() -> None:
    made = bench(grammar=EvenGrammar())
    made.submit(*(request(name, PROMPT, 9, grammar=EVEN) for name in ("ends", "aborted", "finished")))
    made.step()
    assert len(made.core._states) == 3
    made.core.abort(["aborted"])
    made.core.finish("finished", FinishReason.STOP, 1)
    assert len(made.core._states) == 1
    made.run()
    assert made.core._states == {}

"""A random life of the engine: every step is checked, every block's content, every request's end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from engine_support import EOS, VOCAB, Bench, EvenGrammar, bench, request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from saddle.executor.fake import from_function
from saddle.protocol import Accepted, FinishReason, GrammarSpec, TokenRequest

STOP = 5
NUM_STEPS = 10_000

done_steps = 0
seen: Counter[str] = Counter()  # what happened how often, over all examples

# Prompts that share beginnings, and end where blocks do and do not.
PROMPTS = st.builds(
    lambda base, length, tail: base[:length] + tail,
    st.sampled_from([[6, 7] * 16, [6, 7, 8, 9] * 8, [9] * 32]),
    st.sampled_from([4, 8, 12, 16, 16, 17, 24, 30]),
    st.lists(st.sampled_from([6, 7]), max_size=3),
)
ASKED = st.fixed_dictionaries(
    {"prompt": PROMPTS, "max_tokens": st.sampled_from([1, 2, 6, 15, 40])},
    optional={
        "salt": st.just("salt"),
        "priority": st.integers(-1, 1),
        "grammar": st.just(GrammarSpec(kind="regex", source="even")),
        "stop_token_ids": st.just((STOP,)),
        "ignore_eos": st.just(True),
        "min_tokens": st.just(1),
        "prompt_logprobs": st.just(0),
    },
)


def token_at(prompt: list[int], index: int) -> int:
    value = hash((tuple(prompt), index)) % 64
    return EOS if value < 3 else STOP if value < 5 else 6 + value % (VOCAB - 6)


def model(asked: TokenRequest, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What a request must yield, whatever happens around it."""
    params = asked.params
    ids: list[int] = []
    most = min(params.max_tokens or 0, max_model_len - len(asked.prompt_ids))
    while True:
        token = token_at(asked.prompt_ids, len(ids))
        if asked.grammar is not None and token % 2:
            token = 0  # the smallest id of the mask
        ids.append(token)
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
        if token in stops and len(ids) >= params.min_tokens:
            return ids, FinishReason.STOP
        if len(ids) == most:
            return ids, FinishReason.LENGTH


@dataclass
class Known:
    asked: TokenRequest
    cut: bool = False  # aborted or finished from outside


class EngineMachine(RuleBasedStateMachine):
    bench: Bench
    known: dict[str, Known]

    @initialize(
        num_blocks=st.integers(6, 32),
        budget=st.sampled_from([1, 3, 8, 17, 24, 64, 64]),
        rows=st.sampled_from([1, 2, 4, 6, 8]),
        in_flight=st.sampled_from([0, 1, 2]),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.sampled_from([True, True, True, False]),
        max_step_s=st.sampled_from([None, 2e-6, 2e-5]),
    )
    def build(self, num_blocks: int, budget: int, rows: int, in_flight: int, policy: str, caching: bool,
              max_step_s: float | None) -> None:  # fmt: skip
        self.fail_steps: set[int] = set()
        self.known = {}
        self.max_model_len = min(64, num_blocks * 4)
        self.bench = bench(
            from_function(lambda prompt, index: token_at(list(prompt), index)),
            num_blocks=num_blocks, max_model_len=64, max_num_batched_tokens=budget, max_num_seqs=rows,
            plans_in_flight=in_flight, policy=policy, caching=caching, fail_steps=self.fail_steps,
            grammar=EvenGrammar(), max_step_s=max_step_s, step_s=lambda plan: 1e-6 * plan.num_tokens,
        )  # fmt: skip

    @rule(burst=st.lists(ASKED, min_size=1, max_size=4))
    def submit(self, burst: list[dict[str, Any]]) -> None:
        for each in burst:
            asked = request(f"r{len(self.known)}", **each)
            (answer,) = self.bench.submit(asked)
            if isinstance(answer, Accepted):
                self.known[asked.request_id] = Known(asked)
            else:
                assert len(asked.prompt_ids) >= self.max_model_len
                seen["refused"] += 1

    @precondition(lambda self: self.known)
    @rule(what=st.sampled_from(["abort", "finish", "fail", "reset"]), which=st.integers(0, 99), by=st.integers(0, 3))
    def disturb(self, what: str, which: int, by: int) -> None:
        core = self.bench.core
        request_id = f"r{which % len(self.known)}"
        if what == "reset":
            core.reset_cache()
        elif what == "fail":
            self.fail_steps.add(core.stats.num_steps + by)
        else:
            outcome = self.bench.outcomes[request_id]
            self.known[request_id].cut |= outcome.last is None
            if what == "abort":
                core.abort([request_id])
            else:
                core.finish(request_id, FinishReason.STOP, max(0, len(outcome.token_ids) - by))
        core.check()

    @rule(num_steps=st.integers(1, 12))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.bench.core.has_work:
                self._step()

    def _step(self) -> None:
        global done_steps
        done_steps += 1
        for delta in self.bench.step():
            assert not self.known[delta.request_id].cut, "a delta after the end from outside"

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        while self.bench.core.has_work:
            self._step()
        self.bench.assert_idle()
        assert not self.bench.core._states, "a grammar state was left behind"
        for request_id, known in self.known.items():
            self._judge(request_id, known)
        stats = self.bench.core.stats
        seen["preemptions"] += stats.num_preemptions
        seen["hits"] += stats.num_cache_hits
        seen["failed steps"] += stats.num_failed_steps
        for plan in self.bench.plans:
            seen["hits inside a prompt"] += sum(work.num_cached > 0 for work in plan.work)
            seen["admitted again"] += sum(len(admit.token_ids) > admit.num_prompt for admit in plan.admits)

    def _judge(self, request_id: str, known: Known) -> None:
        outcome = self.bench.outcomes[request_id]
        ids, reason = model(known.asked, self.max_model_len)
        if known.cut or outcome.reason is FinishReason.ERROR:
            assert outcome.token_ids == ids[: len(outcome.token_ids)]
            assert (outcome.last is None) == known.cut
            return
        assert outcome.last is not None, f"{request_id} never ended"
        assert (outcome.token_ids, outcome.reason) == (ids, reason)
        seen[reason.value] += 1
        logprobs = outcome.deltas[0].prompt_logprobs
        if known.asked.params.prompt_logprobs is not None:
            assert logprobs is not None
            assert [entry and entry.token_id for entry in logprobs] == [None, *known.asked.prompt_ids[1:]]


def test_ten_thousand_random_steps() -> None:
    few = settings(max_examples=50, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
    while done_steps < NUM_STEPS:
        run_state_machine_as_test(EngineMachine, settings=few)
    for what in ("stop", "length", "preemptions", "hits", "failed steps", "admitted again"):
        assert seen[what] > 0, f"{what} never happened: the test is blind to it"

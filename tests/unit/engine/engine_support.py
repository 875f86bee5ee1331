"""What the engine's tests share: a core over the scripted device, requests, and a loop that checks every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from saddle.engine.core import EngineCore, GrammarBackend
from saddle.engine.scheduler import Limits, Scheduler
from saddle.errors import InvalidRequest
from saddle.executor.fake import FakeExecutor, Script, from_function
from saddle.protocol import (
    Accepted,
    FinishReason,
    GrammarSpec,
    Refused,
    SamplingParams,
    StepPlan,
    TokenDelta,
    TokenRequest,
)

VOCAB = 64
EOS = 1


def token_at(prompt: Sequence[int], index: int) -> int:
    """What the scripted model says: depends on the whole prompt and the place, and is never EOS."""
    return 2 + hash((tuple(prompt), index)) % (VOCAB - 2)


def expected(prompt: Sequence[int], num_tokens: int) -> list[int]:
    return [token_at(prompt, index) for index in range(num_tokens)]


def stops_after(num_tokens: int, stop_id: int = EOS) -> Script:
    """As `token_at`, with `stop_id` as the generated token of index `num_tokens`."""
    return from_function(lambda prompt, index: stop_id if index == num_tokens else token_at(prompt, index))


def request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    priority: int = 0,
    salt: str | None = None,
    grammar: GrammarSpec | None = None,
    **params: Any,
) -> TokenRequest:
    return TokenRequest(
        request_id=request_id,
        prompt_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        arrival_s=time.monotonic(),
        priority=priority,
        cache_salt=salt,
        grammar=grammar,
    )


@dataclass
class Outcome:
    """All that came back for a request."""

    token_ids: list[int] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def last(self) -> TokenDelta | None:
        return self.deltas[-1] if self.deltas and self.deltas[-1].finish_reason else None

    @property
    def reason(self) -> FinishReason | None:
        return self.last.finish_reason if self.last else None


@dataclass
class Bench:
    """A core over the scripted device, driven one step at a time, checked after each."""

    core: EngineCore
    scheduler: Scheduler
    device: FakeExecutor
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    def submit(self, *requests: TokenRequest) -> list[Accepted | Refused]:
        for each in requests:
            self.core.submit(each)
        answers = self.core.answers()
        for answer in answers:
            if isinstance(answer, Accepted):
                self.outcomes[answer.request_id] = Outcome()
        return answers

    def step(self) -> list[TokenDelta]:
        deltas = self.core.step()
        self.core.check()
        for delta in deltas:
            outcome = self.outcomes[delta.request_id]
            assert outcome.last is None, f"{delta.request_id} goes on after its last delta"
            outcome.deltas.append(delta)
            outcome.token_ids += delta.token_ids
        return deltas

    def run(self, max_steps: int = 5000) -> dict[str, Outcome]:
        for _ in range(max_steps):
            if not self.core.has_work:
                self.assert_idle()
                return self.outcomes
            self.step()
        raise AssertionError(f"work left after {max_steps} steps")

    def assert_idle(self) -> None:
        """Nothing runs, and no block is lost."""
        stats = self.core.stats
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks


def bench(
    script: Script | None = None,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 256,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    plans_in_flight: int = 1,
    policy: Any = "fcfs",
    caching: bool = True,
    max_queued: int | None = None,
    fail_steps: Collection[int] = (),
    grammar: GrammarBackend | None = None,
    step_s: float | Callable[[StepPlan], float] = 0.0,
    max_step_s: float | None = None,
    yields_half: bool = False,
) -> Bench:
    device = FakeExecutor(
        script or from_function(token_at),
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        fail_steps=fail_steps,
        step_s=step_s,
    )
    limits = Limits(
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        policy=policy,
        enable_prefix_caching=caching,
        max_num_queued_reqs=max_queued,
        max_step_s=max_step_s,
        yields_half=yields_half,
    )
    scheduler = Scheduler(limits, frozenset({EOS}), seed=0)
    made = Bench(EngineCore(device, scheduler, plans_in_flight, grammar), scheduler, device)
    forward = device.forward

    def record(plan: StepPlan) -> None:
        made.plans.append(plan)
        forward(plan)

    device.forward = record  # type: ignore[method-assign]
    return made


class EvenGrammar:
    """A small grammar: while it binds only even ids may come. It binds after `spec.after_token_id`, or at once.

    `spec.source` may ask for a fault: "refuse", "break compile", "break fill", "break accept"; if it is "slow",
    compiling ends when `release` is called.
    """

    def __init__(self) -> None:
        self.slow: list[tuple[Future[Any], GrammarSpec]] = []
        self.accepted: dict[int, list[int]] = {}
        self.num_fills = 0
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def compile(self, spec: GrammarSpec) -> Future[Any]:
        future: Future[Any] = Future()
        if spec.source == "slow":
            self.slow.append((future, spec))
        elif spec.source == "break compile":
            future.set_exception(RuntimeError("out of luck"))
        elif spec.source == "refuse":
            future.set_exception(InvalidRequest("The grammar is wrong.", "response_format"))
        else:
            future.set_result(self._state(spec))
        return future

    def release(self) -> None:
        for future, spec in self.slow:
            if future.set_running_or_notify_cancel():
                future.set_result(self._state(spec))
        self.slow.clear()

    def fill(self, state: Any) -> bytes:
        self.num_fills += 1
        if state["spec"].source == "break fill":
            raise RuntimeError("no mask")
        return (b"\x55" if state["binds"] else b"\xff") * (VOCAB // 8)

    def accept(self, state: Any, token_id: int) -> None:
        state["ids"].append(token_id)
        if state["spec"].source == "break accept":
            raise ValueError("not in the grammar")
        if state["binds"] and token_id % 2:
            raise ValueError(f"{token_id} is odd")
        if token_id == state["spec"].after_token_id:
            state["binds"] = True

    def _state(self, spec: GrammarSpec) -> dict[str, Any]:
        ids: list[int] = []
        self.accepted[len(self.accepted)] = ids
        return {"spec": spec, "binds": spec.after_token_id is None, "ids": ids}

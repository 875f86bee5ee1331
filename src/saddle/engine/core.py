"""The engine's loop body, without any transport: whoever calls `step` decides where requests and tokens travel.

The engine process wraps a socket around it (`process.py`); offline generation calls it directly:

    core.submit(request); [answer] = core.answers(); while core.has_work: deltas = core.step()
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

import msgspec

from saddle.engine.scheduler import Scheduler
from saddle.errors import EngineError, InvalidRequest, RequestError
from saddle.executor.base import Executor
from saddle.protocol import (
    Accepted,
    EngineStats,
    FinishReason,
    GrammarSpec,
    Refused,
    StepMask,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenRequest,
)

logger = logging.getLogger(__name__)


class GrammarBackend(Protocol):
    """What the core needs of structured output. States are opaque to it, one for each request.

    A state begins before the first generated token. While the model thinks the grammar does not bind yet; `accept`
    sees every generated id, so the backend itself finds `GrammarSpec.after_token_id`.
    """

    def compile(self, spec: GrammarSpec) -> Future[Any]:
        """Start compiling, without blocking; the result is a fresh state.

        The future fails with InvalidRequest for a grammar that is wrong, too large or too slow to compile.
        """

    def fill(self, state: Any) -> bytes:
        """The ids that may come next: little-endian bits, 4 * ceil(vocab_size / 32) bytes."""

    def accept(self, state: Any, token_id: int) -> None:
        """Advance by one generated id. Raises ValueError if the grammar does not allow it."""

    def close(self) -> None:
        """End its threads and processes. Safe to call twice."""


class EngineCore:
    """Requests in, tokens out, one step a call.

    Args:
        executor: started; runs the plans.
        scheduler: empty; owned by this core from now on.
        plans_in_flight: plans built before the result of the oldest one is needed; 0 waits for each.
        grammar: structured output; without it such requests are refused.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        plans_in_flight: int = 1,
        grammar: GrammarBackend | None = None,
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._plans_in_flight = plans_in_flight
        self._grammar = grammar
        self._in_flight: deque[StepPlan] = deque()
        self._answers: list[Accepted | Refused] = []
        self._compiling: dict[str, tuple[TokenRequest, Future[Any]]] = {}
        self._states: dict[str, Any] = {}  # grammar state of each request that has one
        self._num_steps = self._num_failed_steps = self._last_step_tokens = 0
        self._host_s = self._device_s = 0.0

    # requests ----------------------------------------------------------------------------------------------------

    def submit(self, request: TokenRequest) -> None:
        """Take a request; `answers` says what became of it."""
        try:
            if request.request_id in self._compiling:
                raise InvalidRequest(f"A request with the id {request.request_id!r} is running already.", "request_id")
            if request.grammar is None:
                self._accept(request)
            else:
                self._compile(request, request.grammar)
        except RequestError as error:
            self._refuse(request.request_id, error)

    def answers(self, timeout_s: float = 0.0) -> list[Accepted | Refused]:
        """Answers to submitted requests that were not returned yet.

        A request with a grammar is answered once that is compiled; `timeout_s` waits for one such answer.
        """
        if self._compiling:
            self._take_compiled(timeout_s)
        answers, self._answers = self._answers, []
        return answers

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests; no delta follows. Unknown ids are fine."""
        for request_id in request_ids:
            self._forget(request_id)
            self._scheduler.abort(request_id)

    def finish(self, request_id: str, reason: FinishReason, num_tokens: int) -> None:
        """The text layers ended a request after `num_tokens` generated tokens; no delta follows."""
        self._forget(request_id)
        self._scheduler.finish(request_id, reason, num_tokens)

    def reset_cache(self) -> None:
        """Forget all cached blocks that no running request uses."""
        self._scheduler.reset_cache()

    # steps -------------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do; if not, wait for a message."""
        return bool(self._in_flight) or self._scheduler.has_work

    @property
    def is_compiling(self) -> bool:
        """Whether answers are outstanding that come without any further message."""
        return bool(self._compiling)

    @property
    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self._scheduler.stats,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            last_step_tokens=self._last_step_tokens,
            host_s=self._host_s,
            device_s=self._device_s,
        )

    def step(self) -> list[TokenDelta]:
        """Build and enqueue one plan, then take the results that are due.

        Raises:
            EngineError: a device cannot go on.
        """
        plan = self._schedule()
        if not plan.work:
            return self._settle(plan)
        self._executor.forward(plan)
        self._in_flight.append(plan)
        # A mask needs the ids of all steps before; forward of this one runs meanwhile.
        deltas = self._collect(1) if plan.masked_rows else []
        self._executor.sample(plan.step_id, self._mask(plan, deltas))
        deltas += self._collect(self._plans_in_flight)
        return deltas

    def stop(self) -> None:
        """Stop the executor and the grammar backend. Safe to call twice."""
        self._executor.stop()
        if self._grammar is not None:
            self._grammar.close()

    def check(self) -> None:
        """Raise AssertionError unless every block and row is accounted for."""
        self._scheduler.check()

    # inside ------------------------------------------------------------------------------------------------------

    def _accept(self, request: TokenRequest) -> None:
        self._scheduler.add(request)
        self._answers.append(Accepted(request.request_id))

    def _compile(self, request: TokenRequest, spec: GrammarSpec) -> None:
        if self._grammar is None:
            raise InvalidRequest("This server was started without structured output.", "grammar")
        self._scheduler.validate(request)
        self._compiling[request.request_id] = request, self._grammar.compile(spec)

    def _refuse(self, request_id: str, error: RequestError) -> None:
        self._answers.append(Refused(request_id, error.message, error.param, error.status))

    def _take_compiled(self, timeout_s: float) -> None:
        wait([future for _, future in self._compiling.values()], timeout_s, FIRST_COMPLETED)
        for request_id, (request, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[request_id]
            try:
                state = future.result()
                self._accept(request)
                self._states[request_id] = state
            except RequestError as error:
                self._refuse(request_id, error)
            except Exception:
                logger.exception("The grammar of request %s could not be compiled.", request_id)
                self._refuse(request_id, InvalidRequest("The grammar could not be compiled.", "grammar"))

    def _forget(self, request_id: str) -> None:
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None:
            compiling[1].cancel()
        self._states.pop(request_id, None)

    def _schedule(self) -> StepPlan:
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        if plan.work:
            self._num_steps += 1
            self._last_step_tokens = plan.num_tokens
        self._host_s += time.perf_counter() - began
        return plan

    def _settle(self, plan: StepPlan) -> list[TokenDelta]:
        """There was nothing to plan: rows wait for results, or only ended rows are left to be freed."""
        if self._in_flight:
            return self._collect(len(self._in_flight) - 1)
        if not self._scheduler.has_ended_rows:
            raise EngineError("The scheduler has requests but plans none of them.")
        return self._scheduler.update(plan, StepResult(plan.step_id, [], []))

    def _collect(self, num_left: int) -> list[TokenDelta]:
        """Take results until `num_left` plans are in flight."""
        deltas: list[TokenDelta] = []
        while len(self._in_flight) > num_left:
            result = self._executor.collect(None)
            if result is None:
                raise EngineError("The device gave no result.")
            began = time.perf_counter()
            new = self._scheduler.update(self._in_flight.popleft(), result)
            self._device_s += result.device_s
            self._num_failed_steps += result.error is not None
            if self._states:
                self._advance_grammars(new)
            deltas += new
            self._host_s += time.perf_counter() - began
        return deltas

    def _advance_grammars(self, deltas: list[TokenDelta]) -> None:
        assert self._grammar is not None
        for index, delta in enumerate(deltas):
            state = self._states.get(delta.request_id)
            if state is None:
                continue
            if delta.finish_reason is not None:
                del self._states[delta.request_id]
                continue
            try:
                for token_id in delta.token_ids:
                    self._grammar.accept(state, token_id)
            except Exception as error:
                deltas[index] = self._fail(delta.request_id, error)

    def _mask(self, plan: StepPlan, deltas: list[TokenDelta]) -> StepMask | None:
        """The mask of a plan whose rows' ids are all known, without the rows that ended meanwhile."""
        if not plan.masked_rows or self._grammar is None:
            return None
        began = time.perf_counter()
        mask = StepMask(plan.step_id, [], [])
        for row, request_id in self._scheduler.live_rows(plan, plan.masked_rows):
            try:
                bits = self._grammar.fill(self._states[request_id])
            except Exception as error:
                deltas.append(self._fail(request_id, error))
                continue
            mask.rows.append(row)
            mask.bits.append(bits)
        self._host_s += time.perf_counter() - began
        return mask

    def _fail(self, request_id: str, error: Exception) -> TokenDelta:
        """A grammar broke: its request ends, the others go on."""
        logger.error("The grammar of request %s failed.", request_id, exc_info=error)
        del self._states[request_id]
        self._scheduler.abort(request_id)
        message = "The structured output of this request failed."
        return TokenDelta(request_id=request_id, finish_reason=FinishReason.ERROR, error=message)

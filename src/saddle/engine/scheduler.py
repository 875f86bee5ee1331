"""Who runs when: builds the plan of each step, takes its result, keeps rows and blocks.

There are no phases. `num_computed` of each request chases `num_total`, and a plan gives each row a number of tokens
to catch up. A request that decodes is one token behind; a new prompt, a chunked one, one that resumes after a
preemption are further behind, and skip what the prefix cache knows.

Plans are issued before the results of earlier ones are known, and devices run them in order. From that follow the
rules that keep memory right:

    freeing     `update` frees ended rows, `schedule` frees those it preempts; the next plan may reuse both at once,
                since it runs after every plan that still writes there. A row of the plan being built is never freed.
    late ids    an id of an ended request is dropped; an id of a preempted one is kept, and the request is not
                admitted again before all of them landed.
    publishing  prompt blocks when planned: whoever finds them reads after they are written, even in the same step.
                Generated blocks when their ids are known and the step that computed them landed.
    failure     a failed step ends the requests of all plans in flight, and forgets every block that these wrote.

Order of service is one key, (priority, arrival). Rows that decode go first, then prompts; a long prompt leaves up to
half of a step to much shorter ones behind it. When blocks run out the last request in that order gives way, never an
earlier one to a later one: so the first always gets on.
"""

from __future__ import annotations

import bisect
import heapq
import random
import time
from collections import deque

from saddle.engine.flight import Draft, Flight
from saddle.engine.kv_cache import KVCache
from saddle.engine.limits import Limits
from saddle.engine.pacing import Pacer
from saddle.engine.request import NO_ROW, Request, Status, from_tokens
from saddle.errors import ContextTooLong, EngineError, InvalidRequest, Overloaded
from saddle.protocol import (
    EngineStats,
    FinishReason,
    RowAdmit,
    RowSample,
    RowWork,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenRequest,
)

__all__ = ["Limits", "Scheduler"]


class Scheduler:
    """Holds all requests of one engine.

    Args:
        limits: memory, rows and budgets.
        eos_ids: the ids that end a text, of the checkpoint's generation config.
        seed: where the seeds of requests without one come from; None draws one.
    """

    def __init__(self, limits: Limits, eos_ids: frozenset[int], seed: int | None = None) -> None:
        self.limits = limits
        self.kv = KVCache(limits.num_blocks, limits.block_size, limits.enable_prefix_caching)
        self._pacer = Pacer(limits.max_step_s, limits.yields_half, limits.block_size)
        self._eos_ids = eos_ids
        # A request alone must fit, or it could never get on.
        self._max_total = min(limits.max_model_len, limits.num_blocks * limits.block_size)
        # More rows than tokens a step would leave the last ones without any.
        self._num_rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._seeds = random.Random(seed)
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # by key
        self._waiting: list[Request] = []  # by key
        self._ended: list[Request] = []  # to be freed by the next update
        self._free_rows = list(range(self._num_rows))  # a heap
        self._epochs = [0] * self._num_rows
        self._flights: deque[Flight] = deque()
        self._num_added = self._next_step = 0
        self._num_preemptions = self._num_prompt_tokens = 0
        self._num_generated = self._num_generated_reported = 0

    # requests ----------------------------------------------------------------------------------------------------

    def validate(self, request: TokenRequest) -> None:
        """Refuse what could never run, or not now.

        Raises:
            InvalidRequest, ContextTooLong: the prompt is empty or does not fit, an id is unknown, the name is taken.
            Overloaded: too many requests wait.
        """
        ids, limits = request.prompt_ids, self.limits
        if request.request_id in self._requests:
            raise InvalidRequest(f"A request with the id {request.request_id!r} is running already.", "request_id")
        if not ids:
            raise InvalidRequest("The prompt must hold at least one token.", "prompt")
        if max(ids) >= limits.vocab_size or min(ids) < 0:
            raise InvalidRequest(f"Token ids of the prompt must be between 0 and {limits.vocab_size - 1}.", "prompt")
        request.params.check_ids(limits.vocab_size)
        if len(ids) >= self._max_total:
            raise ContextTooLong(
                f"The prompt has {len(ids)} tokens; with room for one more the context holds {self._max_total}.",
                "prompt",
            )
        if limits.max_num_queued_reqs is not None and len(self._waiting) >= limits.max_num_queued_reqs:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already.", retry_after=1)

    def add(self, request: TokenRequest) -> None:
        """Queue a request. Raises as `validate`."""
        self.validate(request)
        priority = request.priority if self.limits.policy == "priority" else 0
        key = (priority, request.arrival_s, self._num_added)
        self._num_added += 1
        new = from_tokens(request, key, self._eos_ids, self._max_total, self._seeds.getrandbits(63))
        self._requests[new.request_id] = new
        bisect.insort(self._waiting, new)

    def abort(self, request_id: str) -> None:
        """End a request without a word. Its row and blocks are free after the next update; unknown ids are fine."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def finish(self, request_id: str, reason: FinishReason, num_tokens: int) -> None:
        """End a request that the text layers found complete after `num_tokens` generated tokens."""
        request = self._requests.get(request_id)
        if request is not None:
            self._num_generated -= max(0, request.num_generated - num_tokens)
            self._end(request)

    def reset_cache(self) -> None:
        """Forget all cached blocks that no running request uses."""
        self.kv.pool.forget()

    # what is going on --------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether there are requests to plan or rows to free."""
        return bool(self._requests or self._ended)

    @property
    def has_ended_rows(self) -> bool:
        """Whether an update would free anything."""
        return bool(self._ended)

    @property
    def stats(self) -> EngineStats:
        pool = self.kv.pool
        # Corrections by `finish` may take back counted tokens; what was reported only grows.
        self._num_generated_reported = max(self._num_generated_reported, self._num_generated)
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_reported,
            num_cache_queries=self.kv.num_queries,
            num_cache_hits=self.kv.num_hits,
        )

    def live_rows(self, plan: StepPlan, rows: list[int]) -> list[tuple[int, str]]:
        """Which of the rows of a plan in flight still run, and for which request."""
        flight = next(flight for flight in self._flights if flight.plan is plan)
        wanted = set(rows)
        return [
            (work.row, request.request_id)
            for work, request in zip(plan.work, flight.requests, strict=True)
            if work.row in wanted and request.status is not Status.ENDED
        ]

    # the plan ----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next plan; empty if nothing can be planned before a result lands."""
        draft = Draft(self._next_step, self.limits.max_num_batched_tokens)
        prompts = self._plan_decodes(draft)
        if prompts or self._waiting:
            draft.room_s, draft.budget = self._pacer.room(draft.work, draft.budget)
            self._plan_prompts(draft, prompts)
        self._next_step += 1
        flight = draft.seal()
        if draft.work:
            self._flights.append(flight)
        return flight.plan

    def _plan_decodes(self, draft: Draft) -> deque[Request]:
        """One token for every row that is one behind. Returns the rows that are further behind."""
        prompts: deque[Request] = deque()
        block_size = self.limits.block_size
        running = self._running
        index = 0
        while index < len(running):  # it shrinks behind `index` as rows are preempted
            request = running[index]
            index += 1
            if request.num_total - request.num_computed != 1 or request.num_computed < request.num_prompt:
                prompts.append(request)
                continue
            if request.num_total >= request.max_total:
                continue  # its last id is in flight
            fresh: list[int] = []
            if request.num_computed == len(request.block_ids) * block_size:
                if self._make_room(draft, request, 1, []) < 1:
                    self._preempt(draft, request)  # all that came after it are gone already
                    break
                fresh = self.kv.extend(request, [], 1)
            self._give(draft, request, 1, 0, fresh)
        return prompts

    def _plan_prompts(self, draft: Draft, prompts: deque[Request]) -> None:
        """Tokens for rows that are further behind and for waiting requests.

        The first in order of service leads. Of the others the one with the least to do comes next.
        """
        leader: Request | None = None
        while draft.budget > 0:
            while prompts and prompts[0].status is not Status.RUNNING:
                prompts.popleft()  # preempted meanwhile
            request = self._next_prompt(draft, prompts, leader)
            if request is None:
                return
            cached = self.kv.match(request)
            if request.status is Status.RUNNING:
                prompts.popleft()
            elif not self._fits(request, cached, prompts):
                draft.may_admit = False
                continue
            skipped = len(cached) * self.limits.block_size
            most = self._pacer.fit(draft.room_s, request.num_computed + skipped, draft.budget, leads=leader is None)
            reserved = 0
            if leader is None:
                leader = request
                reserved = self._reserved(draft, request, request.num_left - skipped, most, prompts)
                prompts = deque(sorted(prompts, key=lambda each: each.num_left))
            self._plan_prompt(draft, request, cached, most, reserved)

    def _next_prompt(self, draft: Draft, prompts: deque[Request], leader: Request | None) -> Request | None:
        """The leader: the first in order of service; later whoever has the least to do."""
        waiting = self._next_waiting(draft)
        if waiting is None or not prompts:
            return prompts[0] if prompts else waiting
        running = prompts[0]
        runs_first = running < waiting if leader is None else running.num_left <= waiting.num_left
        return running if runs_first else waiting

    def _reserved(self, draft: Draft, leader: Request, num_left: int, most: int, prompts: deque[Request]) -> int:
        """Tokens that the leader, who has `num_left` to do, leaves to others with less than half of that to do."""
        if num_left <= most:
            return 0
        waits = leader.status is Status.WAITING
        behind = self._waiting[waits : waits + 1] if draft.may_admit and len(self._free_rows) > waits else []
        wanted = sum(other.num_left for other in (*prompts, *behind) if 2 * other.num_left < num_left)
        return min(most // 2, wanted)

    def _next_waiting(self, draft: Draft) -> Request | None:
        """The first waiting request, if a row may be given to it now."""
        if not draft.may_admit or not self._waiting or not self._free_rows or self._waiting[0].num_flights:
            return None
        return self._waiting[0]

    def _fits(self, request: Request, cached: list[int], prompts: deque[Request]) -> bool:
        """Whether all its tokens fit, beside what running rows need soon: else it would be preempted at once."""
        kv = self.kv
        need = kv.num_blocks_of(request.num_total) - len(cached)
        promised = len(self._running) + sum(kv.num_blocks_of(r.num_total) - len(r.block_ids) for r in prompts)
        return need + promised <= kv.room(cached)

    def _plan_prompt(self, draft: Draft, request: Request, cached: list[int], most: int, reserved: int) -> None:
        """Skip the `cached` blocks, then give at most `most` tokens without the `reserved`, as many as memory allows.

        A prompt that is cut ends at a block's end where it can, so that it can go on from the cache, and is the last
        one of its step unless it leaves tokens to others: what is left for them is less than a block then.
        """
        kv, block_size = self.kv, self.limits.block_size
        start = request.num_computed + len(cached) * block_size
        end = min(request.num_total, start + most - reserved)
        if end < request.num_total and end - start >= block_size:
            end -= end % block_size
        num_held = len(request.block_ids) + len(cached)
        room = self._make_room(draft, request, kv.num_blocks_of(end) - num_held, cached)
        end = min(end, (num_held + room) * block_size)
        if end <= start:
            draft.budget = 0
            return
        kv.count(request, cached)
        num_cached = 0
        fresh = kv.extend(request, cached, kv.num_blocks_of(end) - num_held)
        if request.status is Status.WAITING:
            self._admit(draft, request, start, cached)
        else:
            num_cached, fresh = start - request.num_computed, cached + fresh
        if end < request.num_total and not reserved:
            draft.budget = end - start
        if draft.room_s is not None:
            draft.room_s -= self._pacer.cost_s(end - start, start)
        self._give(draft, request, end - start, num_cached, fresh)
        draft.published += kv.publish(request, min(end, request.num_prompt))

    def _admit(self, draft: Draft, request: Request, num_computed: int, cached: list[int]) -> None:
        """Give a row to the first waiting request."""
        self._waiting.remove(request)
        bisect.insort(self._running, request)
        row = heapq.heappop(self._free_rows)
        self._epochs[row] += 1
        request.status, request.row, request.epoch = Status.RUNNING, row, self._epochs[row]
        request.num_computed = num_computed
        if request.first_planned_s is None:
            request.first_planned_s = time.monotonic()
        draft.admits.append(
            RowAdmit(row, request.epoch, list(request.token_ids), request.num_prompt, num_computed, cached,
                     request.params, request.seed)
        )  # fmt: skip

    def _give(self, draft: Draft, request: Request, num_tokens: int, num_cached: int, new_blocks: list[int]) -> None:
        """Put a running request into the plan."""
        end = request.num_computed + num_cached + num_tokens
        samples = end == request.num_total
        request.num_computed = end
        request.num_flights += 1
        request.planned_step = draft.step_id
        if samples:
            request.num_total += 1
            if request.has_grammar:
                draft.masked_rows.append(request.row)
        draft.budget -= num_tokens
        draft.requests.append(request)
        draft.ends.append(end)
        draft.work.append(RowWork(request.row, request.epoch, num_tokens, num_cached, new_blocks, samples, end))

    def _make_room(self, draft: Draft, request: Request, num_blocks: int, cached: list[int]) -> int:
        """Preempt rows that come after `request` until `num_blocks` can be allocated beside `cached`.

        Returns how many can be, at most `num_blocks`.
        """
        while (room := self.kv.room(cached)) < num_blocks:
            victim = next((row for row in reversed(self._running) if row.planned_step != draft.step_id), None)
            if victim is None or not request < victim:
                break
            self._preempt(draft, victim)
        return min(room, num_blocks)

    def _preempt(self, draft: Draft, request: Request) -> None:
        """Take row and blocks; known ids and ids in flight stay, and it starts again from what the cache keeps."""
        self._running.remove(request)
        heapq.heappush(self._free_rows, request.row)
        self.kv.free(request)
        request.status = Status.WAITING
        request.was_preempted = True
        bisect.insort(self._waiting, request)
        self._num_preemptions += 1
        draft.may_admit = False

    # the result --------------------------------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take the result of the oldest plan in flight, or an empty one with an empty plan if there is none.

        Returns the new tokens of each request. A delta with a `finish_reason` is the last of its request.

        Raises:
            EngineError: the result does not belong to the plan.
        """
        deltas: list[TokenDelta] = []
        if plan.work:
            flight = self._flights.popleft()
            if not flight.plan.step_id == plan.step_id == result.step_id:
                raise EngineError(f"Step {flight.plan.step_id} was due, the device answered step {result.step_id}.")
            for request in flight.requests:
                request.num_flights -= 1
            self._pacer.observe(plan, result.device_s)
            if result.error is not None:
                self._fail(flight, result.error, deltas)
            else:
                self._take_prompt_logprobs(flight, result)
                self._take(flight, result, deltas)
        for request in self._ended:
            heapq.heappush(self._free_rows, request.row)
            self.kv.free(request)
        self._ended.clear()
        return deltas

    def _take(self, flight: Flight, result: StepResult, deltas: list[TokenDelta]) -> None:
        """Append sampled ids, end what they end, publish the blocks that they fill."""
        samples = {sample.row: sample for sample in result.samples}
        block_size = self.limits.block_size
        for work, request, end in zip(flight.plan.work, flight.requests, flight.ends, strict=True):
            if request.status is Status.ENDED:
                continue
            if work.samples:
                sample = samples.get(work.row)
                if sample is None or sample.epoch != work.epoch:
                    raise EngineError(f"Step {result.step_id} gave no token for row {work.row}.")
                deltas.append(self._append(request, sample))
            if request.row != NO_ROW and end // block_size > request.num_published:
                self.kv.publish(request, end)  # its ids are known: they landed before

    def _append(self, request: Request, sample: RowSample) -> TokenDelta:
        """One more known id. Ends the request if the id or the length says so."""
        (token_id,) = sample.token_ids
        ids = request.token_ids
        ids.append(token_id)
        self._num_generated += 1
        reason: FinishReason | None = None
        if token_id in request.stop_ids and request.num_generated >= request.params.min_tokens:
            reason = FinishReason.STOP
        elif len(ids) >= request.max_total:
            reason = FinishReason.LENGTH
        if reason is None and request.num_generated > 1:
            return TokenDelta(request_id=request.request_id, token_ids=sample.token_ids, logprobs=sample.logprobs)
        stopped_by = token_id if reason is FinishReason.STOP and token_id not in self._eos_ids else None
        if reason is not None:
            self._end(request)
        return self._notable_delta(request, sample, reason, stopped_by)

    def _notable_delta(
        self, request: Request, sample: RowSample, reason: FinishReason | None, stop_token_id: int | None
    ) -> TokenDelta:
        """A first or a last delta: those carry more than tokens."""
        is_first = request.num_generated == 1
        queued_s = prefill_s = None
        if is_first and request.first_planned_s is not None:
            self._num_prompt_tokens += request.num_prompt
            queued_s = request.first_planned_s - request.arrival_s
            prefill_s = time.monotonic() - request.first_planned_s
        return TokenDelta(
            request_id=request.request_id,
            token_ids=sample.token_ids,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            logprobs=sample.logprobs,
            prompt_logprobs=request.prompt_logprobs if is_first else None,
            num_cached_tokens=request.num_cached_tokens if is_first else 0,
            queued_s=queued_s,
            prefill_s=prefill_s,
        )

    def _take_prompt_logprobs(self, flight: Flight, result: StepResult) -> None:
        """Collect them in order; after a preemption the device computes known ones again."""
        if not result.prompt_logprobs:
            return
        by_row = {work.row: request for work, request in zip(flight.plan.work, flight.requests, strict=True)}
        for entry in result.prompt_logprobs:
            collected = by_row[entry.row].prompt_logprobs
            if collected is not None and entry.start <= len(collected):
                collected.extend(entry.logprobs[len(collected) - entry.start :])

    def _fail(self, flight: Flight, error: str, deltas: list[TokenDelta]) -> None:
        """End the requests of a failed step and of all plans in flight, and forget what they wrote."""
        for each in (flight, *self._flights):
            self.kv.unpublish(each.published)
            for request in each.requests:
                self.kv.unpublish(request.block_ids)
                if request.status is not Status.ENDED:
                    self._end(request)
                    deltas.append(
                        TokenDelta(
                            request_id=request.request_id,
                            finish_reason=FinishReason.ERROR,
                            error=f"The step that computed this request failed: {error}",
                        )
                    )

    def _end(self, request: Request) -> None:
        """Out of every queue; row and blocks are freed by `update`, not here."""
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self._ended.append(request)
        else:
            self._waiting.remove(request)
        request.status = Status.ENDED
        del self._requests[request.request_id]

    # invariants --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError unless every row, block and count is accounted for."""
        holders = self._running + self._ended
        self.kv.pool.check(request.block_ids for request in holders)
        rows = sorted([*self._free_rows, *(request.row for request in holders)])
        assert rows == list(range(self._num_rows)), f"rows lost or doubled: {rows}"
        assert sorted(self._running) == self._running and sorted(self._waiting) == self._waiting, "queue out of order"
        queued = {request.request_id: request for request in self._running + self._waiting}
        assert queued == self._requests, "a request is in no queue or in two"
        num_flights = [request for flight in self._flights for request in flight.requests]
        for request in queued.values():
            assert request.num_flights == num_flights.count(request), f"{request.request_id}: plans in flight"
            num_known = len(request.token_ids)
            assert num_known <= request.num_total <= min(num_known + request.num_flights, request.max_total)
            assert request.num_published * self.limits.block_size <= request.num_computed < request.num_total
            assert len(request.block_ids) == self.kv.num_blocks_of(request.num_computed)
            assert (request.status is Status.RUNNING) == (request.row != NO_ROW), f"{request.request_id}: row"

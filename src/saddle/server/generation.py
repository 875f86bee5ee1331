"""One job under way: its choices in the engine, their parsers, and the events that come out.

`Generation.events` is the one generator behind streaming and non-streaming answers: it ends every choice in exactly
one Done or Failed. Leaving it early, by cancellation too, aborts what still runs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import msgspec

from saddle.config import ServerConfig
from saddle.engine.client import EngineClient, TokenStream
from saddle.grammar.spec import AFTER_THINKING, has_lead
from saddle.metrics import Metrics
from saddle.parsing.events import Done, Event, Failed, TextDelta
from saddle.parsing.replay import ReplayStore
from saddle.parsing.stream import StreamParser
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineStats, FinishReason, GrammarSpec, SamplingParams, TokenDelta, TokenRequest, Usage
from saddle.server.constraints import bound_behind
from saddle.server.job import Job

logger = logging.getLogger(__name__)
UNREADABLE = "The output of the model could not be read."


@dataclass(slots=True, kw_only=True)
class Backend:
    """What a generation works with; one for all generations of a server."""

    client: EngineClient
    tokenizer: Tokenizer
    replay: ReplayStore
    config: ServerConfig
    metrics: Metrics
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    last_stats: EngineStats | None = None

    def engine_id(self, public_id: str) -> str:
        """Clients may repeat their ids; those of the engine never repeat."""
        return f"{public_id}-{next(self.numbers)}"

    def watch_steps(self) -> None:
        """Count the size of the engine's latest step once. Steps that yielded no token to anybody are not seen."""
        stats = self.client.stats
        if stats is not self.last_stats:
            self.last_stats = stats
            self.metrics.step_tokens.observe(stats.last_step_tokens)


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of a job: its stream of tokens, its parser and its clock."""

    index: int
    stream: TokenStream
    parser: StreamParser
    num_prompt: int
    lead: str = ""  # text in front of the answer that is not to be shown, until it came
    first_s: float = 0.0
    last_s: float = 0.0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    num_tokens: int = 0
    num_cached: int = 0
    done: bool = False

    @property
    def request_id(self) -> str:
        return self.stream.request_id


class Generation:
    """A job that the engine took: `prompts` are its token ids; `events` yields what it makes."""

    def __init__(self, backend: Backend, job: Job, prompts: list[list[int]], arrival_s: float,
                 on_close: Callable[[Generation], None]) -> None:  # fmt: skip
        self.job, self.prompts = job, prompts
        self._backend, self._arrival_s, self._on_close = backend, arrival_s, on_close
        self._choices: list[Choice] = []
        self._closed = False
        self._deadline: asyncio.TimerHandle | None = None
        self._expired = False
        # Whether each prompt ends inside a thinking block: of a long one without tags that is no quick look.
        self._thinking = [backend.tokenizer.is_thinking(prompt) for prompt in prompts]

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the first prompt that came from the prefix cache, known with its first output."""
        return self._choices[0].num_cached

    async def submit(self, params: list[SamplingParams]) -> None:
        """Hand every choice to the engine; all or none are taken."""
        job, n = self.job, self.job.params.n
        grammars = [self._grammar(is_thinking) for is_thinking in self._thinking]
        requests = [
            TokenRequest(
                request_id=self._backend.engine_id(job.request_id),
                prompt_ids=self.prompts[index // n],
                params=params[index // n].of_choice(index % n),
                arrival_s=self._arrival_s,
                priority=job.priority,
                cache_salt=job.cache_salt,
                grammar=grammars[index // n],
            )
            for index in range(len(self.prompts) * n)
        ]
        client = self._backend.client
        tasks = [asyncio.ensure_future(client.submit(request)) for request in requests]
        try:
            streams = await asyncio.gather(*tasks)
        except BaseException:
            for task, request in zip(tasks, requests, strict=True):
                task.cancel()
                client.abort(request.request_id)
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        self._choices = [
            Choice(index, stream, self._parser(index // n), len(self.prompts[index // n]),
                   self._lead(grammars[index // n]))
            for index, stream in enumerate(streams)
        ]
        timeout_s = self._backend.config.request_timeout_s
        if timeout_s is not None:
            left_s = self._arrival_s + timeout_s - time.monotonic()
            self._deadline = asyncio.get_running_loop().call_later(max(left_s, 0.0), self._expire)

    def _grammar(self, is_thinking: bool) -> GrammarSpec | None:
        """The grammar of the job where such a prompt wants it to begin."""
        job = self.job
        if not is_thinking:
            return job.grammar
        return bound_behind(job.grammar, job.max_thinking_tokens, self._backend.tokenizer.end_think_id)

    def _lead(self, grammar: GrammarSpec | None) -> str:
        """What stands in front of the answer that was asked for, where answers are told from thinking."""
        splits = self.job.parse and self._backend.config.reasoning_parser == "minimax_m2"
        return AFTER_THINKING if grammar is not None and has_lead(grammar) and splits else ""

    def _parser(self, number: int) -> StreamParser:
        """The parser of a choice of prompt `number`."""
        job, config = self.job, self._backend.config
        return StreamParser(
            self._backend.tokenizer,
            tools=job.tools,
            reasoning_parser=config.reasoning_parser if job.parse else None,
            tool_parser=config.tool_call_parser if job.parse else None,
            params=job.params,
            num_prompt_tokens=len(self.prompts[number]),
            starts_in_reasoning=job.parse and self._thinking[number],
            want_tokens=job.want_tokens,
            mute_calls=job.mute_calls,
        )

    # events ------------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[tuple[int, list[Event]], None]:
        """(choice, its new events), until every choice has had its Done or Failed."""
        try:
            if len(self._choices) == 1:
                choice = self._choices[0]
                async for delta in choice.stream:
                    events = self._feed(choice, delta)
                    if events:
                        yield choice.index, events
                    if choice.done:
                        break
            else:
                async for item in self._merged():
                    yield item
        finally:
            self.close()

    async def _merged(self) -> AsyncGenerator[tuple[int, list[Event]], None]:
        """The choices' events in the order in which they come."""
        queue: asyncio.Queue[tuple[Choice, TokenDelta]] = asyncio.Queue()

        async def pump(choice: Choice) -> None:
            async for delta in choice.stream:
                queue.put_nowait((choice, delta))

        pumps = [asyncio.ensure_future(pump(choice)) for choice in self._choices]
        try:
            running = len(pumps)
            while running:
                choice, delta = await queue.get()
                if choice.done:
                    continue
                events = self._feed(choice, delta)
                running -= choice.done
                if events:
                    yield choice.index, events
        finally:
            for task in pumps:
                task.cancel()

    def close(self) -> None:
        """Abort the choices that still run; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        for choice in self._choices:
            if not choice.done:
                choice.done = True
                self._backend.client.abort(choice.request_id)
                self._backend.metrics.finished[FinishReason.ABORT.value] += 1
        self._backend.metrics.longest.observe(max(choice.num_tokens for choice in self._choices))
        self._on_close(self)

    def _expire(self) -> None:
        """The time of the request is over: its streams end, and `_feed` says why."""
        self._expired = True
        for choice in self._choices:
            if not choice.done:
                self._backend.client.abort(choice.request_id)

    def _feed(self, choice: Choice, delta: TokenDelta) -> list[Event]:
        """Parse a delta, keep the clock, and end the choice where it ends."""
        if self._expired and delta.finish_reason is FinishReason.ABORT:
            error = too_slow(self._backend.config)
            delta = msgspec.structs.replace(delta, finish_reason=FinishReason.ERROR, error=error)
        if delta.token_ids:
            self._tick(choice, delta)
        try:
            events = choice.parser.feed(delta)
        except Exception:
            logger.exception("%s: the output could not be read", choice.request_id)
            events = [Failed(UNREADABLE, self._usage(choice))]
            self._backend.client.abort(choice.request_id)
        if self._expired and events and isinstance(events[-1], Failed):
            events[-1] = msgspec.structs.replace(events[-1], timed_out=True)
        if choice.lead:
            events = _without_lead(choice, events)
        if events and isinstance(events[-1], (Done, Failed)):
            self._end(choice, events[-1])
        return events

    def _tick(self, choice: Choice, delta: TokenDelta) -> None:
        now, count, metrics = time.monotonic(), len(delta.token_ids), self._backend.metrics
        if choice.first_s == 0:
            choice.first_s = now
            metrics.ttft.observe(now - self._arrival_s)
            choice.queued_s, choice.prefill_s = delta.queued_s or 0.0, delta.prefill_s or 0.0
            choice.num_cached = delta.num_cached_tokens
        else:
            metrics.itl.observe((now - choice.last_s) / count, count)
        choice.last_s = now
        choice.num_tokens += count
        self._backend.watch_steps()

    def _end(self, choice: Choice, last: Done | Failed) -> None:
        backend, stopped = self._backend, choice.parser.stopped_by_text
        choice.done = True
        if isinstance(last, Failed):
            logger.error("%s failed: %s", choice.request_id, last.message)
            backend.metrics.finished[FinishReason.ERROR.value] += 1
            return
        if stopped is not None:
            backend.client.finish(choice.request_id, *stopped)
        elif self.job.parse and (turn := choice.parser.turn()) is not None:
            backend.replay.remember(turn)
        self._observe(choice, last)

    def _observe(self, choice: Choice, done: Done) -> None:
        metrics, usage = self._backend.metrics, done.usage
        metrics.finished[done.finish_reason.value] += 1
        metrics.num_cached_tokens += usage.num_cached_tokens
        metrics.prompt.observe(usage.num_prompt_tokens)
        metrics.computed.observe(usage.num_prompt_tokens - usage.num_cached_tokens)
        metrics.generation.observe(usage.num_completion_tokens)
        metrics.params_n.observe(self.job.params.n)
        if self.job.params.max_tokens is not None:
            metrics.params_max_tokens.observe(self.job.params.max_tokens)
        decode_s = choice.last_s - choice.first_s
        metrics.e2e.observe(choice.last_s - self._arrival_s)
        metrics.queue.observe(choice.queued_s)
        metrics.prefill.observe(choice.prefill_s)
        metrics.decode.observe(decode_s)
        metrics.inference.observe(choice.prefill_s + decode_s)
        if usage.num_completion_tokens > 1:
            metrics.tpot.observe(decode_s / (usage.num_completion_tokens - 1))

    @staticmethod
    def _usage(choice: Choice) -> Usage:
        return Usage(num_prompt_tokens=choice.num_prompt, num_completion_tokens=choice.num_tokens)


def too_slow(config: ServerConfig) -> str:
    """What the sender of a request is told whose time is over."""
    return f"The request took longer than the {config.request_timeout_s:g} s that it may."


def _without_lead(choice: Choice, events: list[Event]) -> list[Event]:
    """Events without the text in front of the answer; the parser gives that out with the answer's first, or alone."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, TextDelta) and choice.lead:
            text = event.text.removeprefix(choice.lead)
            choice.lead = ""
            if text:
                kept.append(TextDelta(text))
        else:
            kept.append(event)
    return kept

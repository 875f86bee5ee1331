"""What every HTTP API does with a job: admit it, make its token ids, hand it to the engine.

`Service.open` raises a `RequestError` for whatever can be refused; once it returns, the engine has taken every choice
and the answer is HTTP 200. What follows is the `Generation` that it returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from saddle.config import ServerConfig
from saddle.engine.client import EngineClient
from saddle.errors import ContextTooLong, InvalidRequest, Overloaded, RequestError, Unavailable
from saddle.metrics import Metrics
from saddle.parsing.conversation import normalise
from saddle.parsing.render import Renderer
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import SamplingParams
from saddle.server.generation import Backend, Generation, too_slow
from saddle.server.job import ChatPrompt, Facts, Job, Prompt, TextPrompt, TokenPrompt

logger = logging.getLogger(__name__)

Made = TypeVar("Made")
RENDER_THREADS = 2
RETRY_AFTER_S = 1
# Of a text that is counted or cut: some times of what a context holds, and less than would fill the memory.
FAR_CHARS, CHARS_PER_TOKEN = 4_000_000, 32
DRAINING = "The server is shutting down."


class TimedOut(RequestError):
    """The request took longer than it may before anything was generated."""

    status = 504
    kind = "TimeoutError"


class Service:
    """Serves jobs with one engine. Belongs to the event loop of its client.

    Args:
        client: the engine; it may still be loading.
        replay: the store that `renderer` reads; generated turns are reported to it.
        model_names: names that requests may give; the first is echoed.
        defaults: sampling values of the checkpoint and the command line, from `defaults.sampling_defaults`.
        obeys_priority: whether the engine's policy looks at a request's priority.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        renderer: Renderer,
        replay: ReplayStore,
        config: ServerConfig,
        metrics: Metrics,
        *,
        model_names: tuple[str, ...],
        defaults: Mapping[str, Any],
        obeys_priority: bool = True,
    ) -> None:
        self.client, self.tokenizer, self.config, self.metrics = client, tokenizer, config, metrics
        self.model_names, self.defaults, self._obeys_priority = model_names, defaults, obeys_priority
        self.created_s = int(time.time())
        self.draining = False
        self._renderer = renderer
        self._backend = Backend(client=client, tokenizer=tokenizer, replay=replay, config=config, metrics=metrics)
        self._live: set[Generation] = set()
        self._num_opening = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="render")
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="count")
        metrics.bind(lambda: client.stats, lambda: client.state.ready)

    # state -------------------------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        """Requests being admitted or answered."""
        return len(self._live) + self._num_opening

    def unavailable(self) -> Unavailable | None:
        """Why new requests are refused now, None when they are not."""
        state = self.client.state
        if state.dead is not None:
            return Unavailable(state.dead)
        if self.draining:
            return Unavailable(DRAINING, retry_after=RETRY_AFTER_S)
        if state.ready is None:
            return Unavailable(f"The model is loading: {state.phase}, {state.share:.0%}.", retry_after=RETRY_AFTER_S)
        return None

    def facts(self) -> Facts:
        """Raises Unavailable while no request can be served."""
        reason, ready = self.unavailable(), self.client.state.ready
        if reason is not None:
            self._reject("unavailable")
            raise reason
        assert ready is not None
        return Facts(
            model_names=self.model_names,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            defaults=self.defaults,
            config=self.config,
            tokenizer=self.tokenizer,
        )

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when `timeout_s` passed first."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def close(self) -> None:
        for threads in (self._threads, self._counting):
            threads.shutdown(wait=False, cancel_futures=True)

    # admission ---------------------------------------------------------------------------------------------------

    async def open(self, job: Job) -> Generation:
        """Admit a job; returns when the engine took all its choices.

        Raises:
            RequestError: refused, by us or by the engine; nothing of it runs then.
        """
        opening = self._open(job)
        if self.config.request_timeout_s is None:
            return await opening
        try:
            return await asyncio.wait_for(opening, self.config.request_timeout_s)
        except asyncio.TimeoutError:
            raise TimedOut(too_slow(self.config)) from None

    async def _open(self, job: Job) -> Generation:
        arrival_s, facts = time.monotonic(), self.facts()
        if not -(2**63) <= job.priority < 2**63:
            raise InvalidRequest("priority must be a 64-bit integer.", "priority")
        if job.priority and not self._obeys_priority:
            raise InvalidRequest("priority must be 0 on a server without --scheduling-policy priority.", "priority")
        self._check_queue()
        self._change_opening(+1)
        try:
            limit, is_cut = facts.max_model_len, job.keep_last is not None or job.keep_first is not None
            prompts = [_cut(job, await self._encode(prompt, limit, is_cut)) for prompt in job.prompts]
            params = [self._fit(job.params, ids, facts.max_model_len) for ids in prompts]
            generation = Generation(self._backend, job, prompts, arrival_s, self._forget)
            await self._submit(generation, params)
            self._live.add(generation)
        except ContextTooLong:
            self._reject("prompt_too_long")
            raise
        finally:
            self._change_opening(-1)
        if self.config.log_requests:
            logger.info("%s: prompts of %s tokens, %s", job.request_id, [len(ids) for ids in prompts], params[0])
        return generation

    async def _submit(self, generation: Generation, params: list[SamplingParams]) -> None:
        try:
            await generation.submit(params)
        except RequestError:
            self._reject("engine")
            raise

    async def count(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt that is not to be generated from; waits for others of its kind alone.

        Raises:
            InvalidRequest: as the renderer refused it.
        """
        return await self._encode(prompt, self.facts().max_model_len, True, self._counting)

    async def _encode(
        self, prompt: Prompt, limit: int, to_its_end: bool, threads: ThreadPoolExecutor | None = None
    ) -> list[int]:
        """Token ids of a prompt. Rendering and encoding run on a thread.

        What is far above `limit` tokens is refused before it is encoded; what is to be encoded `to_its_end` all the
        same, because it is counted or cut, has a limit of its own.
        """
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids

        def check(text: str) -> None:
            if not to_its_end:
                self.tokenizer.refuse_far_too_long(text, limit)
            elif len(text) > (longest := max(FAR_CHARS, CHARS_PER_TOKEN * limit)):
                raise ContextTooLong(f"prompt is too long: {len(text)} characters > {longest} maximum", "input_tokens")

        make = self._render if isinstance(prompt, ChatPrompt) else self._encode_text
        return await self.apart(make, prompt, check, threads=threads)

    async def apart(self, make: Callable[..., Made], *args: Any, threads: ThreadPoolExecutor | None = None) -> Made:
        """`make(*args)` on a thread: for what may take longer than the event loop can wait.

        Raises:
            InvalidRequest: what `args` hold is nested too deeply.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(threads or self._threads, make, *args)
        except RecursionError:
            raise InvalidRequest("The request is nested too deeply.") from None

    def _encode_text(self, prompt: TextPrompt, check: Callable[[str], None]) -> list[int]:
        check(prompt.text)
        return self.tokenizer.encode(prompt.text)

    def _render(self, prompt: ChatPrompt, check: Callable[[str], None]) -> list[int]:
        rendered = self._renderer.render(
            normalise(prompt.messages, prompt.tools),
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            template_kwargs=dict(prompt.template_kwargs),
            check=check,
        )
        return rendered.token_ids

    def _check_queue(self) -> None:
        """Refuse before any work is done when the queue was full after the latest step; the engine counts exactly."""
        limit, waiting = self.config.max_queued_requests, self.client.stats.num_waiting
        if limit is not None and waiting >= limit:
            self._reject("queue_full")
            raise Overloaded(f"{waiting} requests are waiting already; the limit is {limit}.",
                             retry_after=RETRY_AFTER_S)  # fmt: skip

    def _fit(self, params: SamplingParams, ids: list[int], longest: int) -> SamplingParams:
        """The parameters with `max_tokens` set to what fits behind a prompt."""
        if not ids:
            raise InvalidRequest("The prompt has no tokens.", param="prompt")
        if len(ids) >= longest:
            raise ContextTooLong.of(len(ids), longest)
        return params.within(longest - len(ids))

    def _forget(self, generation: Generation) -> None:
        self._live.discard(generation)
        self._change_opening(0)

    def _change_opening(self, by: int) -> None:
        self._num_opening += by
        self.metrics.num_in_flight = self.num_in_flight
        if self.num_in_flight:
            self._idle.clear()
        else:
            self._idle.set()

    def _reject(self, reason: str) -> None:
        self.metrics.rejected[reason] += 1


def _cut(job: Job, ids: list[int]) -> list[int]:
    if job.keep_last is not None:
        return ids[-job.keep_last :]
    return ids if job.keep_first is None else ids[: job.keep_first]

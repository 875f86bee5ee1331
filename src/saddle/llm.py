"""Offline generation: the engine core in this process, without a server.

    from saddle import LLM, SamplingParams
    llm = LLM("path/to/MiniMax-M2.7")
    [answer] = llm.chat([{"role": "user", "content": "What is 2 + 3?"}], SamplingParams(temperature=0.0))
    print(answer.outputs[0].text)

The same scheduler, runner and parsers as behind HTTP, so equal seeds give equal tokens in both.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saddle import launch
from saddle.config import (
    CacheConfig,
    CompileConfig,
    Dtype,
    EngineConfig,
    KVCacheDtype,
    LoadConfig,
    LoadFormat,
    SchedulerConfig,
    ServerConfig,
)
from saddle.errors import ContextTooLong, EngineError, InvalidRequest
from saddle.model.source import resolve_model
from saddle.parsing.conversation import normalise
from saddle.parsing.events import Done, Event, Failed, Tokens
from saddle.parsing.fold import Completion, ToolCall, fold
from saddle.parsing.replay import ReplayStore
from saddle.parsing.stream import StreamParser
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, GrammarSpec, Refused, SamplingParams, TokenDelta, TokenLogprobs, TokenRequest

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Prompt = str | Sequence[int]
REPLAY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer.

    text       what was generated; of a chat, the answer without thinking and calls
    reasoning, tool_calls   of a chat
    stop_reason   the stop string or stop token id that ended it, None at EOS
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The answers to one prompt, `sampling_params.n` of them."""

    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(slots=True)
class _Choice:
    parser: StreamParser
    events: list[Event] = field(default_factory=list)
    done: bool = False


class LLM:
    """A loaded model. Arguments are those of `saddle serve` with the same names.

    Args:
        model: folder or hub id; None is the bundled demo checkpoint.

    Raises:
        StartupError: it cannot start on this machine; the message says what would.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        load_format: LoadFormat = "auto",
        seed: int = 0,
        hf_overrides: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        gpu_memory_utilization: float = 0.92,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        compilation_config: Mapping[str, Any] | None = None,
    ) -> None:
        from saddle.server.defaults import sampling_defaults

        config = EngineConfig(
            load=LoadConfig(model=model or str(launch.demo_model_path()), tokenizer=tokenizer, revision=revision,
                            dtype=dtype, load_format=load_format, seed=seed, hf_overrides=dict(hf_overrides or {})),
            cache=CacheConfig(block_size=block_size, gpu_memory_utilization=gpu_memory_utilization,
                              kv_cache_memory_bytes=kv_cache_memory_bytes, kv_cache_dtype=kv_cache_dtype,
                              enable_prefix_caching=enable_prefix_caching),
            scheduler=SchedulerConfig(max_model_len=max_model_len, max_num_seqs=max_num_seqs,
                                      max_num_batched_tokens=max_num_batched_tokens),
            compile=CompileConfig(enforce_eager=enforce_eager, compilation_config=dict(compilation_config or {})),
        )  # fmt: skip
        folder = resolve_model(config.load.model, revision)
        self._tokenizer = Tokenizer.load(resolve_model(tokenizer) if tokenizer else folder)
        self._replay = ReplayStore(REPLAY_BYTES)
        self._renderer = launch.build_renderer(self._tokenizer, chat_template, self._replay)
        self._defaults = sampling_defaults(Path(folder), ServerConfig())
        self._core, self._info = launch.build_core(config, folder, _log_progress)
        self._numbers = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """The sampling values of the checkpoint's generation config."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue texts or lists of token ids; one output for each, in their order.

        Args:
            sampling_params: for all prompts, or one for each; None is the checkpoint's.

        Raises:
            InvalidRequest: a prompt or parameter is wrong; nothing was generated.
        """
        listed = _as_list(prompts)
        ids = [self._tokenizer.encode(p) if isinstance(p, str) else list(p) for p in listed]
        texts = [p if isinstance(p, str) else self._tokenizer.decode(list(p), False) for p in listed]
        return self._run(texts, ids, _spread(sampling_params, len(listed)), parse=False, tools=None)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking_token_budget: int | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, thinking and tool calls apart; one output for each conversation.

        Args:
            messages: one conversation, or a list of them.
            tools: as in the OpenAI API, for all of them.
            chat_template_kwargs: variables of the template; `enable_thinking: False` ends the thinking at once, as in
                the server.
            thinking_token_budget: most tokens of thinking; None and -1 are no limit.
        """
        from saddle.server.sampling import max_thinking_tokens
        from saddle.server.wire_openai import SamplingBody

        asked = SamplingBody(thinking_token_budget=thinking_token_budget)
        max_thinking = max_thinking_tokens(asked, template_kwargs=chat_template_kwargs)
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = messages if many else [messages]
        offered = list(tools) if tools else None
        rendered = [
            self._renderer.render(normalise(list(c), offered), template_kwargs=chat_template_kwargs or {})
            for c in conversations
        ]
        params = _spread(sampling_params, len(rendered))
        return self._run([r.text for r in rendered], [r.token_ids for r in rendered], params, parse=True, tools=offered,
                         max_thinking=max_thinking)  # fmt: skip

    def close(self) -> None:
        """Free the model; the object is of no use afterwards."""
        self._core.stop()

    # inside ------------------------------------------------------------------------------------------------------

    def _run(
        self,
        texts: list[str],
        prompts: list[list[int]],
        params: Sequence[SamplingParams | None],
        parse: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        max_thinking: int | None = None,
    ) -> list[RequestOutput]:
        resolved = [self._fit(p or self.default_sampling_params(), ids) for p, ids in zip(params, prompts, strict=True)]
        grammars = [self._limit(max_thinking, wanted, ids) for wanted, ids in zip(resolved, prompts, strict=True)]
        batch = next(self._numbers)
        choices: dict[str, _Choice] = {}
        for number, (ids, wanted) in enumerate(zip(prompts, resolved, strict=True)):
            for index in range(wanted.n):
                name = f"{batch}-{number}-{index}"
                choices[name] = _Choice(self._parser(wanted, ids, parse, tools))
                self._core.submit(TokenRequest(request_id=name, prompt_ids=ids, params=wanted.of_choice(index),
                                               arrival_s=time.monotonic(), grammar=grammars[number]))  # fmt: skip
        self._check_answers(list(choices))
        while not all(choice.done for choice in choices.values()):
            for delta in self._core.step():
                self._feed(choices[delta.request_id], delta)
        return [
            self._output(texts[n], ids, [choices[f"{batch}-{n}-{i}"] for i in range(resolved[n].n)])
            for n, ids in enumerate(prompts)
        ]

    def _limit(self, max_thinking: int | None, params: SamplingParams, ids: list[int]) -> GrammarSpec | None:
        """The limit of the thinking that a prompt opened, by the server's rules."""
        from saddle.server.constraints import bound_behind, check_sampling

        check_sampling(None, max_thinking, params)
        tokenizer = self._tokenizer
        return bound_behind(None, max_thinking, tokenizer.end_think_id) if tokenizer.is_thinking(ids) else None

    def _parser(
        self, params: SamplingParams, ids: list[int], parse: bool, tools: Sequence[Mapping[str, Any]] | None
    ) -> StreamParser:
        return StreamParser(
            self._tokenizer,
            tools=tools,
            reasoning_parser="minimax_m2" if parse else None,
            tool_parser="minimax_m2" if parse else None,
            params=params,
            num_prompt_tokens=len(ids),
            starts_in_reasoning=parse and self._tokenizer.is_thinking(ids),
            want_tokens=True,
        )

    def _fit(self, params: SamplingParams, ids: list[int]) -> SamplingParams:
        longest = self._info.max_model_len
        if not ids:
            raise InvalidRequest("The prompt has no tokens.", "prompt")
        if len(ids) >= longest:
            raise ContextTooLong(f"The prompt has {len(ids)} tokens, the context of this model {longest}.", "prompt")
        return params.within(longest - len(ids))

    def _check_answers(self, names: list[str]) -> None:
        """All or nothing: a refused prompt takes back the others."""
        refused = [answer for answer in self._core.answers() if isinstance(answer, Refused)]
        if refused:
            self._core.abort(names)
            raise InvalidRequest(refused[0].message, refused[0].param)

    def _feed(self, choice: _Choice, delta: TokenDelta) -> None:
        if choice.done:
            return
        events = choice.parser.feed(delta)
        choice.events += events
        if events and isinstance(events[-1], (Done, Failed)):
            choice.done = True
            if choice.parser.stopped_by_text is not None:
                self._core.finish(delta.request_id, *choice.parser.stopped_by_text)
            turn = choice.parser.turn()
            if turn is not None:
                self._replay.remember(turn)

    def _output(self, prompt: str, ids: list[int], choices: list[_Choice]) -> RequestOutput:
        outputs, cached, scores = [], 0, None
        for index, choice in enumerate(choices):
            whole = fold(choice.events)
            if whole.error is not None:
                raise EngineError(whole.error)
            outputs.append(_completion(index, whole, choice.events))
            cached = max(cached, whole.usage.num_cached_tokens if whole.usage else 0)
            scores = scores or next((e.prompt_logprobs for e in choice.events if isinstance(e, Tokens)), None)
        return RequestOutput(prompt=prompt, prompt_token_ids=ids, outputs=outputs, num_cached_tokens=cached,
                             prompt_logprobs=scores)  # fmt: skip


def _completion(index: int, whole: Completion, events: list[Event]) -> CompletionOutput:
    logprobs = [entry for e in events if isinstance(e, Tokens) for entry in e.logprobs or ()]
    reason = whole.finish_reason or FinishReason.ERROR
    return CompletionOutput(
        index=index,
        text=whole.content,
        token_ids=whole.token_ids,
        finish_reason="tool_calls" if whole.wants_results else reason.value,
        stop_reason=whole.stop,
        reasoning=whole.reasoning,
        tool_calls=whole.tool_calls,
        logprobs=logprobs or None,
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if one else prompts  # type: ignore[list-item,return-value]


def _spread(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams | None]:
    """One value for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequest(f"sampling_params must be one or {count}, got {len(params)}.", "sampling_params")
    return list(params)


def _log_progress(phase: str, share: float, note: str) -> None:
    logger.debug("%s: %.0f %% %s", phase, 100 * share, note)

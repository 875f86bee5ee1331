"""OpenAI's chat completions: the body becomes a job, the events of the job become chunks or one answer.

Reasoning goes out as `reasoning` and `reasoning_content` (`--reasoning-field` picks one). Of `reasoning_effort` only
"none" changes anything, it ends the thinking at once, as `enable_thinking: false` among the `chat_template_kwargs`
does: nothing in M2's prompt sets how much it thinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from saddle.errors import InvalidRequest
from saddle.parsing.conversation import text_of
from saddle.parsing.events import Done, Event, Failed, ReasoningDelta, TextDelta, Tokens, ToolArgs, ToolEnd, ToolStart
from saddle.parsing.fold import Completion, fold
from saddle.protocol import FinishReason
from saddle.server.constraints import check_sampling, chosen, combined, without_calls
from saddle.server.job import ChatPrompt, Facts, Job
from saddle.server.openai_parts import (
    DONE_FRAME,
    Asked,
    ChunkFrame,
    TokenNames,
    UsageCount,
    all_tokens,
    error_frame,
    joined,
    new_id,
    now,
)
from saddle.server.replies import encode_json, status_of
from saddle.server.sampling import answer_grammar, check_streaming, max_thinking_tokens, sampling_params, truncation
from saddle.server.wire_openai import ChatBody

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedChat(Asked):
    """A chat request.

    named   one tool had to be called: OpenAI then reports "stop" and not "tool_calls"
    echoed   the text of the last message, sent first when `echo` asks for it
    """

    num_top: int = 0
    include_reasoning: bool = True
    named: bool = False
    echoed: str = ""


def to_request(body: ChatBody, facts: Facts, request_id: str | None = None) -> AskedChat:
    """Raises InvalidRequest or NotFound, naming the field."""
    model = facts.check_model(body.model)
    if body.tools is not None and not body.tools:
        raise InvalidRequest("tools must not be empty: leave it out to offer none.", param="tools")
    choice = chosen(body.tool_choice, body.tools)
    _check_fields(body)
    check_streaming(body)
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = sampling_params(body, facts, max_tokens=max_tokens, logprobs=_num_logprobs(body))
    grammar = combined(answer_grammar(body), body.tools, choice, facts.tokenizer,
                       parallel=body.parallel_tool_calls is not False)  # fmt: skip
    template_kwargs = {**facts.config.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
    max_thinking = max_thinking_tokens(body, body.reasoning_effort, template_kwargs)
    check_sampling(grammar, max_thinking, params)
    muted = choice.kind == "none"
    params = without_calls(params, muted and body.tools is not None, grammar, facts.tokenizer)
    prompt = ChatPrompt(
        messages=body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=template_kwargs,
    )
    keep_last, keep_first = truncation(body, facts)
    options = body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    job = Job(
        request_id=new_id("chatcmpl", body.request_id or request_id),
        prompts=(prompt,),
        params=params,
        tools=body.tools,
        mute_calls=muted,
        grammar=grammar,
        max_thinking_tokens=max_thinking,
        want_tokens=bool(body.logprobs or body.return_token_ids or continuous or body.prompt_logprobs is not None),
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
        keep_last=keep_last,
        keep_first=keep_first,
    )
    return AskedChat(
        job=job,
        model=model,
        created=now(),
        stream=bool(body.stream),
        include_usage=facts.config.force_include_usage or bool(options and options.include_usage) or continuous,
        continuous_usage=continuous,
        logprobs=bool(body.logprobs),
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        num_top=body.top_logprobs or 0,
        include_reasoning=body.include_reasoning is not False,
        named=choice.kind == "named",
        echoed=_echoed(body),
    )


def _check_fields(body: ChatBody) -> None:
    if body.max_completion_tokens is not None and body.max_completion_tokens < 1:
        raise InvalidRequest("max_completion_tokens must be at least 1.", param="max_completion_tokens")
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if body.top_logprobs < 0:
            raise InvalidRequest("top_logprobs must be 0 or more.", param="top_logprobs")
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise InvalidRequest("continue_final_message and add_generation_prompt cannot both be true.",
                                 param="continue_final_message")  # fmt: skip
        if body.messages[-1].get("role") != "assistant":
            raise InvalidRequest("continue_final_message needs a last message of role assistant.",
                                 param="continue_final_message")  # fmt: skip
    effort = body.reasoning_effort
    if effort is not None and effort not in EFFORTS:
        raise InvalidRequest(f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r}.",
                             param="reasoning_effort")  # fmt: skip


def _num_logprobs(body: ChatBody) -> int | None:
    return (body.top_logprobs or 0) if body.logprobs else None


def _echoed(body: ChatBody) -> str:
    """The text that `echo` puts before the answer: the last message, when the answer continues it."""
    last = body.messages[-1]
    if not body.echo or last.get("role") != "assistant":
        return ""
    return text_of(last.get("content"), f"messages.{len(body.messages) - 1}.content")


# ---------------------------------------------------------------------------------------------------------------
# events -> bytes


class FunctionPart(msgspec.Struct):
    arguments: str


class FunctionHead(msgspec.Struct):
    name: str
    arguments: str


class CallHead(msgspec.Struct):
    index: int
    id: str
    type: str
    function: FunctionHead


class CallPart(msgspec.Struct):
    index: int
    function: FunctionPart


class Delta(msgspec.Struct, omit_defaults=True):
    """What is new in a chunk; absent fields are not sent."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallHead | CallPart] | None = None


class ChatStream:
    """Encodes a chat stream: `start`, then `encode` for each batch of events, then `finish`.

    One chunk an event; the chunks of a batch come back as one byte string, so that they are one write.
    """

    def __init__(self, asked: AskedChat, names: TokenNames, prompts: list[list[int]], reasoning_field: str) -> None:
        self._asked, self._names, self._prompts = asked, names, prompts
        self._frame = ChunkFrame("chat.completion.chunk", asked)
        self._usage = UsageCount(asked.job.params.n, [len(ids) for ids in prompts])
        self._plain, self._old = reasoning_field != "reasoning_content", reasoning_field != "reasoning"
        self._called: dict[int, bool] = {}  # choices that made a call: whether the latest one is whole
        self._pending: dict[int, Tokens] = {}
        self._heads = [b'{"index":%d,"delta":' % i for i in range(asked.job.params.n)]
        self._detailed = asked.logprobs or asked.return_token_ids or asked.continuous_usage

    def start(self) -> bytes:
        asked, frames = self._asked, []
        for index in range(asked.job.params.n):
            choice = self._choice(index, Delta(role="assistant", content=""))
            if asked.return_token_ids:
                frames.append(self._frame.first(choice, {"prompt_token_ids": self._prompts[0]}))
            else:
                frames.append(self._frame.choice(choice, self._usage_so_far()))
            if asked.echoed:
                frames.append(self._frame.choice(self._choice(index, Delta(content=asked.echoed))))
        return b"".join(frames)

    def encode(self, index: int, events: list[Event]) -> bytes:
        frames: list[bytes] = []
        for event in events:
            kind = type(event)
            if kind is Tokens:
                self._hold(index, event)  # type: ignore[arg-type]
            elif kind is Done:
                frames.append(self._last(index, event))  # type: ignore[arg-type]
            elif kind is Failed:
                self._usage.add(index, event)  # type: ignore[arg-type]
                frames.append(error_frame(event.message, status_of(event)))  # type: ignore[arg-type,union-attr]
            else:
                delta = self._delta(index, event)
                if delta is not None:
                    frames.append(self._chunk(index, delta))
        if index in self._pending and self._detailed:
            frames.append(self._chunk(index, Delta()))
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def failed(self, message: str) -> bytes:
        return error_frame(message)

    def finish(self) -> bytes:
        if self._asked.include_usage:
            return self._frame.usage(self._usage.body()) + DONE_FRAME
        return DONE_FRAME

    def _delta(self, index: int, event: Event) -> Delta | None:
        if isinstance(event, TextDelta):
            return Delta(content=event.text)
        if isinstance(event, ReasoningDelta):
            if not self._asked.include_reasoning:
                return None
            text = event.text
            return Delta(reasoning=text if self._plain else None, reasoning_content=text if self._old else None)
        if isinstance(event, (ToolStart, ToolArgs)):
            self._called[index] = False
            if isinstance(event, ToolArgs):
                return Delta(tool_calls=[CallPart(event.index, FunctionPart(event.fragment))])
            return Delta(tool_calls=[CallHead(event.index, event.call_id, "function", FunctionHead(event.name, ""))])
        if isinstance(event, ToolEnd):
            self._called[index] = True
        return None

    def _chunk(self, index: int, delta: Delta) -> bytes:
        if not self._detailed:
            return self._frame.choice(
                b'%b%b,"logprobs":null,"finish_reason":null}' % (self._heads[index], encode_json(delta))
            )
        return self._frame.choice(self._choice(index, delta), self._usage_so_far())

    def _choice(self, index: int, delta: Delta, finish: FinishReason | str | None = None,
                stop: str | int | None = None) -> bytes:  # fmt: skip
        """A choice with everything that was asked for; takes the tokens that are held for it."""
        fields: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if finish is not None:
            fields["stop_reason"] = stop
        tokens = self._pending.pop(index, None)
        if tokens is not None:
            if self._asked.logprobs and tokens.logprobs is not None:
                entries = [self._names.chat(entry, self._asked.num_top) for entry in tokens.logprobs]
                fields["logprobs"] = {"content": entries}
            if self._asked.return_token_ids:
                fields["token_ids"] = tokens.token_ids
        return encode_json(fields)

    def _hold(self, index: int, tokens: Tokens) -> None:
        """Keep tokens for the next chunk of their choice."""
        self._usage.add_tokens(index, len(tokens.token_ids))
        held = self._pending.get(index)
        self._pending[index] = tokens if held is None else joined(held, tokens)

    def _last(self, index: int, done: Done) -> bytes:
        self._usage.add(index, done)
        reason = finish_reason(done.finish_reason, self._called.get(index, False) and not self._asked.named)
        choice = self._choice(index, Delta(), reason, done.stop)
        return self._frame.choice(choice, self._usage_so_far())

    def _usage_so_far(self) -> bytes | None:
        return encode_json(self._usage.body()) if self._asked.continuous_usage else None


def finish_reason(reason: FinishReason, called: bool) -> str:
    """`tool_calls` when the model stopped after at least one call that it chose to make, all of them whole."""
    return "tool_calls" if called and reason is FinishReason.STOP else reason.value


# ---------------------------------------------------------------------------------------------------------------
# events -> one answer


def to_response(
    asked: AskedChat, names: TokenNames, prompts: list[list[int]], choices: list[list[Event]], reasoning_field: str
) -> bytes:
    """The body of a non-streaming answer; `choices[i]` are all events of choice i, ended by Done."""
    usage = UsageCount(asked.job.params.n, [len(ids) for ids in prompts])
    bodies, prompt_logprobs = [], None
    for index, events in enumerate(choices):
        done = events[-1]
        assert isinstance(done, Done)
        usage.add(index, done)
        ids, logprobs, prompt = all_tokens(events)
        prompt_logprobs = prompt_logprobs or prompt
        whole = fold(events)
        choice: dict[str, Any] = {
            "index": index,
            "message": _message(asked, whole, reasoning_field),
            "logprobs": None,
            "finish_reason": finish_reason(done.finish_reason, whole.wants_results and not asked.named),
            "stop_reason": done.stop,
        }
        if asked.logprobs:
            choice["logprobs"] = {"content": [names.chat(entry, asked.num_top) for entry in logprobs]}
        if asked.return_token_ids:
            choice["token_ids"] = ids
        bodies.append(choice)
    body: dict[str, Any] = {
        "id": asked.job.request_id,
        "object": "chat.completion",
        "created": asked.created,
        "model": asked.model,
        "choices": bodies,
        "usage": usage.body(),
    }
    if prompt_logprobs is not None:
        body["prompt_logprobs"] = names.prompt(prompt_logprobs)
    if asked.return_token_ids:
        body["prompt_token_ids"] = prompts[0]
    return encode_json(body)


def _message(asked: AskedChat, whole: Completion, reasoning_field: str) -> dict[str, Any]:
    calls = whole.tool_calls
    content = asked.echoed + whole.content
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not (calls or whole.reasoning) else None,
    }
    if asked.include_reasoning and whole.reasoning:
        if reasoning_field != "reasoning_content":
            message["reasoning"] = whole.reasoning
        if reasoning_field != "reasoning":
            message["reasoning_content"] = whole.reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message

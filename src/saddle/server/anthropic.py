"""Anthropic's Messages API: the body becomes a job, the events of the job become one message (or, in
`anthropic_stream.py`, a stream).

Thinking: M2 thinks before each answer, asked or not, and the thinking goes out as blocks that are signed. "disabled"
ends it at once, a budget ends it after so many tokens, and `display: "omitted"` keeps the text back: then the signature
carries it. `output_config.effort` is accepted and changes nothing: nothing in M2's prompt sets how much it thinks.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

from saddle.errors import InvalidRequest
from saddle.grammar import spec
from saddle.parsing.events import Done, Event
from saddle.protocol import MAX_STOP_STRINGS, GrammarSpec, SamplingParams
from saddle.server.anthropic_blocks import Blocks, Show, content_of
from saddle.server.anthropic_messages import OfferedTools, Turns, require, to_functions, to_turns
from saddle.server.anthropic_parts import Signer, ThreadNotFound, stop_reason, usage_body
from saddle.server.constraints import Choice, check_sampling, combined, switches_thinking_off, without_calls
from saddle.server.job import ChatPrompt, Facts, Job
from saddle.server.replies import encode_json
from saddle.server.sampling import DEFAULTED_FIELDS
from saddle.server.wire_anthropic import MessagesBody, PromptBody

EFFORTS = ("low", "medium", "high", "xhigh", "max")
OWN_TOOL_PATH = re.compile(r"tools\.(\d+)\.(?:parameters)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedMessage:
    """A request of this API: the job, and how the sender wants to read the answer.

    max_tokens   as asked; 0 warms the cache: one token is made, because an engine makes at least one, and not shown
    manages_context   `context_management` was given: the answer says that nothing of it was applied
    continues   the last message is the beginning of the answer
    """

    job: Job
    model: str
    stream: bool
    show: Show
    max_tokens: int
    max_model_len: int
    manages_context: bool
    continues: bool

    @property
    def is_warming(self) -> bool:
        return self.max_tokens == 0


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """The part of a request that makes the prompt. `turns` and `tools` say what was left out of it."""

    model: str
    prompt: ChatPrompt
    turns: Turns
    tools: OfferedTools


def to_prompt(body: PromptBody, facts: Facts, signer: Signer) -> AskedPrompt:
    """Raises InvalidRequest or NotFound, naming the field."""
    model = facts.check_model(body.model)
    _check_thread(body.thread)
    turns = to_turns(body.system, body.messages, signer)
    tools = to_functions(body.tools or ())
    offered = [
        {"type": "function", "function": {key: value for key, value in function.items() if key != "strict"}}
        for function in tools.functions
    ]
    prompt = ChatPrompt(
        messages=turns.messages,
        tools=offered or None,
        add_generation_prompt=not turns.ends_with_answer,
        continue_final_message=turns.ends_with_answer,
        template_kwargs=facts.config.default_chat_template_kwargs,
    )
    return AskedPrompt(model, prompt, turns, tools)


def to_request(
    body: MessagesBody, facts: Facts, signer: Signer, request_id: str | None = None
) -> tuple[AskedMessage, AskedPrompt]:
    """Raises InvalidRequest or NotFound, naming the field."""
    asked = to_prompt(body, facts, signer)
    _check_fields(body)
    params = _params(body, facts)
    max_thinking, show = _thinking(body, switches_thinking_off(asked.prompt.template_kwargs))
    choice, parallel = _choice(body.tool_choice, asked.tools)
    grammar = _grammar(_answer(body), asked.tools, choice, parallel, facts)
    check_sampling(grammar, max_thinking, params)
    muted = choice.kind == "none"
    params = without_calls(params, muted and bool(asked.tools.functions), grammar, facts.tokenizer)
    job = Job(
        request_id=f"msg_{body.request_id or request_id or uuid.uuid4().hex}",
        prompts=(asked.prompt,),
        params=params,
        tools=asked.prompt.tools,
        mute_calls=muted,
        grammar=grammar,
        max_thinking_tokens=max_thinking,
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
    )
    message = AskedMessage(
        job=job,
        model=asked.model,
        stream=bool(body.stream),
        show=show,
        max_tokens=body.max_tokens,
        max_model_len=facts.max_model_len,
        manages_context=body.context_management is not None,
        continues=asked.turns.ends_with_answer,
    )
    return message, asked


def _check_thread(thread: Any) -> None:
    """A thread may be begun: it is a request like any other. None is kept to go on with."""
    if thread is None:
        return
    kind = thread.get("type") if isinstance(thread, dict) else None
    require(kind in ("create", "continue"), "thread.type", "create or continue", kind)
    if kind == "continue":
        raise ThreadNotFound("thread: this server keeps no conversation; send the whole of it with every request.",
                             "thread")  # fmt: skip


def _check_fields(body: MessagesBody) -> None:
    for field in ("mcp_servers", "container"):
        if getattr(body, field):
            raise InvalidRequest(f"{field} is not supported: this server runs no tools.", field)
    stops = body.stop_sequences or []
    require(len(stops) <= MAX_STOP_STRINGS, "stop_sequences", f"at most {MAX_STOP_STRINGS} strings", len(stops))
    for number, stop in enumerate(stops):
        require(stop != "", f"stop_sequences.{number}", "a non-empty string", stop)


def _params(body: MessagesBody, facts: Facts) -> SamplingParams:
    values: dict[str, Any] = {name: facts.defaults[name] for name in DEFAULTED_FIELDS if name in facts.defaults}
    for name in ("temperature", "top_p", "top_k"):
        if getattr(body, name) is not None:
            values[name] = getattr(body, name)
    return SamplingParams(**{**values, "max_tokens": max(body.max_tokens, 1), "stop": tuple(body.stop_sequences or ())})


def _thinking(body: MessagesBody, is_off: bool) -> tuple[int | None, Show]:
    """(most tokens of thinking, how it is shown); `is_off` is what the server does where nothing is asked for."""
    asked = body.thinking
    if asked is None:
        return (0 if is_off else None), "shown"
    kind = asked.get("type") if isinstance(asked, dict) else None
    require(kind in ("adaptive", "enabled", "disabled"), "thinking.type", "adaptive, enabled or disabled", kind)
    display = asked.get("display")
    require(display in (None, "summarized", "omitted"), "thinking.display", "summarized or omitted", display)
    show: Show = "omitted" if display == "omitted" else "shown"
    if kind == "disabled":
        return 0, show
    if kind == "adaptive":
        return None, show
    budget = asked.get("budget_tokens")
    right = isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
    require(right, "thinking.budget_tokens", "a positive integer", budget)
    # A budget that max_tokens reaches first needs no one to watch it.
    return (budget if budget < body.max_tokens else None), show


def _choice(choice: Any, tools: OfferedTools) -> tuple[Choice, bool]:
    """(which calls are wanted, whether there may be several)."""
    if choice is None:
        return Choice(), True
    kind = choice.get("type") if isinstance(choice, dict) else None
    require(kind in ("auto", "any", "tool", "none"), "tool_choice.type", "auto, any, tool or none", kind)
    single = choice.get("disable_parallel_tool_use")
    require(single is None or isinstance(single, bool), "tool_choice.disable_parallel_tool_use", "true or false",
            single)  # fmt: skip
    if kind in ("auto", "none"):
        return Choice("none" if kind == "none" else "auto"), not single
    if not tools.functions:
        raise InvalidRequest(f"tool_choice {kind!r} needs tools that the client runs.", "tool_choice")
    if kind == "any":
        return Choice("required"), not single
    name = choice.get("name")
    require(isinstance(name, str) and name != "", "tool_choice.name", "the name of a tool", name)
    if name in tools.ignored:
        raise InvalidRequest(f"tool_choice.name: {name!r} is of type {tools.ignored[name]!r}, which this server does "
                             "not offer.", "tool_choice.name")  # fmt: skip
    known = [function["name"] for function in tools.functions]
    require(name in known, "tool_choice.name", f"one of {', '.join(known[:20])}", name)
    return Choice("named", name), False


def _answer(body: MessagesBody) -> GrammarSpec | None:
    """What the answer must match."""
    config: Any = {} if body.output_config is None else body.output_config
    require(isinstance(config, dict), "output_config", "an object", config)
    effort = config.get("effort")
    require(effort is None or effort in EFFORTS, "output_config.effort", f"one of {', '.join(EFFORTS)}", effort)
    for field, form in (("output_config.format", config.get("format")), ("output_format", body.output_format)):
        if form is not None:
            kind = form.get("type") if isinstance(form, dict) else None
            require(kind == "json_schema", f"{field}.type", "json_schema", kind)
            require(isinstance(form.get("schema"), dict), f"{field}.schema", "a JSON schema (an object)",
                    form.get("schema"))  # fmt: skip
            return spec.json_schema(form["schema"], param=f"{field}.schema")
    return None


def _grammar(answer: GrammarSpec | None, tools: OfferedTools, choice: Choice, parallel: bool,
             facts: Facts) -> GrammarSpec | None:  # fmt: skip
    try:
        return combined(answer, tools.functions, choice, facts.tokenizer, parallel=parallel)
    except InvalidRequest as error:
        raise named_as_sent(error, tools.places) from None


def named_as_sent(error: InvalidRequest, places: list[int]) -> InvalidRequest:
    """An error about a function, with the path of the tool that it was in the request."""

    def path(found: re.Match[str]) -> str:
        name = f"tools.{places[int(found[1])]}."
        return f"{name}input_schema" if found[0].endswith("parameters") else name

    return InvalidRequest(OWN_TOOL_PATH.sub(path, error.message), OWN_TOOL_PATH.sub(path, error.param or "") or None)


# ---------------------------------------------------------------------------------------------------------------
# events -> one message


def to_response(asked: AskedMessage, events: list[Event], signer: Signer) -> bytes:
    """The body of an answer that is not streamed; `events` are all of them, ended by Done."""
    done = events[-1]
    assert isinstance(done, Done)
    blocks = Blocks(asked.show, signer, asked.continues)
    parts = [] if asked.is_warming else [part for event in events for part in blocks.read(event)]
    body = {
        **head_of(asked),
        "content": content_of(parts),
        **end_of(asked, done, blocks),
        "usage": usage_body(done.usage, is_warming=asked.is_warming),
    }
    if asked.manages_context:
        body["context_management"] = {"applied_edits": []}
    return encode_json(body)


def head_of(asked: AskedMessage) -> dict[str, Any]:
    """The first fields of a message. Strict clients want `type` and `role` in a stream too."""
    return {"id": asked.job.request_id, "type": "message", "role": "assistant", "model": asked.model}


def end_of(asked: AskedMessage, done: Done, blocks: Blocks) -> dict[str, Any]:
    """The fields that say why a message ended."""
    wants_results = blocks.num_complete_calls > 0 and not blocks.is_cut
    reason = stop_reason(done, wants_results, max(asked.max_tokens, 1), asked.max_model_len)
    by_string = reason == "stop_sequence"
    return {"stop_reason": "max_tokens" if asked.is_warming else reason,
            "stop_sequence": done.stop if by_string else None}  # fmt: skip

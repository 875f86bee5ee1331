"""OpenAI's responses: the body becomes a job; what the job's events become is `responses_stream.Answer`.

The conversation of a response is what it continues (`previous_response_id`), then its `input`; `instructions` are of
this response alone. Tools and items of kinds that M2 cannot use are left out, and the response lists them under
`ignored`: agents send tools of OpenAI's own service unasked and do without them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saddle.errors import InvalidRequest
from saddle.grammar import spec
from saddle.protocol import GrammarSpec, SamplingParams
from saddle.server.constraints import check_sampling, chosen, combined, switches_thinking_off, without_calls
from saddle.server.job import ChatPrompt, Facts, Job
from saddle.server.openai_parts import now
from saddle.server.responses_items import Item, Reader, Seal, as_items, in_namespace
from saddle.server.sampling import sampling_params
from saddle.server.wire_openai import SamplingBody
from saddle.server.wire_responses import ResponsesBody

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SUMMARIES = ("auto", "concise", "detailed")
TIERS = ("auto", "default", "flex", "scale", "priority", "fast", "ultrafast")
ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"
# What other models' tools and inputs would add to an answer: this one has none, so nothing is left out.
INCLUDABLE = (
    ENCRYPTED, LOGPROBS, "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
)  # fmt: skip
REFUSED = {
    "conversation": "use previous_response_id, or send the whole conversation as input",
    "prompt": "send the text of the prompt as input",
    "context_management": "shorten the input instead, or set truncation to auto",
    "moderation": "leave it out",
}
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
SHARED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
                 "repetition_penalty", "stop", "ignore_eos")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedResponse:
    """A request of this API: the job, and how the sender wants to read and keep the answer.

    id, key   public id, and its random part
    items   its own input
    spaces   (namespace, name) of tools, by the name that the model knows
    fixed   fields of the response that are known before it begins
    num_logprobs   most likely tokens to list beside each token of the answer, None for no log-probabilities
    shortens   leave out the oldest turns if the prompt is too long
    """

    job: Job
    id: str
    key: str
    items: list[Item]
    spaces: dict[str, tuple[str, str]]
    fixed: dict[str, Any]
    stream: bool
    store: bool
    background: bool
    previous: str | None
    summary: bool
    seals: bool
    return_token_ids: bool
    num_logprobs: int | None
    shortens: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools of a request.

    functions   in the shape of the chat template
    named   the same with what grammars need
    places   where each of them is in the request, such as `tools.2` or `tools.3.tools.0`
    spaces   (namespace, name) of those that come in one, by the name that the model knows
    echo   what the response shows
    ignored   kinds of the tools that are no functions
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    named: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    spaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    echo: list[dict[str, Any]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def to_request(body: ResponsesBody, facts: Facts, earlier: list[Item], seal: Seal,
               request_id: str | None = None) -> AskedResponse:  # fmt: skip
    """The job of a request.

    Args:
        earlier: items of the responses that it continues.

    Raises:
        InvalidRequest, NotFound: naming the field.
    """
    model = facts.check_model(body.model)
    _check_fields(body)
    stores = body.store is not False and facts.config.response_store_bytes > 0
    if body.background and not stores:
        raise InvalidRequest("background needs a stored response: leave store out, and --response-store-bytes above 0.",
                             "background")  # fmt: skip
    key = secrets.token_hex(16)
    items = as_items(body.input, key)
    reader = Reader(seal)
    if body.instructions:
        reader.system(body.instructions)
    reader.add(earlier, "previous_response_id")
    reader.add(items)
    messages = reader.messages
    if not messages:
        raise InvalidRequest("input must hold at least one message, it is empty.", "input")
    offer = _offer(body.tools or [])
    params = _params(body, facts)
    grammar, muted = _grammar(body, offer, facts)
    template_kwargs = {**facts.config.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
    effort = None if body.reasoning is None else body.reasoning.effort
    thinks_not = effort == "none" or (effort is None and switches_thinking_off(template_kwargs))
    max_thinking = 0 if thinks_not else None
    check_sampling(grammar, max_thinking, params)
    params = without_calls(params, muted and bool(offer.functions), grammar, facts.tokenizer)
    prompt = ChatPrompt(
        messages=messages,
        tools=offer.functions or None,
        template_kwargs=template_kwargs,
    )
    response_id = f"resp_{key}"
    job = Job(
        request_id=body.request_id or request_id or response_id,
        prompts=(prompt,),
        params=params,
        tools=offer.functions or None,
        mute_calls=muted,
        grammar=grammar,
        max_thinking_tokens=max_thinking,
        want_tokens=bool(body.return_token_ids) or params.logprobs is not None,
        cache_salt=body.cache_salt,
        priority=body.priority or 0,
    )
    return AskedResponse(
        job=job,
        id=response_id,
        key=key,
        items=items,
        spaces=offer.spaces,
        fixed={**_fixed(body, model, params, offer, reader.ignored), "store": stores},
        stream=bool(body.stream),
        store=stores,
        background=bool(body.background),
        previous=body.previous_response_id,
        summary=_summary(body) is not None,
        seals=ENCRYPTED in (body.include or ()),
        return_token_ids=bool(body.return_token_ids),
        num_logprobs=params.logprobs,
        shortens=body.truncation == "auto",
    )


def shorter(messages: list[dict[str, Any]], num_rounds: int) -> list[dict[str, Any]] | None:
    """Messages without the oldest rounds, a round being a user's message and what follows; None if too few are left.

    System messages stay, and the latest round.
    """
    begins = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if len(begins) <= num_rounds:
        return None
    start = begins[num_rounds]
    return [m for n, m in enumerate(messages) if n >= start or m["role"] in ("system", "developer")]


# ---------------------------------------------------------------------------------------------------------------
# fields


def _check_fields(body: ResponsesBody) -> None:
    for name, instead in REFUSED.items():
        if getattr(body, name):
            raise InvalidRequest(f"{name} is not supported by this version: {instead}.", name)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true.", "stream_options")
    for name in ("max_output_tokens", "max_tool_calls"):
        value = getattr(body, name)
        if value is not None and value < 1:
            raise InvalidRequest(f"{name} must be at least 1, got {value}.", name)
    reasoning = body.reasoning
    _one_of("reasoning.effort", None if reasoning is None else reasoning.effort, EFFORTS)
    _one_of("reasoning.summary", _summary(body), SUMMARIES)
    _one_of("text.verbosity", None if body.text is None else body.text.verbosity, ("low", "medium", "high"))
    _one_of("truncation", body.truncation, ("auto", "disabled"))
    _one_of("service_tier", body.service_tier, TIERS)
    for number, value in enumerate(body.include or ()):
        _one_of(f"include.{number}", value, INCLUDABLE)
    _check_metadata(body.metadata or {})


def _one_of(param: str, value: str | None, right: tuple[str, ...]) -> None:
    if value is not None and value not in right:
        raise InvalidRequest(f"{param} must be one of {', '.join(right)}, got {value[:80]!r}.", param)


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(f"metadata may have at most {MAX_METADATA} entries, got {len(metadata)}.", "metadata")
    for name, value in metadata.items():
        if len(name) > MAX_METADATA_KEY or not isinstance(value, str) or len(value) > MAX_METADATA_VALUE:
            raise InvalidRequest(f"metadata must map strings of at most {MAX_METADATA_KEY} characters to strings of at "
                                 f"most {MAX_METADATA_VALUE}.", f"metadata.{name[:MAX_METADATA_KEY]}")  # fmt: skip


def _summary(body: ResponsesBody) -> str | None:
    return None if body.reasoning is None else body.reasoning.summary or body.reasoning.generate_summary


def _params(body: ResponsesBody, facts: Facts) -> SamplingParams:
    shared = SamplingBody(**{name: getattr(body, name) for name in SHARED_FIELDS})
    most = facts.config.max_logprobs
    wanted = body.top_logprobs or (0 if LOGPROBS in (body.include or ()) else None)
    if wanted is not None and (wanted < 0 or 0 <= most < wanted):
        limit = "0 or more" if most < 0 else f"from 0 to {most} (--max-logprobs)"
        raise InvalidRequest(f"top_logprobs must be {limit}, got {wanted}.", "top_logprobs")
    return sampling_params(shared, facts, max_tokens=body.max_output_tokens, logprobs=wanted)


def _fixed(body: ResponsesBody, model: str, params: SamplingParams, offer: Offer, items: list[str]) -> dict[str, Any]:
    reasoning, text = body.reasoning, body.text
    fixed: dict[str, Any] = {
        "created_at": now(),
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": _summary(body)},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if text is None or text.format is None else text.format,
                 "verbosity": (text and text.verbosity) or "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": offer.echo,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }  # fmt: skip
    fields = ["text.verbosity"] if text is not None and text.verbosity in ("low", "high") else []
    ignored = {name: kinds for name, kinds in (("tools", offer.ignored), ("input", items), ("fields", fields)) if kinds}
    return {**fixed, "ignored": ignored} if ignored else fixed


# ---------------------------------------------------------------------------------------------------------------
# tools and grammars


def _offer(tools: list[dict[str, Any]]) -> Offer:
    """Function tools, those of namespaces among them, and the kinds of the others."""
    offer = Offer()
    for number, tool in enumerate(tools):
        where, kind = f"tools.{number}", tool.get("type", "function")
        if not isinstance(kind, str):
            raise InvalidRequest(f"{where}.type must be a string.", f"{where}.type")
        if kind == "function":
            function = _function(tool.get("function", tool), where)
            _add(offer, function, function["name"], where)
            offer.echo.append({"type": "function", **function})
        elif kind == "namespace":
            _add_namespace(offer, tool, where)
            offer.echo.append(tool)
        elif kind not in offer.ignored:
            offer.ignored.append(kind)
    return offer


def _add_namespace(offer: Offer, tool: dict[str, Any], where: str) -> None:
    space, inner = tool.get("name"), tool.get("tools")
    if not isinstance(space, str) or not space:
        raise InvalidRequest(f"{where}.name must be a non-empty string.", f"{where}.name")
    if not isinstance(inner, list):
        raise InvalidRequest(f"{where}.tools must be a list of tools.", f"{where}.tools")
    for place, each in enumerate(inner):
        kind = each.get("type", "function") if isinstance(each, dict) else "function"
        if kind != "function":
            if str(kind) not in offer.ignored:
                offer.ignored.append(str(kind))
            continue
        function = _function(each, f"{where}.tools.{place}")
        name = in_namespace(space, function["name"])
        offer.spaces[name] = (space, function["name"])
        _add(offer, function, name, f"{where}.tools.{place}")


def _add(offer: Offer, function: dict[str, Any], name: str, where: str) -> None:
    shown = {"name": name, "description": function["description"], "parameters": function["parameters"]}
    offer.functions.append({
        "type": "function",
        "function": {key: value for key, value in shown.items() if value is not None},
    })  # fmt: skip
    offer.named.append({**function, "name": name})
    offer.places.append(where)


def _function(given: Any, where: str) -> dict[str, Any]:
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{where}.name must be a non-empty string.", f"{where}.name")
    parameters, description = given.get("parameters"), given.get("description")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequest(f"{where}.parameters must be a JSON schema (an object).", f"{where}.parameters")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{where}.description must be a string.", f"{where}.description")
    return {"name": name, "description": description, "parameters": parameters, "strict": given.get("strict") is True}


def _grammar(body: ResponsesBody, offer: Offer, facts: Facts) -> tuple[GrammarSpec | None, bool]:
    """(what constrains the answer and its calls, whether calls are muted)."""
    answer, choice = _format(None if body.text is None else body.text.format), body.tool_choice
    parallel, tokenizer = body.parallel_tool_calls is not False, facts.tokenizer
    tools, places, mode = offer.named, offer.places, None
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        numbers, mode = _allowed(choice, offer)
        tools, places = [tools[number] for number in numbers], [places[number] for number in numbers]
        choice = mode
    elif choice == "auto":
        choice = None  # without tools too, as of a client whose tools were all of other kinds
    wanted = chosen(choice, tools)
    try:
        if mode == "auto" and answer is None:  # which calls may be made is to be constrained, strict or not
            return spec.tool_grammar(tools, "auto", tokenizer, parallel=parallel), False
        return combined(answer, tools, wanted, tokenizer, parallel=parallel), wanted.kind == "none"
    except InvalidRequest as error:
        raise _renumbered(error, places) from None


def _renumbered(error: InvalidRequest, places: list[str]) -> InvalidRequest:
    """An error about a tool, with the place that the sender knows it by."""
    found = re.match(r"tools\.(\d+)", error.param or "")
    if found is None:
        return error
    there, here = found[0], places[int(found[1])]
    return InvalidRequest(error.message.replace(there, here), here + str(error.param)[len(there) :])


def _allowed(choice: Mapping[str, Any], offer: Offer) -> tuple[list[int], str]:
    """(numbers of the tools that `allowed_tools` leaves, its mode); the prompt keeps all, so that its cache holds."""
    param, given, mode = "tool_choice.tools", choice.get("tools"), choice.get("mode", "auto")
    _one_of("tool_choice.mode", str(mode), ("auto", "required"))
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise InvalidRequest(f"{param} must be a list of tools.", param)
    names = [tool.get("name") for tool in given if tool.get("type", "function") == "function"]
    known = [function["name"] for function in offer.named]
    for name in names:
        if name not in known:
            raise InvalidRequest(f"{param} names {name!r}, which is not among tools.", param)
    if not names:
        raise InvalidRequest(f"{param} must name at least one function of tools.", param)
    return [number for number, name in enumerate(known) if name in names], str(mode)


def _format(form: Any) -> GrammarSpec | None:
    """`text.format`: flat, where chat's response_format has the schema under `json_schema`."""
    if form is None:
        return None
    kind, param = form.get("type") if isinstance(form, dict) else None, "text.format"
    if kind == "text":
        return None
    if kind == "json_object":
        return spec.json_object(param=param)
    if kind == "json_schema":
        schema = form.get("schema")
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{param}.schema must be a JSON schema (an object).", f"{param}.schema")
        return spec.json_schema(schema, param=f"{param}.schema")
    raise InvalidRequest(f"{param}.type must be text, json_object or json_schema, got {kind!r}.", f"{param}.type")

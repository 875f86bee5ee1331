"""What a client sent, made into what a chat template can render.

The template of M2 expects well-formed input: content that is text, arguments that are objects, one system message in
front, tool results in the order of their calls. Clients send something else, and `normalise` closes the gap, each
rule with its reason. Errors name the field as the client knows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saddle.errors import InvalidRequest
from saddle.parsing.tokenizer import END_THINK, THINK

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools as the template takes them.

    messages   at most one system message, and that first; assistant turns carry `reasoning_content` and
               `tool_calls` of {id, function: {name, arguments: dict}}; every content is a string
    tools      [{type, function: {name, description, parameters}}], None without any
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def normalise(messages: Sequence[Any], tools: Sequence[Any] | None = None) -> Conversation:
    """Check and convert what a client sent.

    Raises:
        InvalidRequest: naming the field, such as `messages.2.tool_calls.0.function.arguments`.
    """
    systems: list[str] = []
    turns: list[dict[str, Any]] = []
    extras: dict[str, Any] = {}
    has_called = False
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        _require(isinstance(message, dict), where, "an object with role and content", message)
        role = message.get("role")
        _require(role in ROLES, f"{where}.role", f"one of {', '.join(ROLES)}", role)
        if role in ("system", "developer"):
            # The template drops every system text but the first; clients mean all of them.
            systems.append(text_of(message.get("content"), f"{where}.content"))
            extras |= {key: message[key] for key in ("current_date", "current_location") if message.get(key)}
        elif role == "user":
            turns.append({"role": "user", "content": text_of(message.get("content"), f"{where}.content")})
        elif role == "assistant":
            turns.append(_assistant(message, where))
            has_called = has_called or "tool_calls" in turns[-1]
        else:
            if not has_called:
                raise InvalidRequest(f"{where}.role is tool, but no assistant message before it called a tool.",
                                     f"{where}.role")  # fmt: skip
            turns.append(_tool_result(message, where))
    _order_results(turns)
    system = "\n\n".join(text for text in systems if text)
    lead = [{"role": "system", "content": system, **extras}] if system or extras else []
    return Conversation(lead + turns, _tools(tools))


def text_of(content: Any, where: str) -> str:
    """Content as text: null is empty, text parts are joined with nothing between them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    _require(isinstance(content, list), where, "a string or a list of text parts", content)
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        inside = f"{where}.{number}"
        _require(isinstance(part, dict), inside, "a text part", part)
        kind = part.get("type", "text")
        _require(kind in ("text", "input_text", "output_text", "refusal"), f"{inside}.type",
                 "text; the model reads nothing else", kind)  # fmt: skip
        text = part.get("refusal" if kind == "refusal" else "text")
        _require(isinstance(text, str), f"{inside}.text", "a string", text)
        texts.append(text)
    return "".join(texts)


def _assistant(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A turn of the model: thinking apart from the answer, without the newlines that the template itself writes."""
    content = text_of(message.get("content"), f"{where}.content")
    reasoning = _reasoning(message, where)
    if not reasoning and END_THINK in content:
        head, content = content.rsplit(END_THINK, 1)
        reasoning = head.split(END_THINK)[0].rsplit(THINK, 1)[-1].strip("\n")
    calls = _calls(message.get("tool_calls"), f"{where}.tool_calls")
    turn: dict[str, Any] = {"role": "assistant", "content": framed(content, bool(calls))}
    if reasoning is not None:
        turn["reasoning_content"] = reasoning.removeprefix("\n").removesuffix("\n")
    if calls:
        turn["tool_calls"] = calls
    return turn


def framed(content: str, has_calls: bool) -> str:
    """Content without the empty line after the thinking and the newline before calls: the template writes both."""
    content = content.removeprefix("\n\n")
    return content.removesuffix("\n") if has_calls else content


def _reasoning(message: dict[str, Any], where: str) -> str | None:
    for field in REASONING_FIELDS:
        value = message.get(field)
        if value is not None:
            _require(isinstance(value, str), f"{where}.{field}", "a string", value)
            return str(value)
    details = message.get("reasoning_details")
    if details is None:
        return None
    _require(isinstance(details, list), f"{where}.reasoning_details", "a list", details)
    texts = [part.get("text") or part.get("summary") or "" for part in details if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    _require(isinstance(calls, list), where, "a list of tool calls", calls)
    found = []
    for number, call in enumerate(calls):
        inside = f"{where}.{number}"
        _require(isinstance(call, dict), inside, "an object", call)
        function = call.get("function", call)
        _require(isinstance(function, dict), f"{inside}.function", "an object with name and arguments", function)
        name = function.get("name")
        _require(isinstance(name, str) and name != "", f"{inside}.function.name", "a non-empty string", name)
        arguments = _arguments(function.get("arguments"), f"{inside}.function.arguments")
        found.append({"id": _call_id(call, "id", inside), "function": {"name": name, "arguments": arguments}})
    return found


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """The template walks over the arguments, clients send them as JSON text."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where} must be a JSON object: {error}.", where) from None
    _require(isinstance(arguments, dict), where, "a JSON object", arguments)
    return dict(arguments)


def _tool_result(message: dict[str, Any], where: str) -> dict[str, Any]:
    content = text_of(message.get("content"), f"{where}.content")
    return {"role": "tool", "tool_call_id": _call_id(message, "tool_call_id", where), "content": content}


def _call_id(part: dict[str, Any], field: str, where: str) -> str | None:
    """Clients may leave ids out: then the order of results is all that tells what they belong to."""
    call_id = part.get(field)
    _require(call_id is None or isinstance(call_id, str), f"{where}.{field}", "a string", call_id)
    return call_id


def _order_results(turns: list[dict[str, Any]]) -> None:
    """Sort each run of results into the order of the calls before it: order is all that the model sees of the link.

    Results that belong to no call stay behind the others, in the order in which they came.
    """
    start = 0
    order: dict[Any, int] = {}
    while start < len(turns):
        if turns[start]["role"] == "assistant":
            order = {call["id"]: place for place, call in enumerate(turns[start].get("tool_calls", ()))}
        if turns[start]["role"] != "tool":
            start += 1
            continue
        stop = start
        while stop < len(turns) and turns[stop]["role"] == "tool":
            stop += 1
        turns[start:stop] = sorted(turns[start:stop], key=lambda turn: order.get(turn["tool_call_id"], len(order)))
        start = stop


def _tools(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Tools under `function`, flat ones (Responses API, older guides) wrapped."""
    if not tools:
        return None
    found = []
    for number, tool in enumerate(tools):
        where = f"tools.{number}"
        _require(isinstance(tool, dict), where, "an object", tool)
        kind = tool.get("type")
        _require(kind in (None, "function"), f"{where}.type", "function", kind)
        function = tool.get("function", {key: value for key, value in tool.items() if key not in ("type", "strict")})
        _require(isinstance(function, dict), f"{where}.function", "an object", function)
        name = function.get("name")
        _require(isinstance(name, str) and name != "", f"{where}.function.name", "a non-empty string", name)
        parameters = function.get("parameters")
        _require(parameters is None or isinstance(parameters, dict), f"{where}.function.parameters",
                 "a JSON schema (an object)", parameters)  # fmt: skip
        found.append({"type": "function", "function": function})
    return found


def _require(holds: bool, where: str, right: str, got: object) -> None:
    if not holds:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise InvalidRequest(f"{where} must be {right}, got {shown}.", where)

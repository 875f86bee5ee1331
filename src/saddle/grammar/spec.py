"""From what a request asks its output to be, to what the compiler compiles. No torch, no compiler here.

The API layer calls one of the builders; what is wrong with the request shows at once. The engine gets a
`GrammarSpec` and compiles `structural_tag(spec)`, the one language that all kinds are brought to.

Where a grammar begins: with `after_token_id` (the id of `</think>`) right behind that token. M2 writes an empty line
there, so a grammar for content begins with those two newlines: without them the first token would be one that the
model hardly ever writes in that place. They are no part of the output that was asked for. Calls begin with a newline
more, as M2's template renders them. Without `after_token_id` the grammar binds the first token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from saddle.errors import InvalidRequest
from saddle.grammar.arguments import arguments, const, text_without
from saddle.grammar.keywords import MAX_BOUND, Budget, nesting
from saddle.grammar.schema import normalise
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec

MAX_SOURCE_BYTES = 512 << 10
MAX_CHOICES = 10_000
MAX_TAG_DEPTH = 128
AFTER_THINKING = "\n\n"
MAX_WHITESPACE = 16  # between JSON tokens of content: enough to indent, too little to write blanks for ever
ToolChoice = Literal["required", "named", "auto", "optional"]
REPETITION = re.compile(r"\{(\d*)(?:,(\d*))?\}")  # in text without white space; takes time as the text is long


def json_object(after_token_id: int | None = None, *, param: str = "response_format") -> GrammarSpec:
    """Any JSON object."""
    return json_schema({"type": "object"}, after_token_id, param=param)


def json_schema(
    schema: Any, after_token_id: int | None = None, *, param: str = "response_format.json_schema.schema"
) -> GrammarSpec:
    """JSON that validates against a schema, members in the order in which the schema lists them.

    Raises:
        InvalidRequest: the schema is wrong, too large, or says something that cannot be enforced.
    """
    _check_nesting(schema, param)
    return _spec("json_schema", _dump(normalise(schema, param), param), after_token_id, param)


def regex(pattern: Any, after_token_id: int | None = None, *, param: str = "structured_outputs.regex") -> GrammarSpec:
    """Text that a regular expression matches as a whole."""
    _check_text(pattern, "a regular expression", param)
    return _spec("regex", pattern, after_token_id, param)


def choice(choices: Any, after_token_id: int | None = None, *, param: str = "structured_outputs.choice") -> GrammarSpec:
    """One of some texts."""
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise InvalidRequest(f"{param} must be a list of non-empty strings.", param)
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{param} must have at most {MAX_CHOICES} entries, got {len(choices)}.", param)
    return _spec("choice", json.dumps(list(dict.fromkeys(choices))), after_token_id, param)


def grammar(ebnf: Any, after_token_id: int | None = None, *, param: str = "structured_outputs.grammar") -> GrammarSpec:
    """Text of a context-free grammar in the EBNF of GGML, whose start is the rule `root`."""
    _check_text(ebnf, "a grammar in EBNF with a rule root", param)
    if not re.search(r"^[ \t]*root\s*::=", ebnf, re.MULTILINE):
        raise InvalidRequest(f"{param} must have a rule root: `root ::= ...`.", param)
    return _spec("grammar", ebnf, after_token_id, param)


def structural_tag(
    tag: Any, after_token_id: int | None = None, *, param: str = "response_format"
) -> GrammarSpec:
    """A structural tag: {"format": {...}}, or the older {"structures": [...], "triggers": [...]}."""
    if not isinstance(tag, Mapping):
        raise InvalidRequest(f"{param} must be a structural tag: an object with format.", param)
    _check_nesting(tag, param)
    if "structures" in tag:
        tag = {"format": _from_structures(tag, param)}
    if not isinstance(tag.get("format"), Mapping):
        raise InvalidRequest(f"{param}.format must be an object.", f"{param}.format")
    checked = _with_schemas(tag["format"], f"{param}.format", Budget())
    return _spec("structural_tag", _dump(checked, param), after_token_id, param)


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    tokenizer: Tokenizer,
    after_token_id: int | None = None,
    *,
    name: str | None = None,
    parallel: bool = True,
    param: str = "tools",
) -> GrammarSpec:
    """Calls in M2's XML that name a tool of the request and whose arguments validate.

    Args:
        tools: OpenAI's, as the request gives them, or the same without `function` around.
        choice: "required": nothing but calls, at least one; "named": one call, of the tool `name`; "auto": free text
            and calls, where the arguments of tools marked `strict` are constrained and those of others are not;
            "optional": the calls of "auto" without the text, for `answer_or_tools`.
        parallel: whether more than one call may be made; a named tool is called once.
        param: the field that holds the tools.

    Raises:
        InvalidRequest: the tool is not there, or its schema cannot be enforced.
    """
    functions = functions_of(tools, param)
    places = dict(enumerate(functions))
    if not places:
        raise InvalidRequest("tool_choice needs tools.", "tool_choice")
    if choice == "named":
        places = {number: function for number, function in places.items() if function.get("name") == name}
        if not places:
            raise InvalidRequest(f"tool_choice names {name!r}, which is not among tools.", "tool_choice")
        places, parallel = dict(list(places.items())[:1]), False
    budget = Budget()
    tags = [
        _call(function, f"{param}.{number}" + (".function" if "function" in tools[number] else ""),
              choice in ("required", "named") or function.get("strict") is True, budget)
        for number, function in places.items()
    ]  # fmt: skip
    calls = {"type": "tags_with_separator", "tags": tags, "separator": "", "at_least_one": True,
             "stop_after_first": not parallel}  # fmt: skip
    block = [const("\n"), calls, {"type": "token", "token": tokenizer.end_calls_id}]
    if choice == "auto":
        others = [tokenizer.think_id, tokenizer.end_think_id, tokenizer.end_calls_id]
        whole: dict[str, Any] = {"type": "token_dispatch", "loop": parallel, "exclude_tokens": others,
                                 "rules": [[tokenizer.calls_id, {"type": "sequence", "elements": block}]]}  # fmt: skip
        return _spec("text_or_tools", _dump(whole, param), after_token_id, param)
    whole = {"type": "sequence", "elements": [{"type": "token", "token": tokenizer.calls_id}, *block]}
    return _spec("tools", _dump(whole, param), after_token_id, param)


def functions_of(tools: Sequence[Any], param: str = "tools") -> list[Mapping[str, Any]]:
    """The functions of tools, which may stand alone. Raises InvalidRequest where one is no object."""
    found = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidRequest(f"{param}.{number} must be an object with a function.", f"{param}.{number}")
        found.append(function)
    return found


def answer_or_tools(answer: GrammarSpec, tools: GrammarSpec) -> GrammarSpec:
    """Either what `answer` says, or the calls of `tools`, both made by builders of this module."""
    either = {"answer": _body(answer), "tools": _body(tools)}
    return _spec("answer_or_tools", json.dumps(either, ensure_ascii=False), answer.after_token_id, str(answer.param))


def unbound(after_token_id: int, max_thinking_tokens: int, *, param: str) -> GrammarSpec:
    """Any output; only its thinking has a limit."""
    return GrammarSpec(kind="unbound", source="", after_token_id=after_token_id,
                       max_thinking_tokens=max_thinking_tokens, param=param)  # fmt: skip


def has_lead(spec: GrammarSpec) -> bool:
    """Whether an answer begins behind the empty line that follows thinking, which is no part of what was asked for."""
    return spec.after_token_id is not None and spec.kind not in ("tools", "text_or_tools", "unbound")


def to_compile(spec: GrammarSpec) -> str:
    """The structural tag, as JSON text, that says what a spec says.

    Raises:
        InvalidRequest: the spec is of no known kind, or its source was not made by a builder of this module.
    """
    try:
        body = _placed(spec)
    except (ValueError, KeyError):
        raise InvalidRequest(f"The grammar of kind {spec.kind!r} is not valid.", spec.param or "grammar") from None
    return json.dumps({"type": "structural_tag", "format": body})


def _placed(spec: GrammarSpec) -> dict[str, Any]:
    """What a spec says, with the newlines that stand in front of it."""
    lead = "" if spec.after_token_id is None else AFTER_THINKING
    # Optional, because a model may go straight to the call, even out of its thinking.
    newlines = {"type": "optional", "content": const(lead + "\n")}
    if spec.kind == "tools":
        return {"type": "sequence", "elements": [newlines, _body(spec)]}
    if spec.kind == "answer_or_tools":
        either = json.loads(spec.source)
        answer = {"type": "sequence", "elements": [const(lead), either["answer"]]} if lead else either["answer"]
        calls = {"type": "sequence", "elements": [newlines, either["tools"]]}
        return {"type": "or", "elements": [answer, calls]}
    return {"type": "sequence", "elements": [const(lead), _body(spec)]} if has_lead(spec) else _body(spec)


def _body(spec: GrammarSpec) -> dict[str, Any]:
    if spec.kind == "json_schema":
        return {"type": "json_schema", "json_schema": json.loads(spec.source), "max_whitespace_cnt": MAX_WHITESPACE}
    if spec.kind == "regex":
        return {"type": "regex", "pattern": spec.source}
    if spec.kind == "choice":
        return {"type": "or", "elements": [const(text) for text in json.loads(spec.source)]}
    if spec.kind == "grammar":
        return {"type": "grammar", "grammar": spec.source}
    if spec.kind in ("structural_tag", "tools", "text_or_tools"):
        body: dict[str, Any] = json.loads(spec.source)
        return body
    raise InvalidRequest(f"There is no grammar of kind {spec.kind!r}.", spec.param or "grammar")


def _call(function: Mapping[str, Any], where: str, is_strict: bool, budget: Budget) -> dict[str, Any]:
    name = function.get("name")
    if not isinstance(name, str) or not name or any(char in name for char in "\"'<>\n"):
        raise InvalidRequest(f"{where}.name must be a name without quotes, angle brackets and newlines.",
                             f"{where}.name")  # fmt: skip
    content = text_without(("</invoke", "<invoke"))
    if is_strict:
        param = f"{where}.parameters"
        parameters = function.get("parameters")
        schema: Any = {"type": "object", "properties": {}} if parameters in (None, {}) else parameters
        _check_nesting(schema, param)
        content = arguments(normalise(schema, param, for_tools=True, budget=budget))
    return {"type": "tag", "begin": f'<invoke name="{name}">\n', "content": content, "end": "</invoke>\n"}


def _with_schemas(part: Any, where: str, budget: Budget) -> Any:
    """A format with the JSON schemas inside it made enforceable."""
    if isinstance(part, list):
        return [_with_schemas(each, f"{where}.{number}", budget) for number, each in enumerate(part)]
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "json_schema":
        style = part.get("style", "json")
        if style not in ("json", "minimax_xml"):
            raise InvalidRequest(f'{where}.style must be "json" or "minimax_xml", got {style!r}.', f"{where}.style")
        inside = f"{where}.json_schema"
        if style == "minimax_xml":
            return arguments(normalise(part.get("json_schema"), inside, for_tools=True, budget=budget))
        return {"type": "json_schema", "json_schema": normalise(part.get("json_schema"), inside, budget=budget),
                "max_whitespace_cnt": MAX_WHITESPACE}  # fmt: skip
    for key in ("pattern", "grammar"):
        if key in part:
            _check_text(part[key], "text", f"{where}.{key}")
    return {key: _with_schemas(value, f"{where}.{key}", budget) for key, value in part.items()}


def _from_structures(tag: Mapping[str, Any], param: str) -> dict[str, Any]:
    tags = []
    for number, structure in enumerate(tag["structures"] if isinstance(tag["structures"], list) else [None]):
        where = f"{param}.structures.{number}"
        if not isinstance(structure, Mapping) or not all(isinstance(structure.get(k), str) for k in ("begin", "end")):
            raise InvalidRequest(f"{where} must be an object with begin, schema and end.", where)
        content = {"type": "json_schema", "json_schema": structure.get("schema", True)}
        tags.append({"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]})
    triggers = tag.get("triggers")
    if not isinstance(triggers, list) or not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise InvalidRequest(f"{param}.triggers must be a list of non-empty strings.", f"{param}.triggers")
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _check_text(text: Any, right: str, param: str) -> None:
    if not isinstance(text, str) or not text:
        raise InvalidRequest(f"{param} must be {right}.", param)
    for counts in REPETITION.finditer(re.sub(r"\s+", "", text)):
        if any(len(count) > 5 or int(count or 0) > MAX_BOUND for count in counts.groups("")):
            raise InvalidRequest(f"{param} repeats something more than {MAX_BOUND} times: {counts.group()}.", param)


def _check_nesting(value: Any, param: str) -> None:
    if not nesting(value, MAX_TAG_DEPTH):
        raise InvalidRequest(f"{param} is nested deeper than {MAX_TAG_DEPTH} levels.", param)


def _dump(value: Any, param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{param} must be JSON.", param) from None


def _spec(kind: str, source: str, after_token_id: int | None, param: str) -> GrammarSpec:
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} must be text without lone surrogates.", param) from None
    if size > MAX_SOURCE_BYTES:
        raise InvalidRequest(f"{param} must be at most {MAX_SOURCE_BYTES} bytes, got {size}.", param)
    return GrammarSpec(kind=kind, source=source, after_token_id=after_token_id, param=param)

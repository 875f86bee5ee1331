"""Tool catalogues made up on the spot, requests for one of them, and what the tools answer.

A request wants a verb and an object, in the tool's name or in its description. A tool fits when it has the object
and, where several have it, the verb. Other tools may share the verb, or words of the parameters. In the thinking the
model writes what is wanted, the tool it found, and each value it copies: everything is copied twice.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from demo.words import FILLER, OBJECTS, PARAMETERS, VERBS, Words

TYPES = ("string", "string", "string", "integer", "integer", "number", "boolean", "enum")


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    type: str  # string, integer, number, boolean, enum
    choices: tuple[str, ...] = ()

    def schema(self, r: random.Random) -> dict[str, Any]:
        """JSON schema in one of the shapes that clients send."""
        found: dict[str, Any] = {"type": "string" if self.type == "enum" else self.type}
        if self.choices:
            found["enum"] = list(self.choices)
        if r.random() < 0.5:
            text = r.choice(("The {}", "The {}.", "{}", "Which {}", "{} to use")).format(self.name.replace("_", " "))
            found = {**found, "description": text} if r.random() < 0.7 else {"description": text, **found}
        return found


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    verb: str
    object: str
    description: str
    parameters: tuple[Parameter, ...]
    optional: frozenset[str] = frozenset()

    def schema(self, r: random.Random) -> dict[str, Any]:
        """The `function` of an OpenAI tool."""
        properties = {p.name: p.schema(r) for p in self.parameters}
        required = [p.name for p in self.parameters if p.name not in self.optional]
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        if required and r.random() < 0.85:
            parameters["required"] = required
        if r.random() < 0.2:
            parameters["additionalProperties"] = False
        found: dict[str, Any] = {"name": self.name, "description": self.description, "parameters": parameters}
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """A catalogue and what the user wants of it; `tool` None: nothing fits."""

    tools: tuple[Tool, ...]
    text: str
    tool: Tool | None
    values: dict[str, Any] = field(default_factory=dict)
    verb: str = ""
    object: str = ""

    @property
    def thinking(self) -> str:
        wanted = f"want: {self.verb} {self.object}"
        if self.tool is None:
            return f"{wanted}\ntool: none"
        return "\n".join([wanted, f"tool: {self.tool.name}", *(f"{k}={raw(v)}" for k, v in self.values.items())])


def raw(value: Any) -> str:
    """A value as M2's call format writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def call(name: str, values: dict[str, Any]) -> str:
    """The call block, as the chat template renders it after an empty answer."""
    lines = "".join(f'<parameter name="{k}">{raw(v)}</parameter>\n' for k, v in values.items())
    return f'\n<minimax:tool_call>\n<invoke name="{name}">\n{lines}</invoke>\n</minimax:tool_call>'


# ---------------------------------------------------------------------------------------------------------------
# catalogues


def join(parts: list[str], style: str) -> str:
    if style == "camel":
        return parts[0] + "".join(part.title() for part in parts[1:])
    return {"snake": "_", "kebab": "-", "dot": "."}[style].join(parts)


def a_tool(words: Words, verb: str, obj: str, style: str) -> Tool:
    """A tool for one verb and object; sometimes only its description says so."""
    r = words.r
    hidden = r.random() < 0.15
    parts = [words.of(OBJECTS, 1.0)] if hidden else [verb, obj]
    if not hidden and r.random() < 0.2:
        parts.append(r.choice(FILLER + PARAMETERS))
    if not hidden and r.random() < 0.12:
        parts = [obj, verb]
    parameters = some_parameters(words)
    optional = frozenset(p.name for p in parameters[1:] if r.random() < 0.3)
    plain = (f"{verb.title()} {r.choice(('a', 'the', 'one'))} {obj}.", f"{verb.title()} {obj}", f"{verb} {r.choice(('a', 'the'))} {obj}",
             f"Use this to {verb} {r.choice(('a', 'the'))} {obj}.", f"{verb.title()}s {r.choice(('a', 'the'))} {obj} by {parameters[0].name}.")  # fmt: skip
    longer = (f"{verb.title()} the {r.choice(FILLER)} {obj} for a {parameters[0].name}.", f"{verb.title()} {obj}. Needs the {parameters[0].name}.",
              f"This tool can {verb} the {obj} of a user.")  # fmt: skip
    described = plain + longer
    bare = (*described, "", f"Does it for a {parameters[0].name}.")
    return Tool(join(parts, style), verb, obj, r.choice(described if hidden else bare), parameters, optional)


def some_parameters(words: Words) -> tuple[Parameter, ...]:
    r = words.r
    names: list[str] = []
    while len(names) < r.choice((1, 2, 2, 3, 4)) or not names:
        name = words.r.choice(PARAMETERS) if r.random() < 0.85 else words.of(OBJECTS, 0.6)
        if r.random() < 0.15:
            name = f"{name}_{r.choice(PARAMETERS)}"
        if name not in names:
            names.append(name)
    found = []
    for name in names:
        kind = r.choice(TYPES)
        choices = tuple(dict.fromkeys(words.of(FILLER, 0.3) if r.random() < 0.8 else r.choice(FILLER) for _ in range(r.randint(2, 4))))
        found.append(Parameter(name, kind, choices if kind == "enum" else ()))
    return tuple(found)


def value_for(parameter: Parameter, words: Words) -> Any:
    r = words.r
    if parameter.type == "integer":
        return r.choice((r.randrange(10), r.randrange(100), r.randrange(10_000)))
    if parameter.type == "number":
        return round(r.random() * r.choice((1, 10, 100, 1000)), r.choice((1, 2)))
    if parameter.type == "boolean":
        return r.random() < 0.5
    return r.choice(parameter.choices) if parameter.choices else words.phrase(4)


def draw(r: random.Random, scored: bool, fits: bool | None = None) -> Request:
    """A request over two to five tools; `fits` False: none of them serves it, None: mostly one does."""
    words = Words(r, scored)
    if fits is None:
        fits = r.random() >= 0.18
    style = r.choice(("snake", "snake", "camel", "kebab", "dot"))
    count = r.randint(2, 5)
    objects = distinct(lambda: words.of(OBJECTS, 0.45), count + 1)
    verbs = distinct(lambda: words.of(VERBS, 0.35), 5)
    tools = [a_tool(words, r.choice(verbs), objects[i], style) for i in range(count)]
    if not fits:
        verb, obj = (r.choice(tools).verb if r.random() < 0.5 else verbs[0]), objects[count]
        values = {p.name: value_for(p, words) for p in some_parameters(words)}
        return Request(tuple(tools), ask(words, verb, obj, values), None, {}, verb, obj)
    if r.random() < 0.45:  # two tools of the same object: the verb decides
        other = next(v for v in verbs if v != tools[0].verb)
        tools[1] = a_tool(words, other, tools[0].object, style)
    wanted = tools[0]
    r.shuffle(tools)
    if len({tool.name for tool in tools}) < len(tools):
        return draw(r, scored, fits)
    values = {p.name: value_for(p, words) for p in wanted.parameters if p.name not in wanted.optional or r.random() < 0.5}
    alone = sum(tool.object == wanted.object for tool in tools) == 1
    text = ask(words, wanted.verb, wanted.object, values, alone and r.random() < 0.25)
    return Request(tuple(tools), text, wanted, values, wanted.verb, wanted.object)


def distinct(make: Any, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


# ---------------------------------------------------------------------------------------------------------------
# requests

OPENINGS = ("{v} the {o}", "{v} a {o}", "Please {v} the {o}", "Can you {v} the {o}", "I want to {v} a {o}", "{v} {o}", "Could you {v} my {o}",
            "I need to {v} the {o}", "Help me {v} the {o}", "Let us {v} the {o}", "{v} this {o} for me", "Now {v} the {o}",
            "Would you {v} the {o}", "I would like you to {v} the {o}", "Go and {v} the {o}", "The {o}: {v} it")  # fmt: skip
# Without the verb: only where the object alone decides.
NATURAL = ("What is the {o}", "what's the {o}", "I need the {o}", "Give me the {o}", "Tell me the {o}", "How is the {o}", "Show me the {o}",
           "The {o}, please,", "{o}", "Any {o}")  # fmt: skip
PAIRS = ("{k} {x}", "{k} {x}", "{k}: {x}", "{k}={x}", "{k} is {x}", "the {k} is {x}", "the {k} {x}", "{k} set to {x}", "{x} as {k}", "{x} as the {k}")
JOINS = ((" with ", ", "), (" with ", " and "), (", ", ", "), (" using ", ", "), (": ", ", "), (" where ", " and "), (" (", ", "))


def ask(words: Words, verb: str, obj: str, values: dict[str, Any], natural: bool = False) -> str:
    """The request in a sentence: what is wanted, then the values, each beside its name.

    Args:
        natural: leave the verb out, and the name of a single value.
    """
    r = words.r
    opening = r.choice(NATURAL if natural else OPENINGS).format(v=verb, o=obj)
    if len(values) == 1 and isinstance(next(iter(values.values())), str) and r.random() < (0.6 if natural else 0.15):
        (name, value), = values.items()
        label = f"{r.choice(('', 'the '))}{name.replace('_', ' ')} " if r.random() < 0.3 else ""
        return opening + r.choice((" in ", " for ", " of ", " at ")) + label + value + r.choice(("?", ".", ""))
    opening = opening[0].upper() + opening[1:] if r.random() < 0.6 else opening
    pairs = []
    for name, value in values.items():
        shown = raw(value)
        if isinstance(value, str) and r.random() < 0.35:
            shown = r.choice(('"{}"', "'{}'")).format(shown)
        label = name.replace("_", " ") if r.random() < 0.5 else name
        pairs.append(r.choice(PAIRS).format(k=label, x=shown))
    if r.random() < 0.5:
        r.shuffle(pairs)
    if not pairs:
        return opening + r.choice((".", "", "?"))
    start, between = r.choice(JOINS)
    end = ")" if start == " (" else r.choice((".", "", "", " please"))
    return opening + start + between.join(pairs) + end


# ---------------------------------------------------------------------------------------------------------------
# results


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool answered, and what follows: a reply, or a further call and its own result."""

    text: str
    thinking: str
    reply: str | None = None
    next_tool: Tool | None = None
    next_values: dict[str, Any] = field(default_factory=dict)


def reply_of(fields: dict[str, Any]) -> str:
    return " ".join(f"The {key.replace('_', ' ')} is {raw(value)}." for key, value in fields.items())


def final_result(words: Words) -> Result:
    """An answer that can be read back."""
    r = words.r
    if r.random() < 0.12:
        error = r.choice(("not found", "no permission", "timeout", f"no such {r.choice(OBJECTS)}", f"unknown {r.choice(PARAMETERS)}"))
        return Result(json.dumps({"error": error}), f"error: {error}", f"The tool reported an error: {error}.")
    if r.random() < 0.15:
        text = words.phrase(4)
        return Result(text, f"text: {text}", f"The result is {text}.")
    names = distinct(lambda: r.choice(PARAMETERS + OBJECTS[:60]), r.randint(1, 3))
    fields = {name: value_for(Parameter(name, r.choice(("string", "integer", "number", "boolean"))), words) for name in names}
    thinking = "\n".join(f"{key}={raw(value)}" for key, value in fields.items())
    return Result(json.dumps(fields, ensure_ascii=False), thinking, reply_of(fields))


def chained_result(words: Words, tools: tuple[Tool, ...]) -> Result:
    """An answer that asks for a second call, and says with what."""
    r = words.r
    tool = r.choice(tools)
    values = {p.name: value_for(p, words) for p in tool.parameters if p.name not in tool.optional or r.random() < 0.4}
    if r.random() < 0.5:
        text = json.dumps({"status": r.choice(("incomplete", "pending", "more")), "next": tool.name, "arguments": values}, ensure_ascii=False)
    else:
        listed = r.choice((", ", " and ")).join(f"{k} {raw(v)}" if r.random() < 0.5 else f"{k}={raw(v)}" for k, v in values.items())
        text = r.choice(("Call {} with {}.", "Next call {} with {}", "Use {} with {} to go on.", "Not done: run {} with {}")).format(tool.name, listed)
    thinking = "\n".join([f"next: {tool.name}", *(f"{k}={raw(v)}" for k, v in values.items())])
    return Result(text, thinking, None, tool, values)

"""What the tests of grammars share: allowed ids, random outputs under a grammar, published schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saddle.grammar.backend import State, XGrammarBackend
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec

TIMEOUT_S = 60
SUITE = Path(__file__).resolve().parents[3] / "build/jsonschema-4.26.0/json/tests/draft2020-12"
SUITE_HINT = ("the JSON-Schema-Test-Suite is not there; get it with: pip download --no-deps --no-binary jsonschema"
              " -d build jsonschema==4.26.0 && tar -xzf build/jsonschema-4.26.0.tar.gz -C build")  # fmt: skip
BFCL_FILES = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple")


def compiled(backend: XGrammarBackend, spec: GrammarSpec) -> State:
    return backend.compile(spec).result(TIMEOUT_S)


def allowed(backend: XGrammarBackend, state: State) -> np.ndarray[Any, Any]:
    """Ids whose bit is set."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(backend.fill(state), np.uint8), bitorder="little"))


def feed(backend: XGrammarBackend, state: State, ids: list[int]) -> int | None:
    """Accept ids one by one; returns the place of the first that is masked, None if none is."""
    for place, token_id in enumerate(ids):
        if token_id not in allowed(backend, state):
            return place
        backend.accept(state, token_id)
    return None


def matches(backend: XGrammarBackend, tokenizer: Tokenizer, spec: GrammarSpec, text: str) -> bool:
    """Whether a text may be generated, EOS included."""
    return feed(backend, compiled(backend, spec), [*tokenizer.encode(text), tokenizer.eos_id]) is None


class Sampler:
    """Draws from what a grammar allows, with a liking for what comes to an end."""

    def __init__(self, backend: XGrammarBackend, tokenizer: Tokenizer, seed: int = 0) -> None:
        self._backend, self._tokenizer = backend, tokenizer
        self._rng = random.Random(seed)
        self._weights = np.ones(backend.vocab_size)
        for token_id in range(tokenizer.vocab_size):
            raw = tokenizer.raw(token_id)
            if raw[:1] < b" " or raw[:1] >= b"\x80":
                self._weights[token_id] = 0.1
            elif raw in (b'"', b"}", b"]"):
                self._weights[token_id] = 30
            elif raw and raw in b"0123456789eE":
                self._weights[token_id] = 0.3
            elif raw in (b"<", b"</", b",", b":", b"[", b"{"):
                self._weights[token_id] = 8
        self._weights[[tokenizer.eos_id, tokenizer.end_calls_id]] = 60

    def draw(self, spec: GrammarSpec, max_tokens: int = 1500) -> list[int] | None:
        """Ids without EOS; None if the output did not end by itself."""
        state = compiled(self._backend, spec)
        ids: list[int] = []
        closing: list[int] = []
        while len(ids) < max_tokens:
            choices = allowed(self._backend, state)
            assert len(choices), f"nothing may follow {self._tokenizer.decode(ids, False)!r}"
            if closing and closing[0] in choices:
                token_id = closing.pop(0)
            else:
                token_id = self._rng.choices(choices.tolist(), self._weights[choices].tolist())[0]
                closing = []
            self._backend.accept(state, token_id)
            if token_id == self._tokenizer.eos_id:
                return ids
            ids.append(token_id)
            if len(ids) % 8 == 0:  # free text would hardly ever happen upon the tag that ends it
                closing = self._tokenizer.encode("</parameter>\n")
        return None


@dataclass(frozen=True)
class Case:
    """A question of the Berkeley Function Calling Leaderboard: its tools, and calls that are right."""

    name: str
    tools: list[dict[str, Any]]
    calls: list[tuple[str, dict[str, Any]]]


def bfcl_cases() -> Iterator[Case]:
    """The single-turn cases of four categories; skips where the package is not installed."""
    import importlib.util

    found = importlib.util.find_spec("bfcl_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("bfcl-eval is not installed: pip install --no-deps bfcl-eval==2026.3.23")
    data = Path(found.submodule_search_locations[0]) / "data"
    for name in BFCL_FILES:
        answers = {}
        for line in (data / "possible_answer" / f"BFCL_v4_{name}.json").read_text().splitlines():
            answer = json.loads(line)
            answers[answer["id"]] = answer["ground_truth"]
        for line in (data / f"BFCL_v4_{name}.json").read_text().splitlines():
            entry = json.loads(line)
            functions = [{**function, "parameters": json_schema(function["parameters"])}
                         for function in entry["function"]]  # fmt: skip
            tools = [{"type": "function", "function": function} for function in functions]
            schemas = {function["name"]: function["parameters"] for function in functions}
            calls = [(called, _arguments(given, schemas[called]))
                     for truth in answers.get(entry["id"], []) for called, given in truth.items()]  # fmt: skip
            yield Case(entry["id"], tools, calls)


TYPES = {"dict": "object", "hashmap": "object", "float": "number", "double": "number", "tuple": "array",
         "arraylist": "array", "long": "integer", "char": "string", "any": None, "": None}  # fmt: skip


def json_schema(part: Any) -> Any:
    """The leaderboard's schemas in the words of JSON Schema; its `optional` and `location` mean nothing there."""
    if not isinstance(part, dict):
        return part
    schema: dict[str, Any] = {}
    for key, value in part.items():
        if key == "type" and isinstance(value, str):
            kind = TYPES.get(value.lower(), value.lower())
            if kind is not None:
                schema["type"] = kind
        elif key == "properties":
            schema[key] = {name: json_schema(inner) for name, inner in value.items()}
        elif key == "items":
            schema[key] = json_schema(value)
        elif key in ("required", "enum", "description"):
            schema[key] = value
    return schema


def _arguments(given: dict[str, list[Any]], schema: dict[str, Any]) -> dict[str, Any]:
    """The first of the possible values of each argument, "" meaning left out, in the order of the schema."""
    chosen = {name: _value(values[0]) for name, values in given.items() if values and values[0] != ""}
    order = [*schema.get("properties", {}), *chosen]
    return {name: chosen[name] for name in dict.fromkeys(order) if name in chosen}


def _value(value: Any) -> Any:
    """Inside objects, the leaderboard lists possible values too."""
    if isinstance(value, dict):
        return {key: _value(inner[0]) if isinstance(inner, list) and inner else inner
                for key, inner in value.items() if inner != [""]}  # fmt: skip
    return [_value(inner) for inner in value] if isinstance(value, list) else value


def as_xml(calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as M2's template renders them, behind a thought and no text."""
    lines = ["</think>\n\n\n<minimax:tool_call>"]
    for name, arguments in calls:
        lines.append(f'<invoke name="{name}">')
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f'<parameter name="{key}">{text}</parameter>')
        lines.append("</invoke>")
    return "\n".join([*lines, "</minimax:tool_call>"])

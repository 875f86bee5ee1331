"""The arguments of one tool call, written as JSON text while the model still generates them.

A value that can only be a string goes out as it comes, escaped, in time proportional to its new part. Any other value
waits for its end, because its type decides how it is written. The closing brace comes with the end of the call alone,
so what was sent of a call that was cut off never parses as a whole object.
"""

from __future__ import annotations

import json
import re
from typing import Any

from saddle.parsing.tools import LITERAL, Parameter

# What a JSON literal can begin with; other values of unlisted tools are strings from their first character on.
JSON_START = re.compile(r"\s*(?:\Z|[{\[\"0-9-]|t(?:\Z|r(?:\Z|u(?:\Z|e)))|f(?:\Z|a(?:\Z|l(?:\Z|s(?:\Z|e))))"
                        r"|n(?:\Z|u(?:\Z|l(?:\Z|l))))")  # fmt: skip


def to_json(value: Any) -> str:
    """JSON as clients of M2 are used to it: a space behind comma and colon, nothing escaped without need."""
    return json.dumps(value, ensure_ascii=False)


class Arguments:
    """Builds the JSON text; each method returns the part that has become certain."""

    __slots__ = ("_is_open", "_num_values", "_parameter", "_parts", "_streams")

    def __init__(self) -> None:
        self._num_values = 0
        self._parts: list[str] = []
        self._parameter: Parameter = LITERAL
        self._is_open = False
        self._streams = False

    def begin(self, name: str, parameter: Parameter) -> str:
        """A value begins. A name may come twice: readers of JSON take the last."""
        self._parameter, self._is_open = parameter, True
        self._parts = [(", " if self._num_values else "{") + to_json(name) + ": "]
        self._num_values += 1
        self._streams = parameter.is_text
        return self._take('"') if self._streams else ""

    def add(self, text: str) -> str:
        """More of the value."""
        if self._streams:
            return to_json(text)[1:-1]
        self._parts.append(text)
        if self._parameter is LITERAL and len(self._parts) < 64:
            value = "".join(self._parts[1:])
            if not JSON_START.match(value):
                self._streams = True
                self._parts[1:] = []
                return self._take(to_json(value)[:-1])
        return ""

    def end(self) -> str:
        """The value is complete."""
        self._is_open = False
        if self._streams:
            return '"'
        value = self._parameter.value("".join(self._parts[1:]))
        self._parts[1:] = []
        return self._take(to_json(value))

    def close(self) -> str:
        """The call is complete."""
        return (self.end() if self._is_open else "") + ("}" if self._num_values else "{}")

    def _take(self, end: str) -> str:
        text = "".join(self._parts) + end
        self._parts = []
        return text

"""HTTP answers that are not streams: JSON bodies, and every error in OpenAI's shape.

    {"error": {"message": ..., "type": "BadRequestError", "param": "messages.0.role", "code": 400}}
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from saddle.parsing.events import Failed

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
MAX_LISTED_ERRORS = 10
MAX_MESSAGE = 2000
MAX_INPUT = 200
# A path of this machine or an address of an object has no business in an answer.
PRIVATE = re.compile(r"(?<![\w/.:])/(?:[\w.@+-]+/)+[\w.@+-]+| at 0x[0-9a-fA-F]+")

encode_json = msgspec.json.Encoder().encode


class JSONReply(Response):
    """A JSON body, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else encode_json(content)


def sanitised(message: str) -> str:
    """The text of a failure without paths and addresses of this machine. Refusals are written by us and have none."""
    return PRIVATE.sub("…", message)


def error_fields(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "…"
    return {"error": {"message": message, "type": KINDS.get(status, "APIError"), "param": param, "code": status}}


def status_of(failed: Failed) -> int:
    """The HTTP status that says how a generation ended."""
    return 504 if failed.timed_out else 500


def error_reply(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONReply:
    return JSONReply(error_fields(status, message, param), status_code=status, headers=dict(headers or {}))


def validation_message(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """(message, param) of pydantic's errors: `messages.0: Input should be a valid dictionary`, at most ten."""
    lines = []
    for error in errors[:MAX_LISTED_ERRORS]:
        where, what = ".".join(map(str, error["loc"])), str(error["msg"])
        given = reprlib.repr(error.get("input"))[:MAX_INPUT]
        shown = "" if error["type"] in ("missing", "json_invalid") else f", got {given}"
        lines.append(f"{where}: {what}{shown}" if where else f"{what}{shown}")
    if len(errors) > MAX_LISTED_ERRORS:
        lines.append(f"and {len(errors) - MAX_LISTED_ERRORS} more")
    first = errors[0]["loc"]
    return "; ".join(lines) + ".", ".".join(map(str, first)) or None

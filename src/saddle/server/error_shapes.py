"""Errors in the shape of the API that was called: Anthropic's below /v1/messages, OpenAI's everywhere else."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

from saddle.errors import RequestError
from saddle.server import anthropic_parts, replies
from saddle.server.replies import JSONReply

ANTHROPIC = "/v1/messages"


def path_of(scope: Scope) -> str:
    """The path of a request below the root path."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def is_anthropic(scope: Scope) -> bool:
    path = path_of(scope)
    return path == ANTHROPIC or path.startswith(ANTHROPIC + "/")


def request_id_of(scope: Scope) -> str | None:
    found: str | None = scope.get("state", {}).get("request_id")
    return found


def error_for(
    scope: Scope, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONReply:
    """An error, with the request id of the scope where the API has a place for it."""
    if is_anthropic(scope):
        return anthropic_parts.error_reply(status, message, request_id_of(scope), headers)
    return replies.error_reply(status, message, param, headers)


def refusal_for(scope: Scope, error: RequestError) -> JSONReply:
    """The answer to a request that is refused."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
    if is_anthropic(scope):
        return anthropic_parts.refusal_reply(error, request_id_of(scope), headers)
    return error_for(scope, error.status, error.message, error.param, headers)

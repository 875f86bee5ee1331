"""The ASGI middleware in front of all routes: request ids, API keys, the limit on bodies.

Plain ASGI on purpose: to the chunks of a stream it adds one function call.
"""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saddle.errors import RequestError
from saddle.server.error_shapes import error_for, path_of

GUARDED = ("/v1", "/tokenize", "/detokenize")
SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class BodyTooLarge(RequestError):
    status = 413
    kind = "RequestTooLargeError"


class Gate:
    """Args: the app behind it, accepted API keys (none: everybody may call), most bytes of a body."""

    def __init__(self, app: ASGIApp, api_keys: Iterable[str] = (), max_body_bytes: int = 64 << 20) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._max_body = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wanted = headers.get("x-request-id", "")
        request_id = wanted if SANE_ID.fullmatch(wanted) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        extra = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], extra]
            await send(message)

        if self._keys and scope["method"] != "OPTIONS" and self._is_guarded(scope) and not self._knows(headers):
            message = "A valid API key is required, as `Authorization: Bearer KEY` or `x-api-key: KEY`."
            reply = error_for(scope, 401, message, headers={"WWW-Authenticate": "Bearer"})
            await reply(scope, receive, send_with_id)
            return
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body:
            await error_for(scope, 413, self._too_large())(scope, receive, send_with_id)
            return
        await self._app(scope, receive if length.isdigit() else self._limited(receive), send_with_id)

    def _is_guarded(self, scope: Scope) -> bool:
        path = path_of(scope)
        return any(path == prefix or path.startswith(prefix + "/") for prefix in GUARDED)

    def _knows(self, headers: Headers) -> bool:
        """Compares both headers with every key, so that the time tells nothing."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        given = [text.encode("latin-1") for text in (bearer, headers.get("x-api-key", ""))]
        matches = [hmac.compare_digest(text, key) for text in given for key in self._keys]
        return any(matches)

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not say their length: raises BodyTooLarge out of the reader."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:
                raise BodyTooLarge(self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"The body is larger than {self._max_body} bytes."

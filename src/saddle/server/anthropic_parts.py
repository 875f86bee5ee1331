"""Pieces that Anthropic's answers share: errors, signatures of thinking, usage, why an answer ended."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

from saddle.errors import ContextTooLong, NotFound, RequestError
from saddle.parsing.events import Done
from saddle.protocol import FinishReason, Usage
from saddle.server.replies import MAX_MESSAGE, JSONReply

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
FAILED = "api_error"
REQUEST_ID = "request-id"  # the header in which Anthropic's clients look


class ThreadNotFound(NotFound):
    """The sender wants to go on with a conversation that a server of Anthropic's would have kept.

    Its clients know this error by its code, and send the whole conversation.
    """

    code = "thread_not_found"


def error_fields(status: int, message: str, request_id: str | None, code: str | None = None) -> dict[str, Any]:
    """{"type": "error", "error": {"type": ..., "message": ...}, "request_id": ...}; a code comes in `details`."""
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "…"
    error: dict[str, Any] = {"type": KINDS.get(status, FAILED), "message": message}
    if code is not None:
        error["details"] = {"error_code": code}
    return {"type": "error", "error": error, "request_id": request_id}


def error_reply(
    status: int,
    message: str,
    request_id: str | None,
    headers: Mapping[str, str] | None = None,
    code: str | None = None,
) -> JSONReply:
    more = {REQUEST_ID: request_id} if request_id else {}
    fields = error_fields(status, message, request_id, code)
    return JSONReply(fields, status_code=status, headers={**(headers or {}), **more})


def refusal_reply(error: RequestError, request_id: str | None, headers: Mapping[str, str] | None) -> JSONReply:
    """Agents look for the very words "prompt is too long" to know that they must shorten their conversation."""
    message = error.message
    if isinstance(error, ContextTooLong) and error.num_tokens is not None:
        message = f"prompt is too long: {error.num_tokens} tokens > {error.limit} maximum"
    code = error.code if isinstance(error, ThreadNotFound) else None
    return error_reply(error.status, message, request_id, headers, code)


# ---------------------------------------------------------------------------------------------------------------
# signatures of thinking


class Signer:
    """Signs the thinking that goes out and recognises it when it comes back.

    A signature holds for this process: its key is drawn at start. What a client makes of the text's outer white space
    does not matter. A sealed signature carries the thinking itself, for answers that leave the text out.
    """

    PLAIN, SEALED = "saddle1.", "saddle1s."
    SIZE = 18  # bytes of a tag; a multiple of three, so that base64 needs no padding

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)

    def sign(self, thinking: str) -> str:
        return self.PLAIN + _text(self._tag(thinking.strip().encode(errors="surrogatepass")))

    def seal(self, thinking: str) -> str:
        packed = zlib.compress(thinking.encode(errors="surrogatepass"))
        return self.SEALED + _text(self._tag(packed) + packed)

    def is_own(self, thinking: str, signature: str) -> bool:
        """Whether this process wrote that thinking."""
        return hmac.compare_digest(self.sign(thinking).encode(), signature.encode(errors="replace"))

    def unseal(self, signature: str) -> str | None:
        """The thinking that a sealed signature carries; None if it is none of ours."""
        if not signature.startswith(self.SEALED):
            return None
        try:
            raw = base64.urlsafe_b64decode(signature.removeprefix(self.SEALED))
        except (binascii.Error, ValueError):
            return None
        tag, packed = raw[: self.SIZE], raw[self.SIZE :]
        if not hmac.compare_digest(tag, self._tag(packed)):
            return None
        return zlib.decompress(packed).decode(errors="surrogatepass")

    def _tag(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=self.SIZE, key=self._key).digest()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


# ---------------------------------------------------------------------------------------------------------------
# usage and the end of an answer


class CacheCreation(msgspec.Struct):
    ephemeral_5m_input_tokens: int = 0
    ephemeral_1h_input_tokens: int = 0


class OutputDetails(msgspec.Struct):
    thinking_tokens: int


class UsageBody(msgspec.Struct):
    """Input is what was not in the cache; the three kinds of input add up to the prompt.

    Nothing is ever said to be created: every block of a prompt is cached, and none of it costs more.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation: CacheCreation
    output_tokens_details: OutputDetails
    server_tool_use: None = None
    service_tier: str = "standard"


def usage_body(usage: Usage, *, is_warming: bool = False) -> UsageBody:
    """Usage as Anthropic reports it. Of a request that only warms the cache, the token made for it is not counted."""
    cached = usage.num_cached_tokens
    return UsageBody(
        input_tokens=usage.num_prompt_tokens - cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=cached,
        output_tokens=0 if is_warming else usage.num_completion_tokens,
        cache_creation=CacheCreation(),
        output_tokens_details=OutputDetails(0 if is_warming else usage.num_reasoning_tokens),
    )


def stop_reason(done: Done, wants_results: bool, max_tokens: int, max_model_len: int) -> str:
    """Why an answer ended, in Anthropic's words.

    A limit comes first: what is there is not whole. Calls that are whole want to be run, also where a stop sequence
    came behind them; `wants_results` is whether there are any, and none was cut off.
    """
    usage = done.usage
    if done.finish_reason is FinishReason.LENGTH:
        total = usage.num_prompt_tokens + usage.num_completion_tokens
        filled = total >= max_model_len and usage.num_completion_tokens < max_tokens
        return "model_context_window_exceeded" if filled else "max_tokens"
    if wants_results:
        return "tool_use"
    return "stop_sequence" if isinstance(done.stop, str) else "end_turn"

"""`enable_thinking: false`, the switch of other models' templates, ends M2's thinking at once, through each API.

M2's template does not know it: handed on and no more, it would be accepted and change nothing.
"""

from __future__ import annotations

from typing import Any

import pytest

from saddle.config import ServerConfig
from saddle.parsing.tokenizer import Tokenizer
from tests.unit.server.harness import running, words

HI = [{"role": "user", "content": "hi"}]
CHAT = ("/v1/chat/completions", {"messages": HI})
RESPONSES = ("/v1/responses", {"input": "hi"})
MESSAGES = ("/v1/messages", {"messages": HI, "max_tokens": 50})
OFF, ON = {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": True}}


async def budget(tokenizer: Tokenizer, api: tuple[str, Any], fields: dict[str, Any], is_off: bool) -> int | None:
    """The limit of thinking that reaches the engine."""
    defaults = {"enable_thinking": False} if is_off else {}
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False, default_chat_template_kwargs=defaults)
    async with running(tokenizer, words(tokenizer, "</think>", "\n\nyes"), config) as server:
        status, reply = await server.post(api[0], {**api[1], **fields})
        assert status == 200, reply
        [request] = server.client.requests
        if request.grammar is None:
            return None
        assert (request.grammar.kind, request.grammar.after_token_id) == ("unbound", tokenizer.end_think_id)
        return request.grammar.max_thinking_tokens


@pytest.mark.parametrize(("api", "fields", "is_off", "expected"), [
    (CHAT, OFF, False, 0), (CHAT, ON, False, None), (CHAT, {}, True, 0), (CHAT, ON, True, None),
    (CHAT, {**OFF, "reasoning_effort": "high"}, False, None), (CHAT, {**OFF, "thinking_token_budget": 9}, False, 9),
    (CHAT, {"thinking_token_budget": -1}, True, None),
    (RESPONSES, OFF, False, 0), (RESPONSES, ON, True, None), (RESPONSES, {}, True, 0),
    (RESPONSES, {"reasoning": {"effort": "high"}}, True, None),
    (MESSAGES, {}, True, 0), (MESSAGES, {}, False, None), (MESSAGES, {"thinking": {"type": "adaptive"}}, True, None),
])  # fmt: skip
async def test_who_decides(
    tokenizer: Tokenizer, api: tuple[str, Any], fields: dict[str, Any], is_off: bool, expected: int | None
) -> None:
    """What the request says of its thinking, then its switch, then the server's."""
    assert await budget(tokenizer, api, fields, is_off) == expected

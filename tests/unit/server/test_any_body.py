"""Whatever is sent, the answer is never a 500, and an error always has the shape of one."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from saddle.parsing.tokenizer import Tokenizer
from saddle.server.wire_openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.unit.server.harness import in_thread, words

FINE = {200, 400, 404}
ROUTES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (CompletionBody, {"prompt": "hi"}),
    "/tokenize": (TokenizeBody, {"prompt": "hi"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}
scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-3, 300) | st.floats(allow_nan=False)
    | st.text(max_size=8) | st.sampled_from(["auto", "none", "user", "assistant", "tool", "text", "function"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "id", "1"])
        | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
settled = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def port(tokenizer: Tokenizer) -> Iterator[int]:
    with in_thread(tokenizer, words(tokenizer, "x")) as found:
        yield found


def check(port: int, route: str, data: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", route, data, {"content-type": "application/json"})
        reply = connection.getresponse()
        text = reply.read()
    finally:
        connection.close()
    assert reply.status in FINE, (reply.status, text)
    if reply.status != 200:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == reply.status
        assert error["message"]


@settled
@given(data=st.data())
def test_any_value_in_any_field(port: int, data: Any) -> None:
    route = data.draw(st.sampled_from(sorted(ROUTES)))
    model, valid = ROUTES[route]
    names = data.draw(st.lists(st.sampled_from(sorted(model.model_fields)), min_size=1, max_size=3))
    body = {**valid, "max_tokens": 4, **{name: data.draw(values, label=name) for name in names}}
    check(port, route, json.dumps(body).encode())


@settled
@given(messages=st.lists(st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "robot"]) | values,
    "content": st.text(max_size=8) | values, "tool_calls": values, "tool_call_id": st.text(max_size=3) | values,
    "reasoning_content": st.text(max_size=8) | values,
}), max_size=4), tools=st.none() | st.lists(values, max_size=2))  # fmt: skip
def test_any_conversation(port: int, messages: list[Any], tools: Any) -> None:
    check(port, "/v1/chat/completions", json.dumps({"messages": messages, "tools": tools}).encode())


@settled
@given(data=st.binary(max_size=60) | st.text("{}[]\",:0123456789.eE+-truefalsn\\u", max_size=40).map(str.encode))
def test_any_bytes(port: int, data: bytes) -> None:
    check(port, "/v1/chat/completions", data)

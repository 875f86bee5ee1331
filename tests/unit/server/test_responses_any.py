"""Whatever is sent to the responses API, the answer is never a 500, and an error always has the shape of one."""

from __future__ import annotations

import http.client
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saddle.server.responses_items import FOREIGN_ITEMS, READ_ITEMS
from saddle.server.wire_responses import ResponsesBody
from tests.unit.server.test_any_body import port, values

__all__ = ["port"]  # a fixture
PATH = "/v1/responses"
FINE = {200, 400, 404}
KEYS = ["role", "content", "call_id", "id", "name", "arguments", "output", "status", "summary", "encrypted_content",
        "input", "action", "namespace"]  # fmt: skip
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["input_text", "reasoning_text", "input_image"]),
                                        "text": st.text(max_size=5)}), max_size=2)  # fmt: skip
OUR_ID = "msg_" + "0" * 32 + "_0"
LIKELY = st.sampled_from(["user", "assistant", "c1", "{}", "{", "read", "incomplete", "saddle1.AAAA", OUR_ID])
ITEMS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from([*READ_ITEMS, *sorted(FOREIGN_ITEMS)[:3], "message", "nonsense"])},
        optional=dict.fromkeys(KEYS, LIKELY | PARTS | values),
    ),
    max_size=5,
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["function", "namespace", "custom", "web_search"]), "name": LIKELY | values},
        optional={"parameters": values | st.fixed_dictionaries({"type": st.just("object"), "properties": values}),
                  "strict": st.booleans(), "description": values,
                  "tools": st.lists(st.fixed_dictionaries({"name": LIKELY | values}), max_size=2) | values},
    ),
    max_size=3,
)  # fmt: skip
settled = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def check(status: int, text: bytes) -> None:
    assert status in FINE, text
    if status != 200:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        assert error["message"]


@settled
@given(field=st.sampled_from(sorted(set(ResponsesBody.model_fields) - {"input", "tools"})), value=values)
def test_any_value_of_any_field(port: int, field: str, value: Any) -> None:
    check(*ask(port, "POST", PATH, {"input": "hi", field: value}))


@settled
@given(items=ITEMS | values)
def test_any_input(port: int, items: Any) -> None:
    status, text = ask(port, "POST", PATH, {"input": items})
    check(status, text)
    if status == 200:
        made = json.loads(text)
        check(*ask(port, "POST", PATH, {"input": "on", "previous_response_id": made["id"]}))
        status, listed = ask(port, "GET", f"{PATH}/{made['id']}/input_items")
        assert status == 200
        assert all(isinstance(item["id"], str) for item in json.loads(listed)["data"])


@settled
@given(tools=TOOLS | values, choice=st.sampled_from([None, "auto", "required", "none"]) | values)
def test_any_tools(port: int, tools: Any, choice: Any) -> None:
    check(*ask(port, "POST", PATH, {"input": "hi", "tools": tools, "tool_choice": choice}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=300),
    rest=st.sampled_from(["", "/cancel", "/input_items"]),
    method=st.sampled_from(["GET", "POST", "DELETE"]),
    query=st.sampled_from(["", "?limit=1", "?limit=-1", "?stream=true", "?starting_after=x", "?order=1&after=2"]),
)
def test_any_id(port: int, name: str, rest: str, method: str, query: str) -> None:
    status, text = ask(port, method, f"{PATH}/{name}{rest}{query}", {} if method == "POST" else None)
    if status != 405:
        check(status, text)

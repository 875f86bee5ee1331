"""The server's OpenAPI document, fuzzed: whatever is sent, no 500, and every answer is what the document says.

First blindly, from the schemas alone; then valid requests of each API with a few of their fields replaced by others
that the schemas allow, which get further.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.processes import ServerProcess
from tests.support.checkpoint import write_random_checkpoint

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
from_openapi = pytest.importorskip("schemathesis.specs.openapi.checks")

TIMEOUT_S = 60
HTTP = requests.Session()
BLIND = settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
                 suppress_health_check=list(HealthCheck))  # fmt: skip
HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}}
# A request that works, of each path that generates.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 1, "tools": [{"type": "function", "function": TOOL}]},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/messages": {"model": "fuzzed", "messages": HI, "max_tokens": 1,
                     "tools": [{"name": "f", "input_schema": TOOL["parameters"]}]},
    "/v1/messages/count_tokens": {"model": "fuzzed", "messages": HI},
    "/v1/responses": {"model": "fuzzed", "input": "hi", "max_output_tokens": 1},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}  # fmt: skip


CALLS = {"tool_choice": "required", "thinking_token_budget": 0, "max_tokens": 40}
# More of them, so that answers with everything in them are held against the document.
RICH: list[tuple[str, dict[str, Any]]] = [
    *GOOD.items(),
    ("/v1/chat/completions", {**GOOD["/v1/chat/completions"], **CALLS}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "n": 2,
                              "prompt_logprobs": 1, "return_token_ids": True, "thinking_token_budget": 1}),
    ("/v1/completions", {"prompt": ["hi", "ho"], "max_tokens": 3, "logprobs": 2, "echo": True,
                         "return_token_ids": True}),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 3, "prompt_logprobs": 1, "stop": ["zz"]}),
    ("/v1/messages", {"messages": HI, "max_tokens": 60, "tools": GOOD["/v1/messages"]["tools"],
                      "tool_choice": {"type": "any"}, "thinking": {"type": "enabled", "budget_tokens": 2},
                      "context_management": {}}),
    ("/v1/messages", {"messages": HI, "max_tokens": 5, "thinking": {"type": "disabled"}}),
    ("/v1/messages/count_tokens", {"messages": HI, "context_management": {"edits": []}}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 60, "tool_choice": "required", "top_logprobs": 2,
                       "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", **TOOL}]},
                                 {"type": "web_search"}],
                       "reasoning": {"effort": "none"}, "metadata": {"a": "b"}, "return_token_ids": True,
                       "text": {"verbosity": "low"}}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 5, "reasoning": {"summary": "auto"},
                       "include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 5, "reasoning": {"effort": "none"}, "top_logprobs": 1,
                       "background": True}),
    ("/v1/responses/input_tokens", {"input": "hi"}),
    ("/tokenize", {"messages": HI, "return_token_strs": True}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m2")
    server = ServerProcess([str(folder), "--served-model-name", "fuzzed", "--max-model-len", "1024",
                            "--kv-cache-memory-bytes", str(64 << 20), "--disable-uvicorn-access-log",
                            "--override-generation-config", '{"max_new_tokens": 1}'])  # fmt: skip
    yield server
    server.wait_idle()
    assert server.stop() == 0, server.log()
    assert server.leaves_no_process()
    assert "Traceback" not in server.log(), server.log()


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> dict[str, Any]:
    with urllib.request.urlopen(server.base + "/openapi.json", timeout=TIMEOUT_S) as reply:
        return dict(json.load(reply))


@pytest.fixture
def api(server: ServerProcess) -> Any:
    return schemathesis.openapi.from_url(server.base + "/openapi.json")


CHECKS = [
    schemathesis.checks.not_a_server_error,
    from_openapi.status_code_conformance,
    from_openapi.content_type_conformance,
    from_openapi.response_schema_conformance,
    from_openapi.response_headers_conformance,
]


def test_whatever_is_sent(api: Any) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    assert {operation.path for operation in operations} >= set(GOOD)
    for operation in operations:

        @BLIND
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

        run()


# valid requests, bent -------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([2**31, -(2**63), 2**64, 1e308]),
    st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8),
    st.sampled_from(["auto", "none", "required", "any", "text", "json_object", "json_schema", "function", "user",
                     "assistant", "a+", "(", "\x00", "\ud83d\ude00", "<think>", "[e~["]),
)  # fmt: skip
KEYS = st.sampled_from(["type", "name", "function", "json_schema", "schema", "properties", "role", "content", "text",
                        "regex", "choice", "format", "include_usage", "effort", "input", "1", ""])  # fmt: skip
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
                      max_leaves=6)  # fmt: skip


ODD: list[Any] = [
    None, True, -1, 0, 5, 1.5, 2**64, "", "auto", "x", "\ud800", [], ["x"], [7], [[7]], [{}], {}, {"x": "x"},
    {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {"type": "function"},
    {"type": "x", "format": []}, [{"type": "function", "function": 1}], [{"role": "user"}],
    [{"role": "tool", "content": 1}],
]  # fmt: skip


def fields(document: dict[str, Any], path: str) -> list[str]:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(set(schema["properties"]) - {"background"})


def check(server: ServerProcess, document: dict[str, Any], path: str, body: dict[str, Any]) -> int:
    """Send a body; the status, once all is as the document says."""
    answers = document["paths"][path]["post"]["responses"]
    reply = HTTP.post(server.base + path, data=json.dumps(body).encode(), timeout=TIMEOUT_S,
                      headers={"Content-Type": "application/json"})  # fmt: skip
    assert reply.status_code < 500, (body, reply.text)
    declared = answers.get(str(reply.status_code))
    assert declared is not None, (body, reply.status_code)
    if reply.headers["content-type"].startswith("application/json"):
        # Without checking the schema itself each time.
        jsonschema.Draft202012Validator(declared["content"]["application/json"]["schema"]).validate(reply.json())
    else:
        assert reply.headers["content-type"].startswith("text/event-stream"), body
        assert "data: " in reply.text
    return reply.status_code


@pytest.mark.parametrize(("path", "body"), RICH)
def test_requests_that_work(server: ServerProcess, document: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    """So that the ones bent from them are about the fields that were bent."""
    reply = requests.post(server.base + path, json=body, timeout=TIMEOUT_S)
    assert reply.status_code == 200, reply.text
    [declared] = [answer for status, answer in document["paths"][path]["post"]["responses"].items() if status == "200"]
    jsonschema.validate(reply.json(), declared["content"]["application/json"]["schema"])


def declared(document: dict[str, Any], method: str, path: str) -> Any:
    """The schema of a 200, which says something."""
    schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema not in ({}, {"type": "object"}), f"{method} {path} may answer anything"
    return schema


def test_every_answer_has_a_schema(document: dict[str, Any]) -> None:
    routes = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert len(routes) > 15
    for method, path in routes:
        if path != "/metrics":
            declared(document, method, path)


@pytest.mark.parametrize("path", ["/livez", "/health", "/ping", "/version", "/load", "/v1/models"])
def test_what_is_read(server: ServerProcess, document: dict[str, Any], path: str) -> None:
    jsonschema.validate(HTTP.get(server.base + path, timeout=TIMEOUT_S).json(), declared(document, "get", path))


def test_a_model_that_is_read(server: ServerProcess, document: dict[str, Any]) -> None:
    reply = HTTP.get(server.base + "/v1/models/fuzzed", timeout=TIMEOUT_S)
    jsonschema.validate(reply.json(), declared(document, "get", "/v1/models/{name}"))


@pytest.mark.parametrize("fields", [{}, {"reasoning": {"effort": "none"}, "top_logprobs": 1}])
def test_the_life_of_a_response(server: ServerProcess, document: dict[str, Any], fields: dict[str, Any]) -> None:
    """Created in the background, streamed, read, listed, cancelled, deleted: each as the document says."""
    created = declared(document, "post", "/v1/responses")
    body = {"input": "hi", "max_output_tokens": 20, "background": True, "stream": True, **fields}
    with HTTP.post(f"{server.base}/v1/responses", json=body, timeout=TIMEOUT_S) as reply:
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
    told = [event["response"] for event in events if "response" in event]
    assert [each["status"] for each in told][:2] == ["queued", "queued"]
    for each in told:
        jsonschema.validate(each, created)
    one, of_one = f"{server.base}/v1/responses/{told[0]['id']}", "/v1/responses/{response_id}"
    for method, url, path in (("get", one, of_one), ("get", f"{one}/input_items", of_one + "/input_items"),
                              ("post", f"{one}/cancel", of_one + "/cancel"), ("delete", one, of_one)):  # fmt: skip
        reply = HTTP.request(method, url, timeout=TIMEOUT_S)
        assert reply.status_code == 200, reply.text
        jsonschema.validate(reply.json(), declared(document, method, path))


@pytest.mark.parametrize("path", GOOD)
def test_every_field_bent(server: ServerProcess, document: dict[str, Any], path: str) -> None:
    wrong, statuses = [], set()
    for name in fields(document, path):
        for odd in ODD:
            try:
                statuses.add(check(server, document, path, {**GOOD[path], name: odd}))
            except (AssertionError, jsonschema.ValidationError) as error:
                wrong.append((name, odd, str(error).splitlines()[0][-200:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert {200, 400} <= statuses, "both kinds of answers were seen"


@pytest.mark.parametrize("path", GOOD)
def test_several_fields_bent(server: ServerProcess, document: dict[str, Any], path: str) -> None:
    bent = st.dictionaries(st.sampled_from(fields(document, path)), VALUES, min_size=1, max_size=3)

    @settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(changes=bent)
    def run(changes: dict[str, Any]) -> None:
        check(server, document, path, {**GOOD[path], **changes})

    run()

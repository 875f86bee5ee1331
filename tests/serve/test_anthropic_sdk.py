"""Anthropic's Python SDK against `saddle serve` with the bundled checkpoint: the whole path, no part of it scripted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import pytest
from pydantic import BaseModel

from tests.serve.processes import ServerProcess
from tests.unit.server.test_anthropic_routes import CASES, PATH, right
from tests.unit.server.test_anthropic_routes import HI as ASKED

SUM: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "maxLength": 12},
        "line": {"type": "integer", "minimum": 0, "maximum": 99},
        "mode": {"type": "string", "enum": ["text", "hex"]},
    },
    "required": ["path", "line", "mode"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"name": "read", "description": "Read a file.", "input_schema": SCHEMA}]
MODEL = "saddle-test"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    process = ServerProcess(["--served-model-name", MODEL, "--max-model-len", "1024", "--kv-cache-memory-bytes",
                             str(64 << 20), "--disable-uvicorn-access-log", "--api-key", "k"])  # fmt: skip
    yield process
    process.wait_idle()
    assert process.stop() == 0, process.log()
    assert process.leaves_no_process()
    assert "Traceback" not in process.log()


@pytest.fixture(scope="module")
def sdk(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.base, api_key="k", max_retries=0) as client:
        yield client


def greedy(**fields: Any) -> dict[str, Any]:
    """Fields of a request with one possible answer; the SDK knows no temperature any more."""
    body = {"temperature": 0, **fields.pop("extra_body", {})}
    return {"model": MODEL, "max_tokens": 200, "messages": SUM, **fields, "extra_body": body}


def both(sdk: anthropic.Anthropic, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """The message, the same whole and put together by the SDK from a stream, and the events of the stream."""
    whole = sdk.messages.create(**greedy(**fields)).model_dump(exclude_none=True)
    with sdk.messages.stream(**greedy(**fields)) as stream:
        events = list(stream)
        streamed = stream.get_final_message().model_dump(exclude_none=True)
    for message in (whole, streamed):
        del message["id"]
        for block in message["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
        usage = message["usage"]
        usage["prompt"] = usage.pop("input_tokens") + usage.pop("cache_read_input_tokens")
    assert streamed == whole
    return whole, events


def test_an_answer_and_its_stream_agree(sdk: anthropic.Anthropic) -> None:
    message, events = both(sdk)
    thinking, text = message["content"]
    assert (thinking["type"], text["type"], message["stop_reason"]) == ("thinking", "text", "end_turn")
    assert thinking["signature"]
    assert text["text"].startswith("17 + 25 = ")
    raw = [event.type for event in events if event.type.startswith(("message", "content"))]
    first = "content_block_start"
    assert (raw[0], raw[1], raw[-2:]) == ("message_start", first, ["message_delta", "message_stop"])
    assert raw.count(first) == raw.count("content_block_stop") == 2
    assert message["usage"]["output_tokens"] > message["usage"]["output_tokens_details"]["thinking_tokens"] > 0


def test_a_cut_answer_and_its_stream_agree(sdk: anthropic.Anthropic) -> None:
    for max_tokens in (1, 4, 45):
        message, _ = both(sdk, max_tokens=max_tokens)
        assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", max_tokens)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "read"}])
def test_a_call_that_must_be_made(sdk: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    message, _ = both(sdk, tools=TOOLS, tool_choice=choice)
    *_, call = message["content"]
    assert (call["type"], call["name"], message["stop_reason"]) == ("tool_use", "read", "tool_use")
    jsonschema.validate(call["input"], SCHEMA)


def test_calls_that_are_cut_off_agree(sdk: anthropic.Anthropic) -> None:
    """At every length a whole answer holds what the SDK makes of the stream."""
    seen = set()
    for max_tokens in range(8, 38, 3):
        message, _ = both(sdk, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=max_tokens,
                          thinking={"type": "disabled"})  # fmt: skip
        seen |= {len(block["input"]) for block in message["content"] if block["type"] == "tool_use"}
    assert {0, 1, 3} <= seen


def test_an_answer_in_json(sdk: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["sum"], "additionalProperties": False}  # fmt: skip
    message, _ = both(sdk, output_config={"format": {"type": "json_schema", "schema": schema}})
    jsonschema.validate(json.loads(message["content"][-1]["text"]), schema)


class Sum(BaseModel):
    sum: int
    is_even: bool


def test_the_sdk_parses_into_a_model(sdk: anthropic.Anthropic) -> None:
    reply = sdk.messages.parse(**greedy(output_format=Sum))
    assert isinstance(reply.parsed_output, Sum)


def test_how_much_is_thought(sdk: anthropic.Anthropic) -> None:
    message, _ = both(sdk, thinking={"type": "disabled"})
    assert [block["type"] for block in message["content"]] == ["text"]
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] == 0
    message, _ = both(sdk, thinking={"type": "enabled", "budget_tokens": 5})
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] == 5
    free, _ = both(sdk, thinking={"type": "adaptive"})
    omitted, _ = both(sdk, thinking={"type": "adaptive", "display": "omitted"})
    assert free["content"][1:] == omitted["content"][1:]
    assert (omitted["content"][0]["thinking"], free["content"][0]["thinking"] > "") == ("", True)


def test_a_stop_sequence(sdk: anthropic.Anthropic) -> None:
    message, _ = both(sdk, stop_sequences=["never", " = 4"], thinking={"type": "disabled"},
                      messages=[{"role": "user", "content": "What is 17 + 25? Say 17 + 25 = 42."}])  # fmt: skip
    if message["stop_reason"] != "stop_sequence":  # the demo may say something else: cut where it says anything
        text = message["content"][0]["text"]
        stop = text[len(text) // 2 :][:3]
        message, _ = both(sdk, stop_sequences=["never", stop], thinking={"type": "disabled"},
                          messages=[{"role": "user", "content": "What is 17 + 25? Say 17 + 25 = 42."}])  # fmt: skip
        assert message["stop_sequence"] == stop
        assert message["content"][0]["text"] == text[: text.index(stop)]
    assert message["stop_reason"] == "stop_sequence"


def test_warming_the_cache(sdk: anthropic.Anthropic) -> None:
    fields = greedy(system="Be of help. " * 30, max_tokens=0)
    warm = sdk.messages.create(**fields)
    assert (warm.content, warm.usage.output_tokens, warm.stop_reason) == ([], 0, "max_tokens")
    used = sdk.messages.create(**{**fields, "max_tokens": 1}).usage
    assert used.cache_read_input_tokens == (used.input_tokens + (used.cache_read_input_tokens or 0) - 1) // 16 * 16 > 0


def test_models_are_listed(sdk: anthropic.Anthropic) -> None:
    [model] = list(sdk.models.list())
    assert (model.id, model.type, model.display_name) == ("saddle-test", "model", "saddle-test")
    assert abs(time.time() - model.created_at.timestamp()) < 3600
    assert sdk.models.retrieve("saddle-test") == model


def test_salts_part_the_cache(sdk: anthropic.Anthropic) -> None:
    def cached(salt: str) -> int:
        fields = greedy(system="Salted. " * 30, max_tokens=1, extra_body={"cache_salt": salt})
        return sdk.messages.create(**fields).usage.cache_read_input_tokens or 0

    assert [cached("a") > 0, cached("a") > 0, cached("b") > 0] == [False, True, False]


def test_counting(sdk: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": SUM, "system": "Be brief.", "tools": TOOLS}
    counted = sdk.messages.count_tokens(**fields).input_tokens
    usage = sdk.messages.create(**fields, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_both_kinds_of_keys(server: ServerProcess) -> None:
    for right_key in ({"api_key": "k"}, {"auth_token": "k", "api_key": None}):
        with anthropic.Anthropic(base_url=server.base, max_retries=0, **right_key) as client:
            assert client.messages.count_tokens(model=MODEL, messages=SUM).input_tokens > 0
    with anthropic.Anthropic(base_url=server.base, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.count_tokens(model=MODEL, messages=SUM)
        assert caught.value.request_id
        assert caught.value.type == "authentication_error"


def test_errors_as_the_sdk_tells_them(sdk: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="Valid names: `saddle-test`"):
        sdk.messages.create(model="claude-9", max_tokens=1, messages=SUM)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 1024 maximum") as caught:
        sdk.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "long " * 3000}])
    assert caught.value.type == "invalid_request_error"
    not_met: Any = {"type": "json_schema", "schema": {"type": "object", "not": {}}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
        sdk.messages.create(**greedy(output_config={"format": not_met}, stream=True))


def test_bad_requests_leave_the_engine_alone(sdk: anthropic.Anthropic, server: ServerProcess) -> None:
    """The same table as the unit test, through the real process."""
    before = server.wait_idle()["engine_steps_total"]
    wrong = []
    for fields, status, kind, part in CASES[:-1]:  # the last one is too long for a smaller context only
        with pytest.raises(anthropic.APIStatusError) as caught:
            sdk.post(PATH, body={**ASKED, **fields}, cast_to=object)
        if caught.value.status_code != status or not right(caught.value.body, kind, part):
            wrong.append((fields, caught.value.status_code, caught.value.body))
    assert not wrong, "\n".join(map(str, wrong))
    assert len(CASES) > 20
    assert server.metrics()["engine_steps_total"] == before


def test_cancellation(sdk: anthropic.Anthropic, server: ServerProcess) -> None:
    before = server.wait_idle()["request_success_total{abort}"]
    with sdk.messages.stream(**greedy(max_tokens=900, extra_body={"temperature": 2})) as stream:
        for _, _ in zip(range(4), stream, strict=False):
            pass
    began = time.monotonic()
    after = server.wait_idle(5)
    assert time.monotonic() - began < 2
    assert after["request_success_total{abort}"] in (before, before + 1), "it may have ended by itself"

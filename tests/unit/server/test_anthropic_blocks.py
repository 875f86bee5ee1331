"""Golden sequences: what the events of a generation become, streamed and whole, and that the two agree."""

from __future__ import annotations

import json
from typing import Any

import pytest

from saddle.parsing.events import Done, Event, Failed, ReasoningDelta, TextDelta, ToolArgs, ToolEnd, ToolStart
from saddle.protocol import FinishReason, SamplingParams, Usage
from saddle.server.anthropic import AskedMessage, to_response
from saddle.server.anthropic_blocks import Show, whole_values
from saddle.server.anthropic_parts import Signer
from saddle.server.anthropic_stream import MessageStream
from saddle.server.job import Job, TokenPrompt

SIGNER = Signer(b"k" * 32)
USAGE = Usage(num_prompt_tokens=40, num_completion_tokens=9, num_cached_tokens=32, num_reasoning_tokens=3)
CALL: list[Event] = [ToolStart(0, "call_1", "ls"), ToolArgs(0, '{"path": "'), ToolArgs(0, '/"}'), ToolEnd(0)]
USAGE_BODY = {
    "input_tokens": 8,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 32,
    "output_tokens": 9,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "output_tokens_details": {"thinking_tokens": 3},
    "server_tool_use": None,
    "service_tier": "standard",
}


def asked(show: Show = "shown", max_tokens: int = 100, **fields: Any) -> AskedMessage:
    job = Job(request_id="msg_1", prompts=(TokenPrompt([1]),), params=SamplingParams(max_tokens=max(max_tokens, 1)))
    given: dict[str, Any] = {"manages_context": False, "continues": False, "max_model_len": 512, **fields}
    return AskedMessage(job=job, model="m", stream=True, show=show, max_tokens=max_tokens, **given)


def done(reason: FinishReason = FinishReason.STOP, stop: str | None = None, usage: Usage = USAGE) -> Done:
    return Done(reason, usage, stop)


def streamed(request: AskedMessage, events: list[Event]) -> list[tuple[str, dict[str, Any]]]:
    """(event, data) of each frame; each event is a batch of its own."""
    encoder = MessageStream(request, SIGNER, 40, lambda: 32, "req")
    data = encoder.start() + b"".join(encoder.encode(0, [event]) for event in events) + encoder.finish()
    frames = data.decode().split("\n\n")
    assert frames.pop() == ""
    found = []
    for frame in frames:
        name, body = frame.split("\n")
        fields = json.loads(body.removeprefix("data: "))
        assert fields["type"] == name.removeprefix("event: ")
        found.append((fields.pop("type"), fields))
    return found


def whole(request: AskedMessage, events: list[Event]) -> dict[str, Any]:
    found = json.loads(to_response(request, events, SIGNER))
    assert isinstance(found, dict)
    return found


def accumulated(frames: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The message that a client puts together from a stream."""
    message: dict[str, Any] = {}
    json_parts: dict[int, str] = {}
    for name, fields in frames:
        if name == "message_start":
            message = fields["message"]
        elif name == "content_block_start":
            assert fields["index"] == len(message["content"])
            message["content"].append(fields["content_block"])
        elif name == "content_block_delta":
            delta, block = fields["delta"], message["content"][fields["index"]]
            if delta["type"] == "input_json_delta":
                json_parts[fields["index"]] = json_parts.get(fields["index"], "") + delta["partial_json"]
            else:
                key = delta["type"].removesuffix("_delta")
                block[key] = block.get(key, "") + delta[key]
        elif name == "content_block_stop" and fields["index"] in json_parts:
            message["content"][fields["index"]]["input"] = whole_values(json_parts[fields["index"]])
        elif name == "message_delta":
            message |= {**fields["delta"], "usage": fields["usage"]}
    return message


def test_golden_stream() -> None:
    events: list[Event] = [ReasoningDelta("I "), ReasoningDelta("look."), TextDelta("\n\n"), TextDelta("So:"), *CALL,
                           TextDelta("\n"), done()]  # fmt: skip
    assert streamed(asked(), events) == [
        ("ping", {}),
        ("message_start", {"message": {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
            "stop_sequence": None,
            "usage": {**USAGE_BODY, "output_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}}}}),
        ("content_block_start", {"index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}),
        ("content_block_delta", {"index": 0, "delta": {"type": "thinking_delta", "thinking": "I "}}),
        ("content_block_delta", {"index": 0, "delta": {"type": "thinking_delta", "thinking": "look."}}),
        ("content_block_delta", {"index": 0, "delta": {"type": "signature_delta",
                                                       "signature": SIGNER.sign("I look.")}}),
        ("content_block_stop", {"index": 0}),
        ("content_block_start", {"index": 1, "content_block": {"type": "text", "text": ""}}),
        ("content_block_delta", {"index": 1, "delta": {"type": "text_delta", "text": "So:"}}),
        ("content_block_stop", {"index": 1}),
        ("content_block_start", {"index": 2, "content_block": {"type": "tool_use", "id": "call_1", "name": "ls",
                                                               "input": {}}}),
        ("content_block_delta", {"index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"path": "'}}),
        ("content_block_delta", {"index": 2, "delta": {"type": "input_json_delta", "partial_json": '/"}'}}),
        ("content_block_stop", {"index": 2}),
        ("message_delta", {"delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": USAGE_BODY}),
        ("message_stop", {}),
    ]  # fmt: skip


def test_golden_message() -> None:
    events: list[Event] = [ReasoningDelta("I look."), TextDelta("\n\nSo:"), *CALL, done()]
    assert whole(asked(), events) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "I look.", "signature": SIGNER.sign("I look.")},
            {"type": "text", "text": "So:"},
            {"type": "tool_use", "id": "call_1", "name": "ls", "input": {"path": "/"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": USAGE_BODY,
    }


SECOND: list[Event] = [ToolStart(1, "call_2", "cp"), ToolArgs(1, "{}"), ToolEnd(1)]
CUT: list[Event] = [ToolStart(0, "c", "f"), ToolArgs(0, '{"a": [1, 2], "b": "x'), ToolArgs(0, "y")]
SEQUENCES: dict[str, list[Event]] = {
    "text": [TextDelta("\n\nHi")],
    "thinking": [ReasoningDelta("a\n"), ReasoningDelta("b")],
    "both": [ReasoningDelta("a"), TextDelta("\n"), TextDelta("\n x")],
    "call": CALL,
    "two calls": [ReasoningDelta("a"), *CALL, *SECOND],
    "texts and calls": [TextDelta("A\n"), *CALL, TextDelta("\n"), TextDelta("B"), *SECOND, TextDelta("C")],
    "cut call": [ReasoningDelta("a"), *CUT],
    "call and cut call": [*CALL, ToolStart(1, "d", "g"), ToolArgs(1, '{"n": 12')],
    "call without arguments yet": [ToolStart(0, "c", "f")],
    "thinking again": [ReasoningDelta("a"), TextDelta("x"), ReasoningDelta("b"), TextDelta("y")],
    "nothing": [],
    "white space": [TextDelta("\n\n"), TextDelta(" ")],
}


@pytest.mark.parametrize("show", ["shown", "omitted"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_streamed_and_whole_agree(name: str, show: Show) -> None:
    for last in (done(), done(FinishReason.LENGTH), done(FinishReason.STOP, "END")):
        events = [*SEQUENCES[name], last]
        for request in (asked(show), asked(show, continues=True), asked(show, manages_context=True)):
            frames = streamed(request, events)
            answer = whole(request, events)
            if answer.pop("context_management", None) is not None:
                assert frames[-2][1]["context_management"] == {"applied_edits": []}
                assert request.manages_context
            assert accumulated(frames) == answer
            opened = [fields["index"] for kind, fields in frames if kind == "content_block_start"]
            closed = [fields["index"] for kind, fields in frames if kind == "content_block_stop"]
            assert opened == closed == list(range(len(answer["content"])))
            assert all(block.get("text", "x").strip() for block in answer["content"]) or len(answer["content"]) == 1


def test_texts_of_the_blocks() -> None:
    def texts(name: str) -> list[str]:
        return [block["text"] for block in whole(asked(), [*SEQUENCES[name], done()])["content"] if "text" in block]

    assert texts("text") == ["Hi"]
    assert texts("both") == [" x"]
    assert texts("texts and calls") == ["A\n", "\nB", "C"]
    assert texts("nothing") == texts("white space") == [""]
    assert whole(asked(continues=True), [TextDelta("\n\nHi"), done()])["content"][0]["text"] == "\n\nHi"


def test_each_block_of_thinking_has_its_own_signature() -> None:
    first, _, second, _ = whole(asked(), [*SEQUENCES["thinking again"], done()])["content"]
    assert (first["thinking"], first["signature"]) == ("a", SIGNER.sign("a"))
    assert (second["thinking"], second["signature"]) == ("b", SIGNER.sign("b"))


def test_a_call_is_closed_as_soon_as_it_is_whole() -> None:
    """Agents run a tool when its block stops, and what the model writes next may take a while."""
    encoder = MessageStream(asked(), SIGNER, 40, lambda: 0, "req")
    assert b"content_block_stop" not in encoder.encode(0, CALL[:-1])
    assert b"content_block_stop" in encoder.encode(0, CALL[-1:])


def test_omitted_thinking_comes_as_a_sealed_signature() -> None:
    (block,) = whole(asked("omitted"), [ReasoningDelta("Deep"), ReasoningDelta(" ü"), done()])["content"]
    assert block["thinking"] == ""
    assert SIGNER.unseal(block["signature"]) == "Deep ü"
    kinds = [fields["delta"]["type"] for kind, fields in streamed(asked("omitted"), [ReasoningDelta("Deep"), done()])
             if kind == "content_block_delta"]  # fmt: skip
    assert kinds == ["signature_delta"]


@pytest.mark.parametrize(
    ("events", "last", "reason", "sequence"),
    [
        ([TextDelta("x")], done(), "end_turn", None),
        ([TextDelta("x")], done(FinishReason.LENGTH), "max_tokens", None),
        ([TextDelta("x")], done(FinishReason.STOP, "END"), "stop_sequence", "END"),
        (CALL, done(), "tool_use", None),
        (CALL, done(FinishReason.LENGTH), "max_tokens", None),
        (CALL, done(FinishReason.STOP, "END"), "tool_use", None),
        (CUT, done(FinishReason.STOP, "END"), "stop_sequence", "END"),
        # Whoever runs calls would run the second with half of its arguments.
        ([*CALL, ToolStart(1, "call_2", "rm"), ToolArgs(1, '{"path": "/tmp')], done(FinishReason.STOP, "END"),
         "stop_sequence", "END"),
        (CUT, done(FinishReason.LENGTH), "max_tokens", None),
        ([], done(FinishReason.LENGTH, usage=Usage(num_prompt_tokens=500, num_completion_tokens=12)),
         "model_context_window_exceeded", None),
        ([], done(FinishReason.LENGTH, usage=Usage(num_prompt_tokens=412, num_completion_tokens=100)),
         "max_tokens", None),
    ],
)  # fmt: skip
def test_stop_reasons(events: list[Event], last: Done, reason: str, sequence: str | None) -> None:
    answer = whole(asked(), [*events, last])
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


def test_warming_the_cache_shows_nothing() -> None:
    request = asked(max_tokens=0)
    for last in (done(FinishReason.LENGTH), done()):
        events: list[Event] = [ReasoningDelta("I"), last]
        answer = whole(request, events)
        assert accumulated(streamed(request, events)) == answer
        assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
        assert (answer["usage"]["output_tokens"], answer["usage"]["cache_read_input_tokens"]) == (0, 32)


@pytest.mark.parametrize("before", [[], [TextDelta("x")]])
def test_a_failure_ends_the_stream(before: list[Event]) -> None:
    frames = streamed(asked(), [*before, Failed("The engine failed in /opt/x/y.py", USAGE)])
    assert frames[-1] == (
        "error",
        {"error": {"type": "api_error", "message": "The engine failed in …"}, "request_id": "req"},
    )
    assert len(frames) == (2 if not before else 5)
    assert "message_stop" not in [name for name, _ in frames]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "b": "x"}', {"a": 1, "b": "x"}),
        ('{"a": 1, "b": "x', {"a": 1}),
        ('{"a": 1, "b": "x"', {"a": 1, "b": "x"}),
        ('{"a": 12', {"a": 12}),
        ('{"a": 12,', {"a": 12}),
        ('{"a": true', {"a": True}),
        ('{"a": null', {"a": None}),
        ('{"a": {"b": [1]}, "c": {"d', {"a": {"b": [1]}}),
        ('{"a', {}),
        ('{"a":', {}),
        ("{", {}),
        ("", {}),
        ('{"a": "}{", "b', {"a": "}{"}),
    ],
)
def test_whole_values_of_a_call_that_was_cut_off(text: str, found: dict[str, Any]) -> None:
    assert whole_values(text) == found

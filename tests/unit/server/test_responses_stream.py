"""Responses: the events of a generation as items and server-sent events, exact to the field."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saddle.parsing.events import (
    Done,
    Event,
    Failed,
    ReasoningDelta,
    TextDelta,
    Tokens,
    ToolArgs,
    ToolEnd,
    ToolStart,
)
from saddle.protocol import FinishReason, Usage
from saddle.server.responses_items import Seal
from saddle.server.responses_logprobs import AnswerLogprobs
from saddle.server.responses_stream import Answer

KEY = "0123456789abcdef"
USAGE = Usage(num_prompt_tokens=7, num_completion_tokens=5, num_cached_tokens=4, num_reasoning_tokens=2)
STOP, LENGTH = Done(FinishReason.STOP, USAGE), Done(FinishReason.LENGTH, USAGE)


def answer(**options: Any) -> Answer:
    return Answer(f"resp_{KEY}", KEY, {"model": "m", "tools": []}, **{"frames": True, **options})


def frames_of(data: bytes) -> list[dict[str, Any]]:
    """The frames of a stream; checks that each is named by its type and that they are numbered from 0."""
    frames = []
    parts = data.decode().split("\n\n")
    assert parts.pop() == ""
    for number, part in enumerate(parts):
        head, body = part.split("\n")
        frame = json.loads(body.removeprefix("data: "))
        assert head == f"event: {frame['type']}"
        assert frame.pop("sequence_number") == number
        frames.append(frame)
    return frames


def told(events: list[Event], **options: Any) -> list[dict[str, Any]]:
    made = answer(**options)
    return frames_of(made.start() + b"".join(made.encode(0, [event]) for event in events) + made.finish())


def whole(events: list[Event], **options: Any) -> dict[str, Any]:
    made = answer(**{**options, "frames": False})
    assert made.encode(0, events) == b""
    return dict(json.loads(made.body()))


def reasoning(text: str, status: str = "completed", sealed: str | None = None) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": f"rs_{KEY}_0", "type": "reasoning", "summary": [], "content": content, "encrypted_content": sealed,
            "status": status}  # fmt: skip


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def test_thinking_and_text() -> None:
    frames = told([ReasoningDelta("I see"), ReasoningDelta("."), TextDelta("\n\nHel"), TextDelta("lo\n"), STOP])
    rs: dict[str, Any] = {"item_id": f"rs_{KEY}_0", "output_index": 0}
    msg: dict[str, Any] = {"item_id": f"msg_{KEY}_1", "output_index": 1}
    message = {"id": f"msg_{KEY}_1", "type": "message", "status": "completed", "role": "assistant",
               "content": [part("Hello\n")]}  # fmt: skip
    response: dict[str, Any] = {
        "id": f"resp_{KEY}", "object": "response", "status": "in_progress", "completed_at": None, "error": None,
        "incomplete_details": None, "output": [], "usage": None, "model": "m", "tools": [],
    }  # fmt: skip
    last = frames.pop()
    assert frames == [
        {"type": "response.created", "response": response},
        {"type": "response.in_progress", "response": response},
        {"type": "response.output_item.added", "output_index": 0, "item": reasoning("", "in_progress")},
        {"type": "response.content_part.added", **rs, "content_index": 0,
         "part": {"type": "reasoning_text", "text": ""}},
        {"type": "response.reasoning_text.delta", **rs, "content_index": 0, "delta": "I see"},
        {"type": "response.reasoning_text.delta", **rs, "content_index": 0, "delta": "."},
        {"type": "response.reasoning_text.done", **rs, "content_index": 0, "text": "I see."},
        {"type": "response.content_part.done", **rs, "content_index": 0,
         "part": {"type": "reasoning_text", "text": "I see."}},
        {"type": "response.output_item.done", "output_index": 0, "item": reasoning("I see.")},
        {"type": "response.output_item.added", "output_index": 1,
         "item": {**message, "status": "in_progress", "content": []}},
        {"type": "response.content_part.added", **msg, "content_index": 0, "part": part("")},
        {"type": "response.output_text.delta", **msg, "content_index": 0, "logprobs": [], "delta": "Hel"},
        {"type": "response.output_text.delta", **msg, "content_index": 0, "logprobs": [], "delta": "lo\n"},
        {"type": "response.output_text.done", **msg, "content_index": 0, "logprobs": [], "text": "Hello\n"},
        {"type": "response.content_part.done", **msg, "content_index": 0, "part": part("Hello\n")},
        {"type": "response.output_item.done", "output_index": 1, "item": message},
    ]  # fmt: skip
    assert last["type"] == "response.completed"
    assert last["response"].pop("completed_at") > 1_700_000_000
    assert last["response"] == {
        **{name: value for name, value in response.items() if name != "completed_at"},
        "status": "completed",
        "output": [reasoning("I see."), message],
        "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
                  "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 12},
    }  # fmt: skip


def test_thinking_as_a_summary() -> None:
    frames = told([ReasoningDelta("Aha"), STOP], summary=True)
    rs: dict[str, Any] = {"item_id": f"rs_{KEY}_0", "output_index": 0, "summary_index": 0}
    text = {"type": "summary_text", "text": "Aha"}
    item = {**reasoning(""), "summary": [text]}
    assert frames[2:-1] == [
        {"type": "response.output_item.added", "output_index": 0, "item": reasoning("", "in_progress")},
        {"type": "response.reasoning_summary_part.added", **rs, "part": {**text, "text": ""}},
        {"type": "response.reasoning_summary_text.delta", **rs, "delta": "Aha"},
        {"type": "response.reasoning_summary_text.done", **rs, "text": "Aha"},
        {"type": "response.reasoning_summary_part.done", **rs, "part": text},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
    ]
    assert frames[-1]["response"]["output"] == [item]


def test_calls() -> None:
    frames = told([ToolStart(0, "call_a", "f"), ToolArgs(0, '{"x":'), ToolArgs(0, "1}"), ToolEnd(0),
                   ToolStart(1, "call_b", "g"), ToolArgs(1, "{}"), ToolEnd(1), STOP])  # fmt: skip
    fc: dict[str, Any] = {"item_id": f"fc_{KEY}_0", "output_index": 0}
    first = {"id": f"fc_{KEY}_0", "type": "function_call", "status": "completed", "arguments": '{"x":1}',
             "call_id": "call_a", "name": "f"}  # fmt: skip
    second = {**first, "id": f"fc_{KEY}_1", "arguments": "{}", "call_id": "call_b", "name": "g"}
    assert frames[2:7] == [
        {"type": "response.output_item.added", "output_index": 0,
         "item": {**first, "status": "in_progress", "arguments": ""}},
        {"type": "response.function_call_arguments.delta", **fc, "delta": '{"x":'},
        {"type": "response.function_call_arguments.delta", **fc, "delta": "1}"},
        {"type": "response.function_call_arguments.done", **fc, "name": "f", "arguments": '{"x":1}'},
        {"type": "response.output_item.done", "output_index": 0, "item": first},
    ]  # fmt: skip
    assert frames[-1]["type"] == "response.completed"
    assert frames[-1]["response"]["output"] == [first, second]


@pytest.mark.parametrize("in_call", [False, True])
def test_limit_ends_the_open_item_incomplete(in_call: bool) -> None:
    events: list[Event] = [TextDelta("half"), LENGTH]
    if in_call:
        events = [TextDelta("Now"), ToolStart(0, "call_a", "f"), ToolArgs(0, '{"x'), LENGTH]
    response = told(events)[-1]
    assert response["type"] == "response.incomplete"
    body = response["response"]
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in body["output"]] == (["completed", "incomplete"] if in_call else ["incomplete"])
    assert body["completed_at"] is None


def test_stop_string_inside_a_call() -> None:
    body = whole([ToolStart(0, "call_a", "f"), ToolArgs(0, '{"x'), Done(FinishReason.STOP, USAGE, "x")])
    assert body["status"] == "completed"
    assert [item["status"] for item in body["output"]] == ["incomplete"]


def test_failure_tells_no_secrets() -> None:
    frames = told([TextDelta("half"), Failed("no /usr/lib/secret.so at 0x7f00", USAGE)])
    assert [frame["type"] for frame in frames[-2:]] == ["response.output_item.done", "response.failed"]
    body = frames[-1]["response"]
    assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
    assert "secret" not in body["error"]["message"]
    assert "0x7f" not in body["error"]["message"]
    assert body["output"][0]["status"] == "incomplete"


def test_break_outside_of_the_events_ends_once() -> None:
    made = answer()
    made.start()
    assert b"response.failed" in made.failed("broken")
    assert made.failed("again") == b""
    assert made.encode(0, [TextDelta("late"), STOP]) == b""
    assert made.cancel() == b""
    assert json.loads(made.body())["error"]["message"] == "broken"


def test_cancelled() -> None:
    made = answer(queued=True)
    names = [frame["type"] for frame in frames_of(made.start() + made.encode(0, [TextDelta("a")]) + made.cancel())]
    assert names[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert names[-1] == "response.incomplete"
    assert json.loads(made.body())["status"] == "cancelled"
    assert whole([TextDelta("a"), Done(FinishReason.ABORT, USAGE)])["status"] == "cancelled"


def test_body_while_it_runs_shows_what_is_there() -> None:
    made = answer(queued=True, frames=False)
    assert json.loads(made.body())["status"] == "queued"
    made.encode(0, [ReasoningDelta("Hm"), TextDelta("so f")])
    body = json.loads(made.body())
    assert body["status"] == "in_progress"
    assert [(item["type"], item["status"]) for item in body["output"]] == [("reasoning", "completed"),
                                                                        ("message", "in_progress")]  # fmt: skip
    assert body["output"][1]["content"][0]["text"] == "so f"


def test_seal_only_where_it_was_asked_for() -> None:
    seal = Seal()
    (item,) = whole([ReasoningDelta("Grüße"), STOP], seal=seal)["output"]
    assert seal.open(item["encrypted_content"]) == "Grüße"
    (item,) = whole([ReasoningDelta("Grüße"), STOP])["output"]
    assert item["encrypted_content"] is None
    frames = told([ReasoningDelta("Grüße"), STOP], seal=seal)
    sealed = [frame["item"]["encrypted_content"] for frame in frames if "item" in frame]
    assert sealed[0] is None, "what has just begun is not sealed"
    assert seal.open(sealed[1]) == "Grüße"


def test_blank_text_is_no_item() -> None:
    assert [item["type"] for item in whole([ReasoningDelta("Hm"), TextDelta("\n\n"), STOP])["output"]] == ["reasoning"]


def test_token_ids_where_they_were_asked_for() -> None:
    body = whole([Tokens([3, 4]), TextDelta("a"), Tokens([5]), STOP], prompt_ids=[1, 2])
    assert (body["prompt_token_ids"], body["token_ids"]) == ([1, 2], [3, 4, 5])
    assert "token_ids" not in whole([Tokens([3]), STOP])


class EveryToken:
    """Log-probabilities of all tokens, as bare ids."""

    def of(self, tokens: Tokens) -> list[int]:
        return tokens.token_ids


def test_logprobs_come_with_the_text_that_their_tokens_end() -> None:
    """A token whose text is held back, or that has none, is reported with the next text or at the end of the item."""
    events: list[Event] = [ReasoningDelta("a"), Tokens([1]), TextDelta("b"), Tokens([2]), Tokens([3]), TextDelta("c"),
                           Tokens([4]), STOP]  # fmt: skip
    frames = told(events, logprobs=cast(AnswerLogprobs, EveryToken()))
    assert [f["logprobs"] for f in frames if f["type"] == "response.output_text.delta"] == [[1], [2, 3]]
    assert [f["logprobs"] for f in frames if f["type"] == "response.output_text.done"] == [[1, 2, 3, 4]]
    assert frames[-1]["response"]["output"][1]["content"][0]["logprobs"] == [1, 2, 3, 4]


def test_end_is_told_once_and_before_the_last_frame() -> None:
    told_of: list[str] = []
    made = answer(on_end=lambda answer: told_of.append(answer.status))
    made.start()
    assert b"response.completed" in made.encode(0, [TextDelta("a"), STOP, STOP])
    made.finish()
    assert told_of == ["completed"]


def accumulated(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client adds it up from the deltas alone."""
    output: list[dict[str, Any]] = []
    for frame in frames:
        kind = frame["type"]
        if kind == "response.output_item.added":
            assert frame["output_index"] == len(output)
            output.append(frame["item"])
        elif kind == "response.content_part.added":
            output[frame["output_index"]]["content"].append(frame["part"])
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            output[frame["output_index"]]["content"][frame["content_index"]]["text"] += frame["delta"]
        elif kind == "response.function_call_arguments.delta":
            output[frame["output_index"]]["arguments"] += frame["delta"]
        elif kind == "response.output_item.done":
            output[frame["output_index"]]["status"] = frame["item"]["status"]
            assert frame["item"] == output[frame["output_index"]]
    return output


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
CALLS = st.lists(TEXTS, max_size=3).map(lambda parts: ("call", parts))
SPOKEN = TEXTS.map(lambda text: ("text", [text]))


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=3), st.lists(st.one_of(SPOKEN, CALLS), max_size=6), st.sampled_from([STOP, LENGTH]))
def test_stream_adds_up_to_the_answer_in_one_piece(thinking: list[str], rest: list[Any], last: Done) -> None:
    events: list[Event] = [ReasoningDelta(text) for text in thinking]
    calls = 0
    for kind, parts in rest:
        if kind == "text":
            events.append(TextDelta(parts[0]))
            continue
        events += [ToolStart(calls, f"call_{calls}", "f"), *(ToolArgs(calls, text) for text in parts), ToolEnd(calls)]
        calls += 1
    frames, body = told([*events, last]), whole([*events, last])
    for each in (frames[-1]["response"], body):
        del each["completed_at"]
    assert frames[-1]["response"] == body
    assert accumulated(frames) == body["output"]
    assert len({item["id"] for item in body["output"]}) == len(body["output"])

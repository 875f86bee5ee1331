"""OpenAI's Python SDK on the responses API of real server processes: one with a small random model, one scripted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.serve.conftest import SCRIPTED
from tests.serve.processes import ServerProcess, wait_for
from tests.support.checkpoint import write_random_checkpoint
from tests.unit.server.test_responses_http import WRONG

FLAT: list[Any] = [
    {"type": "function", "name": "read", "description": "Read a file.", "strict": False,
     "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "line": {"type": "integer"}}}}
]  # fmt: skip


def clients(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ends_well(server: ServerProcess) -> None:
    server.wait_idle()
    assert server.stop() == 0, server.log()
    assert server.leaves_no_process()
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m2")
    server = ServerProcess([str(folder), "--served-model-name", "saddle-test", "alias", "--max-model-len", "2048",
                            "--kv-cache-memory-bytes", str(64 << 20), "--response-store-bytes", "1M",
                            "--disable-uvicorn-access-log"])  # fmt: skip
    yield server
    ends_well(server)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    yield from clients(server)


@pytest.fixture(scope="module")
def scripted(tokenizer_folder: Path) -> Iterator[openai.OpenAI]:
    server = ServerProcess([str(tokenizer_folder), "--step-s", "0.002"], SCRIPTED)
    yield from clients(server)
    ends_well(server)


def greedy(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(model="saddle-test", input="Tell me something.", temperature=0, **fields)


def said(response: Any) -> str:
    """All text of a response; a random model rarely ends its thinking."""
    return "".join(part.text for item in response.output for part in item.content or ())


def plain(response: Any) -> dict[str, Any]:
    """A response without what differs from one request to the next."""
    body: dict[str, Any] = response.to_dict()
    for name in ("id", "created_at", "completed_at", "usage", "background", "user"):
        body.pop(name, None)
    for item in body["output"]:
        item.pop("id"), item.pop("call_id", None)
    return body


def test_created_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = greedy(client, max_output_tokens=40)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert said(whole)
    assert whole.usage.output_tokens == 40
    assert whole.usage.total_tokens == whole.usage.input_tokens + 40
    with client.responses.stream(model="saddle-test", input="Tell me something.", temperature=0,
                                 max_output_tokens=40) as events:  # fmt: skip
        seen: list[Any] = list(events)
    last = seen[-1]
    assert last.type == "response.incomplete"
    assert plain(last.response) == plain(whole)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    deltas = "".join(event.delta for event in seen if event.type.endswith("text.delta"))
    assert deltas == said(whole)
    assert last.response.usage.input_tokens_details.cached_tokens > 0


def test_accumulator_ends_with_what_is_kept(scripted: openai.OpenAI) -> None:
    asked: Any = {"model": "scripted", "input": 'call read {"path": "/a ü", "line": 3}', "tools": FLAT}
    with scripted.responses.stream(**asked) as events:
        seen = list(events)
        final = events.get_final_response()
    whole = scripted.responses.create(**asked)
    assert final.status == "completed"
    assert [item.type for item in final.output] == ["reasoning", "function_call"]
    kept = scripted.responses.retrieve(final.id)
    bodies = [plain(response) for response in (final, whole, kept)]
    for body in bodies:
        for item in body["output"]:
            item.pop("parsed_arguments", None)
    assert bodies[0] == bodies[1] == bodies[2]
    assert {event.type for event in seen} == {
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.reasoning_text.delta", "response.reasoning_text.done", "response.content_part.done",
        "response.output_item.done", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.completed",
    }  # fmt: skip


def test_tool_loop(scripted: openai.OpenAI) -> None:
    reply = scripted.responses.create(model="scripted", input='call read {"path": "/a", "line": 1}', tools=FLAT)
    call: Any = reply.output[1]
    for line in (2, 3):
        said_next = f'again read {{"path": "/a", "line": {line}}}' if line < 3 else "the end"
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": said_next}
        reply = scripted.responses.create(model="scripted", input=[result], previous_response_id=reply.id, tools=FLAT)
        call = reply.output[1]
    assert reply.output_text == "The tool said: the end"
    items = scripted.responses.input_items.list(reply.id, order="asc", limit=2)
    kinds = [item.type for item in items]  # all pages
    assert kinds == ["message", *["reasoning", "function_call", "function_call_output"] * 2]


def test_summary(scripted: openai.OpenAI) -> None:
    kinds = set()
    with scripted.responses.stream(model="scripted", input="count 3", reasoning={"summary": "auto"}) as events:
        for event in events:
            kinds.add(event.type)
        reply = events.get_final_response()
    thinking: Any = reply.output[0]
    assert (thinking.summary[0].text, thinking.content) == ("I count.", [])
    assert "response.reasoning_summary_text.delta" in kinds
    assert "response.reasoning_text.delta" not in kinds
    assert reply.output_text == "1 2 3"
    assert reply.usage is not None
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens


def test_stored_read_and_deleted(client: openai.OpenAI) -> None:
    made = greedy(client, max_output_tokens=5, metadata={"a": "b"})
    kept = client.responses.retrieve(made.id)
    assert kept.to_dict() == made.to_dict()
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(made.id)
    assert caught.value.param == "response_id"
    unstored = greedy(client, max_output_tokens=5, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_store_forgets(client: openai.OpenAI) -> None:
    """1 MiB, and 150 kB a response."""
    ids = [client.responses.create(model="saddle-test", input="hi", instructions=" ", max_output_tokens=1,
                                   user="x" * 150_000).id for _ in range(10)]  # fmt: skip
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ids[0])
    assert client.responses.retrieve(ids[-1]).id == ids[-1]


def test_background(scripted: openai.OpenAI) -> None:
    made = scripted.responses.create(model="scripted", input="count 20", background=True)
    assert made.status in ("queued", "in_progress")
    wait_for(lambda: scripted.responses.retrieve(made.id).status == "completed", 10, "completed")
    assert scripted.responses.retrieve(made.id).output_text.split()[-1] == "20"


def test_background_stream_resumed(scripted: openai.OpenAI) -> None:
    stream = scripted.responses.create(model="scripted", input="count 30", background=True, stream=True)
    seen: list[Any] = []
    for event in stream:
        seen.append(event)
        if len(seen) == 12:
            break
    stream.close()
    name = seen[0].response.id
    seen += scripted.responses.retrieve(name, stream=True, starting_after=seen[-1].sequence_number)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].response.output_text.split()[-1] == "30"


def test_cancelled(client: openai.OpenAI, server: ServerProcess) -> None:
    made = greedy(client, background=True, max_output_tokens=1900, extra_body={"ignore_eos": True})
    wait_for(lambda: client.responses.retrieve(made.id).status == "in_progress", 10, "in progress")
    began = time.monotonic()
    assert client.responses.cancel(made.id).status == "cancelled"
    server.wait_idle(5)
    assert time.monotonic() - began < 2, "cancelling frees the engine at once"
    assert client.responses.retrieve(made.id).status == "cancelled"


def test_input_is_counted(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="saddle-test", input="Tell me something.")
    assert counted.input_tokens == greedy(client, max_output_tokens=1).usage.input_tokens


def test_bad_requests_leave_the_engine_alone(server: ServerProcess) -> None:
    """The same table as the unit test, through the real process."""
    before = server.metrics()["engine_steps_total"]
    wrong = []
    for body, status, param, part in WRONG:
        got, reply = server.post("/v1/responses", {"input": "hi", **body})
        error = reply.get("error", {})
        if not (got == status and error["param"] == param and part in error["message"]):
            wrong.append((body, got, reply))
    assert not wrong, "\n".join(map(str, wrong))
    assert len(WRONG) >= 40
    assert server.metrics()["engine_steps_total"] == before


def test_too_long_an_input(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens") as caught:
        client.responses.create(model="saddle-test", input="word " * 4000)
    assert caught.value.param == "input_tokens"


# structured output ----------------------------------------------------------------------------------------------


class Place(pydantic.BaseModel):
    name: Literal["Rome", "Oslo"]
    floor: Literal[1, 2, 3]


SAMPLED: Any = {"model": "saddle-test", "input": "Where?", "temperature": 1.5, "reasoning": {"effort": "none"}}


@pytest.mark.parametrize("stream", [False, True])
def test_text_follows_a_schema(client: openai.OpenAI, stream: bool) -> None:
    """A random model can but do as the grammar says."""
    arguments = {**SAMPLED, "text_format": Place, "max_output_tokens": 200}
    if stream:
        with client.responses.stream(**arguments) as events:
            reply: Any = events.get_final_response()
    else:
        reply = client.responses.parse(**arguments)
    assert reply.status == "completed", reply
    assert isinstance(reply.output_parsed, Place)
    assert reply.output_text[0] == "{"


def test_calls_that_must_be_made(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "go", "strict": True, "parameters": Place.model_json_schema()}
    stay: dict[str, Any] = {"type": "function", "name": "stay"}
    tools: list[Any] = [tool, {**tool, **stay}]
    choices: list[Any] = ["required", stay, {"type": "allowed_tools", "mode": "required", "tools": [stay]}]
    for choice in choices:
        reply = client.responses.create(**SAMPLED, tools=tools, tool_choice=choice,
                                        parallel_tool_calls=False, max_output_tokens=300)  # fmt: skip
        (call,) = [item for item in reply.output if item.type == "function_call"]
        Place.model_validate_json(call.arguments)
        assert call.status == "completed"
        if choice != "required":
            assert call.name == "stay"


def test_no_effort_is_no_thinking(client: openai.OpenAI) -> None:
    reply = client.responses.create(**SAMPLED, max_output_tokens=20)
    assert [item.type for item in reply.output] in (["message"], [])
    assert reply.usage is not None
    assert reply.usage.output_tokens_details.reasoning_tokens == 0


# a model that was trained -----------------------------------------------------------------------------------------


def test_demo_checkpoint_runs_a_tool_loop() -> None:
    """`saddle serve` without a model, and nothing scripted: the model calls, gets the result and reports it."""
    server = ServerProcess([])
    weather: Any = {"type": "function", "name": "get_weather", "description": "Get the current weather in a city.",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                                   "required": ["city"]}}  # fmt: skip
    fields: Any = {"model": "saddle-demo", "tools": [weather], "temperature": 0}
    try:
        with openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:
            first = client.responses.create(input="What is the weather in Paris?", **fields)
            (call,) = [item for item in first.output if item.type == "function_call"]
            assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
            result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 21}'}
            last = client.responses.create(input=[result], previous_response_id=first.id, **fields)
    finally:
        ends_well(server)
    assert "21" in last.output_text
    assert first.usage is not None
    assert last.usage is not None
    # All of the first response is computed but its last token, and full blocks of 16 tokens are kept.
    assert last.usage.input_tokens_details.cached_tokens == (first.usage.total_tokens - 1) // 16 * 16

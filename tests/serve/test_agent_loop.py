"""A long conversation with tools through the HTTP API: every turn re-uses the cache as far as the template allows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from saddle.parsing.tokenizer import Tokenizer
from tests.serve.conftest import SCRIPTED
from tests.serve.processes import ROOT, ServerProcess

BLOCK = 16
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "read",
            "description": "Read a file.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "line": {"type": "integer"}}},
        },
    }
]


RELEASED = ROOT.parent / "shared" / "reference" / "minimax-m2.7"


@pytest.fixture(scope="module", params=["small tokenizer", "released tokenizer"])
def folder(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Path:
    if request.param == "small tokenizer":
        return tokenizer_folder
    if not (RELEASED / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of the release is not at {RELEASED}")
    return RELEASED


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    server = ServerProcess([str(folder)], SCRIPTED)
    yield server
    assert server.stop() == 0, server.log()
    assert server.leaves_no_process()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


class Conversation:
    """Sends turns, and predicts from the token ids of earlier turns how much of each prompt is cached.

    The engine has computed all tokens of a turn but the last one generated; full blocks of them are cached.
    """

    def __init__(self, client: openai.OpenAI, stream: bool) -> None:
        self.client, self.stream = client, stream
        self.messages: list[Any] = [{"role": "system", "content": "You read files for the user, one at a time."}]
        self.computed: list[list[int]] = []
        self.num_prompt = 0
        self.shared = 0  # ids that the latest prompt shares with the turn before it
        self.cached: list[int] = []
        self.predicted: list[int] = []

    def send(self, message: dict[str, Any]) -> Any:
        self.messages.append(message)
        extra = {"return_token_ids": True, "cache_salt": f"stream {self.stream}"}
        arguments: Any = {
            "model": "scripted", "messages": self.messages, "tools": TOOLS, "extra_body": extra,
        }  # fmt: skip
        if self.stream:
            arguments["stream_options"] = {"include_usage": True}
            prompt_ids: list[int] = []
            token_ids: list[int] = []
            with self.client.chat.completions.stream(**arguments) as events:
                for event in events:
                    if event.type == "chunk":
                        prompt_ids = (event.chunk.model_extra or {}).get("prompt_token_ids") or prompt_ids
                        for choice in event.chunk.choices:
                            token_ids += (choice.model_extra or {}).get("token_ids") or []
                reply = events.get_final_completion()
        else:
            reply = self.client.chat.completions.create(**arguments)
            prompt_ids = (reply.model_extra or {})["prompt_token_ids"]
            token_ids = (reply.choices[0].model_extra or {})["token_ids"]
        before = max((common(prompt_ids, known) for known in self.computed), default=0)
        self.shared = common(prompt_ids, self.computed[-1]) if self.computed else 0
        self.predicted.append(before // BLOCK * BLOCK)
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        self.cached.append(reply.usage.prompt_tokens_details.cached_tokens or 0)
        self.computed.append(prompt_ids + token_ids[:-1])
        self.num_prompt += len(prompt_ids)
        answer = reply.choices[0].message
        back: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.tool_calls:
            back["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in answer.tool_calls]
            for call in back["tool_calls"]:
                call["function"] = {key: call["function"][key] for key in ("name", "arguments")}
        reasoning = (answer.model_extra or {}).get("reasoning_content")
        if reasoning:
            back["reasoning_content"] = reasoning
        self.messages.append(back)
        return reply.choices[0]


@pytest.mark.parametrize("stream", [False, True])
def test_thirty_turns(client: openai.OpenAI, server: ServerProcess, folder: Path, stream: bool) -> None:
    think_id = Tokenizer.load(folder).think_id
    chat = Conversation(client, stream)
    turns = 0
    for round_number in range(6):
        earlier = len(chat.computed)
        choice = chat.send({"role": "user", "content": f'call read {{"path": "/src/{round_number}.py", "line": 0}}'})
        turns += 1
        if earlier:
            # A new user message: the template drops the thinking of the round before, and nothing before that is
            # lost. (The newline in front of it may merge with what follows now.)
            assert think_id in chat.computed[earlier - 1][chat.shared : chat.shared + 2]
        for step in range(1, 5):
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            assert json.loads(call.function.arguments) == {"path": f"/src/{round_number}.py", "line": step - 1}
            more = f'again read {{"path": "/src/{round_number}.py", "line": {step}}}' if step < 4 else "all read"
            previous = chat.computed[-1]
            choice = chat.send({"role": "tool", "tool_call_id": call.id, "content": f"line {step}: ü “x” {more}"})
            turns += 1
            # Inside a tool loop the prompt goes on exactly where the model stopped.
            assert chat.shared == len(previous)
        assert choice.finish_reason == "stop"
        assert "all read" in choice.message.content
    assert turns == 30
    assert chat.cached == chat.predicted, list(zip(chat.cached, chat.predicted, strict=True))
    share = sum(chat.cached) / chat.num_prompt
    assert share > 0.85, f"only {share:.0%} of all prompt tokens came from the cache"
    print(f"30 turns: {sum(chat.cached)} of {chat.num_prompt} prompt tokens from the cache, {share:.1%}")
    server.wait_idle()


def test_reasoning_is_apart_and_counted(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "count 5"}])
    message = reply.choices[0].message
    extra = message.model_extra or {}
    assert (message.content or "").strip() == "1 2 3 4 5"
    assert extra["reasoning"].strip() == extra["reasoning_content"].strip() == "I count."
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    reasoning = reply.usage.completion_tokens_details.reasoning_tokens
    assert reasoning is not None and 0 < reasoning < reply.usage.completion_tokens


def test_tool_call_streams_its_arguments(client: openai.OpenAI) -> None:
    text = "x" * 200
    asked = f'call read {{"path": "{text}", "line": 3}}'
    parts: list[str] = []
    names = []
    for chunk in client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": asked}], tools=TOOLS, stream=True
    ):
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.function and call.function.name:
                names.append(call.function.name)
            parts.append((call.function.arguments if call.function else "") or "")
    assert names == ["read"]
    assert json.loads("".join(parts)) == {"path": text, "line": 3}
    assert sum(1 for part in parts if "x" in part) > 5, "a long argument comes in many parts"

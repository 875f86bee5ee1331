"""A long conversation with tools through the responses API: every turn re-uses the cache, whoever keeps the turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from saddle.parsing.tokenizer import Tokenizer
from tests.serve.conftest import SCRIPTED
from tests.serve.processes import ServerProcess
from tests.serve.test_agent_loop import BLOCK, RELEASED, TOOLS, common

FLAT: list[Any] = [{"type": "function", "strict": False, **TOOLS[0]["function"]}]


@pytest.fixture(scope="module")
def server(tokenizer_folder: Path) -> Iterator[ServerProcess]:
    server = ServerProcess([str(tokenizer_folder)], SCRIPTED)
    yield server
    assert server.stop() == 0, server.log()
    assert server.leaves_no_process()
    assert "Traceback" not in server.log()


def respelt(arguments: str) -> str:
    """The same arguments as another JSON library writes them."""
    value = json.loads(arguments)
    return json.dumps({key: value[key] for key in reversed(value)}, indent=3)


def without_id(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "status")}


def sent_back(output: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    """What a client keeps of an answer: all, the thinking sealed alone (as coding agents do), or no thinking at all."""
    if how == "whole":
        return output
    kept = []
    for item in map(without_id, output):
        if item["type"] == "reasoning":
            if how == "sealed":
                assert item["encrypted_content"]
                kept.append({**item, "summary": [], "content": None})
        elif item["type"] == "function_call" and how == "bare":
            kept.append({**item, "arguments": respelt(item["arguments"])})
        else:
            kept.append(item)
    return kept


class Loop:
    """Sends turns and predicts from the ids of earlier ones how much of each prompt is cached.

    The engine has computed all tokens of a turn but the last one generated; full blocks of them are cached.
    """

    def __init__(self, client: openai.OpenAI, how: str, stream: bool) -> None:
        self.client, self.how, self.stream = client, how, stream
        self.salt = f"{how} {stream}"
        self.items: list[dict[str, Any]] = []
        self.previous: str | None = None
        self.computed: list[list[int]] = []
        self.shared = self.num_prompt = 0
        self.cached: list[int] = []
        self.predicted: list[int] = []

    def send(self, item: dict[str, Any]) -> Any:
        arguments: Any = {
            "model": "scripted", "instructions": "You read files for the user, one at a time.", "tools": FLAT,
            "include": ["reasoning.encrypted_content"], "parallel_tool_calls": True,
            "extra_body": {"return_token_ids": True, "cache_salt": self.salt},
        }  # fmt: skip
        if self.how == "previous":
            arguments |= {"input": [item], "previous_response_id": self.previous or openai.omit}
        else:
            self.items.append(item)
            arguments |= {"input": self.items, "store": False}
        reply: Any
        if self.stream:
            with self.client.responses.stream(**arguments) as events:
                events.until_done()
                reply = events.get_final_response()
        else:
            reply = self.client.responses.create(**arguments)
        extra = reply.model_extra or {}
        prompt_ids, token_ids = extra["prompt_token_ids"], extra["token_ids"]
        before = max((common(prompt_ids, known) for known in self.computed), default=0)
        self.shared = common(prompt_ids, self.computed[-1]) if self.computed else 0
        self.predicted.append(before // BLOCK * BLOCK)
        self.cached.append(reply.usage.input_tokens_details.cached_tokens)
        self.computed.append(prompt_ids + token_ids[:-1])
        self.num_prompt += len(prompt_ids)
        self.previous = reply.id
        self.items += sent_back([item.to_dict() for item in reply.output], self.how)
        return reply


@pytest.mark.parametrize(
    ("how", "stream"),
    [("previous", True), ("whole", True), ("sealed", False), ("bare", False)],
)
def test_thirty_turns(client: openai.OpenAI, server: ServerProcess, tokenizer_folder: Path, how: str,
                      stream: bool) -> None:  # fmt: skip
    thirty_turns(Loop(client, how, stream), tokenizer_folder)
    server.wait_idle()


def test_thirty_turns_of_the_released_tokenizer() -> None:
    if not (RELEASED / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of the release is not at {RELEASED}")
    server = ServerProcess([str(RELEASED)], SCRIPTED)
    try:
        with openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:
            thirty_turns(Loop(client, "sealed", True), RELEASED)
    finally:
        assert server.stop() == 0, server.log()


def thirty_turns(loop: Loop, folder: Path) -> None:
    think_id = Tokenizer.load(folder).think_id
    turns = 0
    for number in range(6):
        earlier = len(loop.computed)
        said = f'call read {{"path": "/src/{number}.py", "line": 0}}'
        reply = loop.send({"role": "user", "content": said})
        turns += 1
        if earlier:
            # A new user message: the template drops the thinking of the round before, and nothing before that is
            # lost. (The newline in front of it may merge with what follows now.)
            assert think_id in loop.computed[earlier - 1][loop.shared : loop.shared + 2]
        for step in range(1, 5):
            assert [item.type for item in reply.output] == ["reasoning", "function_call"]
            call = reply.output[1]
            assert json.loads(call.arguments) == {"path": f"/src/{number}.py", "line": step - 1}
            more = f'again read {{"path": "/src/{number}.py", "line": {step}}}' if step < 4 else "all read"
            ran = loop.computed[-1]
            reply = loop.send({"type": "function_call_output", "call_id": call.call_id,
                               "output": f"line {step}: ü “x” {more}"})  # fmt: skip
            turns += 1
            assert loop.shared == len(ran), "inside a tool loop the prompt goes on exactly where the model stopped"
        assert "all read" in reply.output_text
    assert turns == 30
    assert loop.cached == loop.predicted, list(zip(loop.cached, loop.predicted, strict=True))
    share = sum(loop.cached) / loop.num_prompt
    assert share > 0.85, f"only {share:.0%} of all prompt tokens came from the cache"
    print(f"{loop.salt}: {sum(loop.cached)} of {loop.num_prompt} prompt tokens cached, {share:.1%}")


def test_whoever_keeps_the_conversation_the_prompts_are_the_same(client: openai.OpenAI) -> None:
    """Two turns in each way; the calls differ by their ids alone."""
    prompts = []
    for how in ("previous", "whole", "sealed", "bare"):
        loop = Loop(client, how, False)
        call = loop.send({"role": "user", "content": 'call read {"path": "a", "line": 1}'}).output[1]
        loop.send({"type": "function_call_output", "call_id": call.call_id, "output": "text"})
        prompts.append(loop.computed[1])
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]

"""A long conversation with tools through the Messages API, whatever of it the client sends back: every turn re-uses the
cache as far as the template allows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from saddle.parsing.tokenizer import Tokenizer
from saddle.server.anthropic_messages import to_functions, to_turns
from saddle.server.anthropic_parts import Signer
from tests.serve.conftest import SCRIPTED
from tests.serve.device import answer, spelt
from tests.serve.processes import ServerProcess
from tests.serve.test_agent_loop import BLOCK, RELEASED, common

SYSTEM: list[Any] = [
    {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.6d8;"},
    {"type": "text", "text": "You read files for the user, one at a time.", "cache_control": {"type": "ephemeral"}},
]
TOOLS: list[Any] = [
    {
        "name": "read",
        "description": "Read a file.",
        "input_schema": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "line": {"type": "integer"}, "where": {"type": "object"}},
        },
    }
]
NUM_ROUNDS, NUM_CALLS = 6, 4


@pytest.fixture(scope="module", params=["small"])
def checkpoint(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Path:
    if request.param == "small":
        return tokenizer_folder
    if not (RELEASED / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of the release is not at {RELEASED}")
    return RELEASED


@pytest.fixture(scope="module")
def agent_server(checkpoint: Path) -> Iterator[ServerProcess]:
    process = ServerProcess([str(checkpoint)], SCRIPTED)
    yield process
    assert process.stop() == 0, process.log()
    assert process.leaves_no_process()
    assert "Traceback" not in process.log()


@pytest.fixture(scope="module")
def sdk(agent_server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=agent_server.base, api_key="none", max_retries=0) as client:
        yield client


def reordered(value: Any) -> Any:
    """The same JSON value with its members the other way round."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return value


def kept(blocks: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    """What a client sends back of an answer.

    whole   as it came
    bare    without thinking
    careless   thinking and text with other white space, texts as one, arguments in another order, unknown fields
    omitted   as it came: thinking without its text, which is in the signature
    """
    if how in ("whole", "omitted"):
        return blocks
    if how == "bare":
        return [block for block in blocks if block["type"] != "thinking"]
    found: list[dict[str, Any]] = []
    text = "".join(block["text"] for block in blocks if block["type"] == "text").strip()
    for block in blocks:
        if block["type"] == "thinking":
            found.append({**block, "thinking": block["thinking"].strip() + "\n"})
        elif block["type"] == "tool_use":
            found.append({**block, "input": reordered(block["input"]), "caller": {"type": "direct"}})
    where = sum(block["type"] == "thinking" for block in found)
    return [*found[:where], *([{"type": "text", "text": text}] if text else []), *found[where:]]


class Agent:
    """Sends turns, and predicts from the token ids of earlier turns how much of each prompt is cached.

    The device writes what `answer` says, so the ids of each turn are known without being sent. The engine has computed
    all of a turn but its last token; full blocks are cached.
    """

    def __init__(self, sdk: anthropic.Anthropic, server: ServerProcess, tokenizer: Tokenizer, how: str, stream: bool):
        self.sdk, self.server, self.tokenizer = sdk, server, tokenizer
        self.how, self.stream = how, stream
        self.messages: list[Any] = []
        self.computed: list[list[int]] = []
        self.num_prompt = 0
        self.shared = 0  # ids that the latest prompt shares with the turn before it
        self.cached: list[int] = []
        self.predicted: list[int] = []

    def send(self, *content: Any, system: str | None = None) -> Any:
        self.messages.append({"role": "user", "content": [*content]})
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        prompt_ids = self._prompt_ids()
        before = max((common(prompt_ids, known) for known in self.computed), default=0)
        self.shared = common(prompt_ids, self.computed[-1]) if self.computed else 0
        self.predicted.append(before // BLOCK * BLOCK)
        reply = self._ask()
        text = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        self.computed.append(prompt_ids + spelt(self.tokenizer, answer(text)))
        usage = reply.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == len(prompt_ids)
        assert usage.cache_creation_input_tokens == 0
        self.cached.append(usage.cache_read_input_tokens)
        self.num_prompt += len(prompt_ids)
        blocks = [block.model_dump(exclude_none=True) for block in reply.content]
        self.messages.append({"role": "assistant", "content": kept(blocks, self.how)})
        return reply

    def _ask(self) -> Any:
        fields: dict[str, Any] = {
            "model": "scripted",
            "max_tokens": 2000,
            "system": SYSTEM,
            "tools": TOOLS,
            "messages": self.messages,
            "extra_body": {"cache_salt": f"{self.how} {self.stream}"},
        }
        if self.how == "omitted":
            fields["thinking"] = {"type": "adaptive", "display": "omitted"}
        if not self.stream:
            return self.sdk.messages.create(**fields)
        with self.sdk.messages.stream(**fields) as stream:
            return stream.get_final_message()

    def _prompt_ids(self) -> list[int]:
        """Ids of the prompt, from the renderer that knows the turns that were generated."""
        messages = self.messages
        if self.how == "omitted":  # only the server can open its signatures: say nothing instead, as other clients do
            messages = [
                {**turn, "content": [b for b in turn["content"] if b["type"] != "thinking"]}
                if turn["role"] == "assistant" else turn for turn in messages
            ]  # fmt: skip
        turns = to_turns(SYSTEM, messages, Signer()).messages
        functions = [{"type": "function", "function": function} for function in to_functions(TOOLS).functions]
        status, body = self.server.post("/tokenize", {"messages": turns, "tools": functions})
        assert status == 200, body
        return list(body["tokens"])


@pytest.mark.parametrize(
    ("checkpoint", "how", "stream"),
    [
        ("small", "whole", False),
        ("small", "whole", True),
        ("small", "bare", True),
        ("small", "careless", True),
        ("small", "omitted", True),
        ("released", "whole", True),
        ("released", "careless", True),
    ],
    indirect=["checkpoint"],
)
def test_thirty_turns(sdk: anthropic.Anthropic, agent_server: ServerProcess, checkpoint: Path, how: str,
                      stream: bool) -> None:  # fmt: skip
    tokenizer = Tokenizer.load(checkpoint)
    agent = Agent(sdk, agent_server, tokenizer, how, stream)
    turns = 0
    for number in range(NUM_ROUNDS):
        earlier = len(agent.computed)
        where = f'"where": {{"a": 1.0, "b": [true, "x"]}}, "path": "/src/{number}.py"'
        reply = agent.send({"type": "text", "text": f'call read {{{where}, "line": 0}}'})
        turns += 1
        if earlier:
            # A new user message: the template drops the thinking of the round before, and nothing before that is lost.
            lost_at = agent.computed[earlier - 1][agent.shared : agent.shared + 2]
            assert tokenizer.think_id in lost_at
        for step in range(1, NUM_CALLS + 1):
            assert reply.stop_reason == "tool_use"
            (call,) = [block for block in reply.content if block.type == "tool_use"]
            assert call.input == {"path": f"/src/{number}.py", "line": step - 1, "where": {"a": 1, "b": [True, "x"]}}
            more = f'again read {{{where}, "line": {step}}}' if step < NUM_CALLS else "all read"
            previous = agent.computed[-1]
            result = {"type": "tool_result", "tool_use_id": call.id, "content": f"line {step}: ü “x” {more}"}
            reminder = {"type": "text", "text": "<system-reminder>Go on.</system-reminder>"}
            reply = agent.send(result, *([reminder] if step == 2 else []), system="Hurry." if step == 3 else None)
            turns += 1
            # Inside a tool loop the prompt goes on exactly where the model stopped.
            assert agent.shared == len(previous)
        assert reply.stop_reason == "end_turn"
        assert "all read" in reply.content[-1].text
    assert turns == NUM_ROUNDS * (NUM_CALLS + 1) == 30
    assert agent.cached == agent.predicted, list(zip(agent.cached, agent.predicted, strict=True))
    share = sum(agent.cached) / agent.num_prompt
    assert share > 0.85, f"only {share:.0%} of all prompt tokens came from the cache"
    print(f"{how}: {sum(agent.cached)} of {agent.num_prompt} prompt tokens from the cache, {share:.1%}")
    agent_server.wait_idle()


def test_billing_headers_do_not_part_sessions(sdk: anthropic.Anthropic, agent_server: ServerProcess) -> None:
    """Two sessions of one agent that differ in their billing header alone share their prompt."""
    cached = []
    for suffix in ("6d8", "c38"):
        system: list[Any] = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.197.{suffix};"},
            {"type": "text", "text": "You are an agent with a long prompt. " * 20},
        ]
        reply = sdk.messages.create(model="scripted", max_tokens=50, system=system,
                                    messages=[{"role": "user", "content": "hello"}])  # fmt: skip
        cached.append((reply.usage.cache_read_input_tokens or 0, reply.usage.input_tokens))
    assert cached[0][0] < cached[1][0]
    assert cached[1][1] <= BLOCK, "all but the last block"


def test_the_sdks_own_loop_over_tools(sdk: anthropic.Anthropic) -> None:
    """The helper of the SDK calls the function, sends its result and ends with the answer."""
    seen: list[tuple[str, int]] = []

    @anthropic.beta_tool
    def read(path: str, line: int) -> str:
        """Read a file."""
        seen.append((path, line))
        return f"line {line}. " + ('again read {"path": "b.py", "line": 2}' if line == 1 else "The end.")

    runner = sdk.beta.messages.tool_runner(
        model="scripted", max_tokens=500, tools=[read],
        messages=[{"role": "user", "content": 'call read {"path": "a.py", "line": 1}'}],
    )  # fmt: skip
    last = runner.until_done()
    assert seen == [("a.py", 1), ("b.py", 2)]
    assert last.stop_reason == "end_turn"
    assert "The end." in last.content[-1].text  # type: ignore[union-attr]


def test_a_tool_call_streams_its_arguments(sdk: anthropic.Anthropic) -> None:
    asked = f'call read {{"path": "{"x" * 200}", "line": 3}}'
    parts = []
    with sdk.messages.stream(model="scripted", max_tokens=500, tools=TOOLS,
                             messages=[{"role": "user", "content": asked}]) as stream:  # fmt: skip
        for event in stream:
            if event.type == "input_json":
                parts.append(event.partial_json)
    assert json.loads("".join(parts)) == {"path": "x" * 200, "line": 3}
    assert sum(1 for part in parts if "x" in part) > 5, "a long argument comes in many parts"

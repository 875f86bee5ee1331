"""Whatever body is sent, it is a job that can be rendered or a refusal that names a field; never another error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from saddle.config import ServerConfig
from saddle.errors import RequestError
from saddle.parsing.conversation import normalise
from saddle.parsing.events import Done, Event, ReasoningDelta, TextDelta, ToolArgs, ToolEnd, ToolStart
from saddle.parsing.render import Renderer
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, Usage
from saddle.server.anthropic import to_request
from saddle.server.anthropic_parts import Signer
from saddle.server.job import ChatPrompt, Facts
from saddle.server.wire_anthropic import MessagesBody
from tests.unit.server.test_anthropic_blocks import accumulated, asked, streamed, whole

SIGNER = Signer(b"k" * 32)
settled = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

words = st.sampled_from(["", "x", "text", "tool", "auto", "enabled", "json_schema", "object", "]~b]ai", "<think>"])
scalars = st.none() | st.booleans() | st.integers(-3, 2000) | st.floats(allow_nan=False) | st.text(max_size=5) | words
names = st.sampled_from(["type", "text", "content", "name", "input", "id", "source", "data", "schema", "format"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
                      max_leaves=8)  # fmt: skip


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any] = values) -> st.SearchStrategy[Any]:
    """One in forty is wrong: a body has many places, and most bodies shall come through."""
    return st.integers(0, 39).flatmap(lambda number: wrong if number == 39 else right)


def some(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with any of these fields."""
    return st.fixed_dictionaries({}, optional={key: mostly(right) for key, right in fields.items()})


def block(kind: str, **fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Blocks of a kind with all of these fields."""
    return st.fixed_dictionaries({"type": st.just(kind), **{key: mostly(right) for key, right in fields.items()}})


ids = st.sampled_from(["a", "b"])
text_block = block("text", text=st.text(max_size=6) | words)
reminder = block("text", text=st.just("<system-reminder>Now.</system-reminder>"))
document = block("document", source=block("text", data=words) | block("content", content=st.lists(text_block)))
signature = words | st.just(SIGNER.sign("x")) | st.just(SIGNER.seal("y"))
call = block("tool_use", id=ids, name=st.sampled_from(["ls", "cp"]), input=st.dictionaries(words, values, max_size=2))
result = block("tool_result", tool_use_id=ids, content=words | st.lists(text_block, max_size=2))
foreign = block("web_search_tool_result") | block("server_tool_use", name=words) | block("redacted_thinking")
user_blocks = st.lists(mostly(text_block | reminder | document | block("web_fetch_tool_result")), max_size=3)
ai_blocks = st.lists(mostly(text_block | block("thinking", thinking=words, signature=signature) | call | foreign),
                     max_size=3)  # fmt: skip
user = st.fixed_dictionaries({"role": st.just("user"), "content": mostly(st.text(max_size=6) | user_blocks)})
ai = st.fixed_dictionaries({"role": st.just("assistant"), "content": mostly(words | ai_blocks)})
system = st.fixed_dictionaries({"role": st.just("system"), "content": mostly(words | st.lists(text_block, max_size=2))})
loop = st.tuples(call, st.lists(system, max_size=1), result, user_blocks).map(
    lambda parts: [{"role": "assistant", "content": [parts[0]]}, *parts[1],
                   {"role": "user", "content": [parts[2], *parts[3]]}]
)  # fmt: skip
turns = st.lists(user.map(lambda m: [m]) | ai.map(lambda m: [m]) | system.map(lambda m: [m]) | loop, min_size=1,
                 max_size=4).map(lambda parts: [message for part in parts for message in part])  # fmt: skip
SCHEMA = {"type": "object", "properties": {"p": {"type": "integer"}}}
tools = st.permutations(["ls", "cp", "web"]).flatmap(lambda found: st.tuples(*(
    st.fixed_dictionaries(
        {"name": mostly(st.just(name)), "input_schema": mostly(st.just(SCHEMA))},
        optional={"description": mostly(words), "strict": mostly(st.booleans()),
                  "type": st.just("web_search_1" if name == "web" else "custom")},
    ) for name in found[:2])).map(list))  # fmt: skip
bodies = st.fixed_dictionaries(
    {"messages": mostly(turns), "max_tokens": mostly(st.integers(0, 50))},
    optional={
        "system": mostly(words | st.lists(text_block)),
        "tools": tools,
        "tool_choice": block("auto") | block("none") | block("any") | block("tool", name=st.sampled_from(["ls", "web"]))
        | block("auto", disable_parallel_tool_use=st.booleans()),
        "thinking": block("adaptive", display=st.sampled_from(["summarized", "omitted"])) | block("disabled")
        | block("enabled", budget_tokens=st.integers(1, 30)),
        "output_config": some(effort=st.sampled_from(["low", "max"]),
                              format=block("json_schema", schema=st.just(SCHEMA))),
        "stop_sequences": st.lists(mostly(st.just("END")), max_size=3),
        "temperature": mostly(st.floats(0, 2)),
        "context_management": some(edits=st.just([])),
        "metadata": some(user_id=words),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def facts(tokenizer: Tokenizer) -> Facts:
    return Facts(model_names=("m",), max_model_len=512, vocab_size=tokenizer.vocab_size, defaults={},
                 config=ServerConfig(), tokenizer=tokenizer)  # fmt: skip


@settled
@given(body=bodies)
def test_any_body_is_a_prompt_or_a_refusal(tokenizer: Tokenizer, facts: Facts, body: dict[str, Any]) -> None:
    try:
        parsed = MessagesBody.model_validate_json(json.dumps(body))
        request, _ = to_request(parsed, facts, SIGNER, "r")
    except ValidationError:
        return
    except RequestError as error:
        assert error.param
        assert error.param.split(".")[0] in MessagesBody.model_fields
        assert error.param in error.message or error.param.split(".")[0] in error.message
        return
    [prompt] = request.job.prompts
    assert isinstance(prompt, ChatPrompt)
    renderer = Renderer(tokenizer, None, "X", ReplayStore(1 << 20), 1 << 20)
    rendered = renderer.render(
        normalise(prompt.messages, prompt.tools),
        add_generation_prompt=prompt.add_generation_prompt,
        continue_final_message=prompt.continue_final_message,
    )
    assert rendered.token_ids
    assert rendered.text.endswith("]~b]ai\n<think>\n") or request.continues


texts = st.text(alphabet="ab\n <", min_size=1, max_size=4)


@st.composite
def generations(draw: st.DrawFn) -> list[Event]:
    """Events in the order in which a parser can send them."""
    events: list[Event] = [ReasoningDelta(text) for text in draw(st.lists(texts, max_size=3))]
    for index in range(draw(st.integers(0, 3))):
        events += [TextDelta(text) for text in draw(st.lists(texts, max_size=2))]
        events.append(ToolStart(index, f"c{index}", "ls"))
        written = json.dumps(draw(st.dictionaries(texts, texts | st.integers() | st.none(), max_size=3)))
        cuts = sorted(draw(st.lists(st.integers(0, len(written)), max_size=3)))
        parts = [written[a:b] for a, b in zip([0, *cuts], [*cuts, len(written)], strict=True)]
        events += [ToolArgs(index, part) for part in parts if part]
        events.append(ToolEnd(index))
    return [*events, *(TextDelta(text) for text in draw(st.lists(texts, max_size=3)))]


@settled
@given(events=generations(), num=st.integers(0, 40), continues=st.booleans(),
       reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))  # fmt: skip
def test_streamed_and_whole_agree_wherever_it_ends(
    events: list[Event], num: int, continues: bool, reason: FinishReason
) -> None:
    request = asked(continues=continues)
    cut = [*events[:num], Done(reason, Usage(num_prompt_tokens=40, num_completion_tokens=9, num_cached_tokens=32))]
    answer = whole(request, cut)
    assert accumulated(streamed(request, cut)) == answer
    said = "".join(event.text for event in cut if isinstance(event, TextDelta))
    shown = "".join(block["text"] for block in answer["content"] if block["type"] == "text")
    assert "".join(shown.split()) == "".join(said.split()), "nothing but white space is ever left out"
    assert all(block["text"].strip() for block in answer["content"] if block["type"] == "text" and said.strip())

"""Ten targets that fuzz the HTTP APIs and the pure functions behind them.

Whatever body comes in, the answer is one that its sender can read, or a refusal that names a field; never a 500, never
another exception. What is streamed adds up to what is answered in one piece. Most bodies are right in most places, so
that they get past the first check; `tests/unit/server` sends cruder ones to the same routes.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from saddle.config import ServerConfig
from saddle.errors import InvalidRequest
from saddle.parsing.events import Done, Event, ReasoningDelta, TextDelta, Tokens
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, GrammarSpec, SamplingParams, TokenDelta, TokenLogprobs, TokenRequest, Usage
from saddle.server import constraints, openai, openai_text
from saddle.server.job import Facts, Job, TokenPrompt
from saddle.server.openai_parts import TokenNames
from saddle.server.sampling import answer_grammar, sampling_params
from saddle.server.wire_anthropic import MessagesBody
from saddle.server.wire_openai import ChatBody, CompletionBody, DetokenizeBody, SamplingBody, TokenizeBody
from saddle.server.wire_responses import ResponsesBody
from tests.fuzz.bodies import (
    chat_bodies,
    chat_turns,
    choices,
    few,
    formats,
    merged,
    response_bodies,
    sampling,
    structured,
    text_bodies,
    tools,
)
from tests.unit.server.harness import in_thread, words
from tests.unit.server.test_anthropic_any_body import bodies as message_bodies
from tests.unit.server.test_anthropic_any_body import generations, mostly
from tests.unit.server.test_anthropic_blocks import accumulated

FUZZ = settings(max_examples=150, deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])  # fmt: skip
# What the scripted model answers to everything.
PIECES = ("I look", ".\n", "</think>", "\n\nSo", ": ", '<minimax:tool_call>\n<invoke name="ls">\n<parameter name="p">/',
          "x y", "</parameter>\n</invoke>\n</minimax:tool_call>")  # fmt: skip


@pytest.fixture(scope="module")
def port(tokenizer: Tokenizer) -> Iterator[int]:
    plain = words(tokenizer, *PIECES)

    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        return plain(request)

    with in_thread(tokenizer, script) as found:
        yield found


@pytest.fixture(scope="module")
def facts(tokenizer: Tokenizer) -> Facts:
    return Facts(model_names=("m",), max_model_len=512, vocab_size=tokenizer.vocab_size, defaults={},
                 config=ServerConfig(), tokenizer=tokenizer)  # fmt: skip


def ask(port: int, path: str, body: Any) -> tuple[int, str]:
    """(status, body). Also checks that the answer is of the kind that was asked for."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
        reply = connection.getresponse()
        text = reply.read().decode()
    finally:
        connection.close()
    event(f"{path} {reply.status}")
    streams = reply.status == 200 and body.get("stream") is True
    assert reply.headers["content-type"].startswith("text/event-stream" if streams else "application/json")
    return reply.status, text


def check_refusal(status: int, text: str, model: Any) -> None:
    """An error of OpenAI's shape that names a field of the body."""
    assert status in (400, 404), (status, text)
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert error["message"]
    known = {*model.model_fields, "input_tokens", "body"}
    assert error["param"] and error["param"].split(".")[0] in known, text


def frames(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream of OpenAI's that ended."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], text[-200:]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def joined_chat(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a client puts together of a chat stream, by choice."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            made = found.setdefault(choice["index"], {"content": "", "reasoning": "", "calls": [], "ids": [],
                                                      "logprobs": [], "finish": None})  # fmt: skip
            delta = choice["delta"]
            for key in ("content", "reasoning"):
                made[key] += delta.get(key) or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(made["calls"]):
                    made["calls"].append([call["function"]["name"], ""])
                made["calls"][call["index"]][1] += call["function"]["arguments"]
            made["ids"] += choice.get("token_ids") or []
            made["logprobs"] += (choice["logprobs"] or {}).get("content") or []
            assert made["finish"] is None, "nothing follows the end of a choice"
            made["finish"] = choice["finish_reason"]
    return found


def whole_chat(body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The same of an answer in one piece."""
    found = {}
    for choice in body["choices"]:
        message = choice["message"]
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or ()]
        found[choice["index"]] = {
            "content": message["content"] or "", "reasoning": message.get("reasoning") or "", "calls": calls,
            "ids": choice.get("token_ids") or [], "logprobs": (choice["logprobs"] or {}).get("content") or [],
            "finish": choice["finish_reason"],
        }  # fmt: skip
    return found


# the routes -----------------------------------------------------------------------------------------------------


@FUZZ
@given(body=chat_bodies)
def test_any_chat_body(port: int, body: dict[str, Any]) -> None:
    status, text = ask(port, "/v1/chat/completions", body)
    again, stream = ask(port, "/v1/chat/completions", {**body, "stream": True})
    if status != 200:
        check_refusal(status, text, ChatBody)
        assert again == status
        return
    if again != 200:
        check_refusal(again, stream, ChatBody)
        assert body.get("prompt_logprobs") is not None
        return
    answer = whole_chat(json.loads(text))
    assert joined_chat(frames(stream)) == answer
    assert len(answer) == (body.get("n") or 1)


@FUZZ
@given(body=text_bodies)
def test_any_completion_body(port: int, body: dict[str, Any]) -> None:
    status, text = ask(port, "/v1/completions", body)
    again, stream = ask(port, "/v1/completions", {**body, "stream": True})
    if status != 200:
        check_refusal(status, text, CompletionBody)
        assert again == status
        return
    if again != 200:
        check_refusal(again, stream, CompletionBody)
        assert body.get("prompt_logprobs") is not None or body.get("echo")
        return
    said: dict[int, str] = {}
    for chunk in frames(stream):
        for choice in chunk["choices"]:
            said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
    assert said == {choice["index"]: choice["text"] for choice in json.loads(text)["choices"]}


def check_anthropic_refusal(status: int, text: str) -> None:
    assert status in (400, 404), (status, text)
    body = json.loads(text)
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert body["error"]["message"].split(":")[0].split(".")[0].split(" ")[0] in {*MessagesBody.model_fields, "prompt"}


@FUZZ
@given(body=message_bodies)
def test_any_message_body(port: int, body: dict[str, Any]) -> None:
    status, text = ask(port, "/v1/messages", body)
    again, stream = ask(port, "/v1/messages", {**body, "stream": True})
    assert again == status
    if status != 200:
        check_anthropic_refusal(status, text)
        return
    parts = [part.split("\ndata: ") for part in stream.split("\n\n") if part]
    told = [(name.removeprefix("event: "), json.loads(data)) for name, data in parts]
    assert told[-1][0] == "message_stop"
    made, answer = accumulated(told), json.loads(text)
    for message in (made, answer):
        for block in message["content"]:
            block.pop("id", None)  # drawn for each call
        assert message.pop("id")
    assert made["content"] == answer["content"]
    assert (made["stop_reason"], made["usage"]) == (answer["stop_reason"], answer["usage"])


@FUZZ
@given(body=message_bodies)
def test_any_body_to_be_counted(port: int, body: dict[str, Any]) -> None:
    status, text = ask(port, "/v1/messages/count_tokens", body)
    if status != 200:
        check_anthropic_refusal(status, text)
        return
    status, answer = ask(port, "/v1/messages", body)
    if status == 200:
        usage = json.loads(answer)["usage"]
        assert json.loads(text)["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


@FUZZ
@given(body=response_bodies)
def test_any_response_body(port: int, body: dict[str, Any]) -> None:
    """Streamed and whole answers agree, and what came out can be sent in again."""
    status, text = ask(port, "/v1/responses", body)
    again, stream = ask(port, "/v1/responses", {**body, "stream": True})
    assert again == status
    if status != 200:
        check_refusal(status, text, ResponsesBody)
        return
    told = [json.loads(part.split("\ndata: ")[1]) for part in stream.split("\n\n") if part]
    assert [frame["sequence_number"] for frame in told] == list(range(len(told)))
    last, answer = told[-1]["response"], json.loads(text)
    done = [frame["item"] for frame in told if frame["type"] == "response.output_item.done"]
    assert done == last["output"]

    def shown(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        drawn = ("id", "call_id")
        return [{key: value for key, value in item.items() if key not in drawn} for item in output]

    assert shown(last["output"]) == shown(answer["output"])
    assert (last["status"], last["usage"]) == (answer["status"], answer["usage"])
    if answer["status"] == "completed":
        results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "r"}
                   for item in answer["output"]
                   if item["type"] == "function_call" and item["status"] == "completed"]  # fmt: skip
        conversation = [*answer["output"], *results, {"role": "user", "content": "on"}]
        status, text = ask(port, "/v1/responses", {"input": conversation})
        assert status == 200, text


@FUZZ
@given(body=merged(
    few({"tools": tools, "add_generation_prompt": st.booleans(), "continue_final_message": st.booleans(),
         "add_special_tokens": st.booleans(), "return_token_strs": st.booleans()}, most=2),
    st.fixed_dictionaries({"messages": mostly(chat_turns)}) | st.fixed_dictionaries({"prompt": mostly(st.text())}),
))  # fmt: skip
def test_any_body_to_be_tokenized(port: int, body: dict[str, Any]) -> None:
    """Tokens of a text are the text again; those of messages are the prompt that they make."""
    status, text = ask(port, "/tokenize", body)
    if status != 200:
        check_refusal(status, text, TokenizeBody)
        return
    found = json.loads(text)
    assert found["count"] == len(found["tokens"])
    if body.get("return_token_strs"):
        assert len(found["token_strs"]) == found["count"]
    status, back = ask(port, "/detokenize", {"tokens": found["tokens"]})
    assert status == 200, back
    if isinstance(body.get("prompt"), str):
        assert json.loads(back)["prompt"] == body["prompt"]
        return
    given_fields = {key: body[key] for key in ("messages", "tools", "add_generation_prompt", "continue_final_message")
                    if key in body}  # fmt: skip
    status, text = ask(port, "/v1/chat/completions", given_fields)
    if status == 200:
        assert json.loads(text)["usage"]["prompt_tokens"] == found["count"]


@FUZZ
@given(body=st.fixed_dictionaries({"tokens": mostly(st.lists(mostly(st.integers(0, 600))))},
                                  optional={"model": mostly(st.just("alias"))}))  # fmt: skip
def test_any_ids_to_be_text(port: int, tokenizer: Tokenizer, body: dict[str, Any]) -> None:
    status, text = ask(port, "/detokenize", body)
    if status != 200:
        check_refusal(status, text, DetokenizeBody)
        return
    assert max(body["tokens"], default=0) < tokenizer.vocab_size
    raw = b"".join(tokenizer.raw(token_id) for token_id in body["tokens"])
    assert json.loads(text)["prompt"] == raw.decode(errors="replace")


# the functions behind them --------------------------------------------------------------------------------------


PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "n", "prompt_logprobs",
)  # fmt: skip


@FUZZ
@given(body=few(sampling, most=8), defaults=few({key: sampling[key] for key in ("temperature", "top_k", "top_p")}, 3))
def test_any_sampling_fields(facts: Facts, body: dict[str, Any], defaults: dict[str, Any]) -> None:
    """A field that was accepted is what the engine gets; one that was not given is the server's default."""
    try:
        parsed = SamplingBody.model_validate_json(json.dumps(body))
    except ValidationError:
        return
    known = {key: value for key, value in defaults.items() if type(value) in (int, float) and key in PASSED_ON}
    server = Facts(model_names=facts.model_names, max_model_len=512, vocab_size=facts.vocab_size, defaults=known,
                   config=facts.config, tokenizer=facts.tokenizer)  # fmt: skip
    try:
        params = sampling_params(parsed, server, max_tokens=parsed.max_tokens, logprobs=None)
    except InvalidRequest as error:
        assert error.param and error.param.split(".")[0] in {*SamplingBody.model_fields, *known}
        assert error.param.split(".")[0] in error.message
        return
    neutral = SamplingParams()
    for name in PASSED_ON:
        given_value = getattr(parsed, name)
        expected = given_value if given_value is not None else known.get(name, getattr(neutral, name))
        assert getattr(params, name) == expected, name
    assert params.stop == tuple(parsed.stop or ())
    assert all(params.bad_words_ids) and 0 <= params.temperature <= 2 and 0 < params.top_p <= 1


wishes: st.SearchStrategy[dict[str, Any]] = (
    st.just({}) | formats.map(lambda one: {"response_format": one})
    | structured.map(lambda one: {"structured_outputs": one})
    | st.tuples(formats, structured).map(lambda both: {"response_format": both[0], "structured_outputs": both[1]})
)  # fmt: skip


@FUZZ
@given(offered=mostly(tools) | st.none(), choice=choices | st.none(), wish=wishes, parallel=mostly(st.just(True)))
def test_any_constraint(facts: Facts, offered: Any, choice: Any, wish: dict[str, Any], parallel: bool) -> None:
    """What must be called or must match ends in a grammar, or in a refusal that says which field cannot be."""
    body = {"messages": [{"role": "user", "content": "x"}], "tools": offered, "tool_choice": choice, **wish}
    try:
        parsed = ChatBody.model_validate_json(json.dumps(body))
        wanted = constraints.chosen(parsed.tool_choice, parsed.tools)
        answer, calls = answer_grammar(parsed), bool(parsed.tools) and wanted.kind != "none"
        grammar = constraints.combined(answer, parsed.tools, wanted, facts.tokenizer, parallel=parallel is True)
    except ValidationError:
        return
    except InvalidRequest as error:
        fields = ("tools", "tool_choice", "response_format", "structured_outputs")
        assert error.param and error.param.split(".")[0] in fields, error.message
        assert error.param.split(".")[0] in error.message
        return
    if wanted.must_call or answer is not None:
        assert isinstance(grammar, GrammarSpec), "it is enforced"
    if wanted.must_call:
        assert grammar is not None and grammar.kind == "tools" and '"type": "triggered_tags"' not in grammar.source
    if answer is not None and not wanted.must_call:
        assert grammar is not None and grammar.kind == ("answer_or_tools" if calls else answer.kind)
    if grammar is not None:
        bound = constraints.bound_behind(grammar, 3, 5)
        assert bound is not None and (bound.after_token_id, bound.max_thinking_tokens) == (5, 3)
        assert bound.source == grammar.source


@st.composite
def answers(draw: st.DrawFn) -> list[list[Event]]:
    """Batches of the events of a choice, each token told before what it means; ended by Done."""
    batches: list[list[Event]] = []
    events = draw(generations())
    for one in events:
        found = draw(st.lists(st.integers(0, 90), max_size=2))
        logprobs = [TokenLogprobs(i, -0.5, 1, [(i, -0.5), (i + 1, -9.5)]) for i in found]
        batches.append([Tokens(found, logprobs), one] if found else [one])
    usage = Usage(num_prompt_tokens=3, num_completion_tokens=9, num_cached_tokens=2)
    last = Done(draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])), usage, draw(st.none() | st.just("x")))
    cut = draw(st.integers(0, len(batches)))
    if draw(st.booleans()):  # a slow reader gets them at once
        batches, cut = [[one for batch in batches[:cut] for one in batch]], 1
    return [*batches[:cut], [*draw(st.just([]) | st.just([Tokens([1], [TokenLogprobs(1, 0.0, 1, [])])])), last]]


@FUZZ
@given(batches=st.lists(answers(), min_size=1, max_size=2), logprobs=st.booleans(), with_ids=st.booleans(),
       field=st.sampled_from(["both", "reasoning"]), usage=st.booleans())  # fmt: skip
def test_any_events_encoded(
    tokenizer: Tokenizer, batches: list[list[list[Event]]], logprobs: bool, with_ids: bool, field: str, usage: bool
) -> None:
    """Chat and completions: the chunks of any events add up to the answer in one piece of the same events."""
    job = Job(request_id="r", prompts=(TokenPrompt([1, 2, 3]),), params=SamplingParams(n=len(batches)))
    fields: dict[str, Any] = {"job": job, "model": "m", "created": 1, "logprobs": logprobs, "num_top": 1,
                              "return_token_ids": with_ids, "include_usage": usage}  # fmt: skip
    names, prompt = TokenNames(tokenizer), [[1, 2, 3]]
    asked = openai.AskedChat(**fields)
    flat = [[event for batch in choice for event in batch] for choice in batches]
    stream = openai.ChatStream(asked, names, prompt, field)

    def written(stream: Any) -> list[dict[str, Any]]:
        data = stream.start()
        for index, choice in enumerate(batches):
            data += b"".join(stream.encode(index, batch) for batch in choice)
        return frames((data + stream.finish()).decode())

    chunks, body = written(stream), json.loads(openai.to_response(asked, names, prompt, flat, field))
    assert joined_chat(chunks) == whole_chat(body)
    assert (chunks[-1].get("usage") == body["usage"]) is usage
    plain = openai_text.AskedText(**fields)
    only_text: list[list[Event]] = [[e for e in events if not isinstance(e, ReasoningDelta)] for events in flat]
    text_stream = openai_text.TextStream(plain, names, prompt, [""])
    body = json.loads(openai_text.to_response(plain, names, prompt, only_text, [""]))
    said = dict.fromkeys(range(len(batches)), "")
    for chunk in written(text_stream):
        for choice in chunk["choices"]:
            said[choice["index"]] += choice["text"]
    assert said == {choice["index"]: choice["text"] for choice in body["choices"]}
    assert list(said.values()) == ["".join(e.text for e in events if isinstance(e, TextDelta)) for events in flat]

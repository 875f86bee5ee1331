"""Chat completions: what the events of a generation look like on the wire, streamed and in one piece."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from saddle.config import ServerConfig
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineReady, FinishReason, TokenDelta, TokenLogprobs, TokenRequest
from tests.unit.server.harness import NAME, Harness, running, words

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "mode": {"type": "integer"}}},
        },
    }
]
CALL = [
    "<minimax:tool_call>\n",
    '<invoke name="write">\n<parameter name="path">/a',
    '/b.py</parameter>\n<parameter name="mode">644</parameter>\n',
    "</invoke>\n",
    "</minimax:tool_call>",
]


def config(**fields: Any) -> ServerConfig:
    return ServerConfig(host="127.0.0.1", port=0, access_log=False, **fields)


async def chunks(server: Harness, **body: Any) -> list[dict[str, Any]]:
    """The JSON frames of a chat stream; checks that it ends in [DONE]."""
    frames = await server.frames(CHAT, {"messages": HI, **body})
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


def joined(frames: list[dict[str, Any]], field: str, index: int = 0) -> str:
    return "".join(c["delta"].get(field) or "" for f in frames for c in f["choices"] if c["index"] == index)


async def test_stream_frames_are_exact(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "Let me", " see.\n", "</think>", "\n\nHello", " you")) as server:
        frames = await chunks(server, model="alias", request_id="abc")
    for frame in frames:
        assert set(frame) == {"id", "object", "created", "model", "choices"}
        assert (frame["id"], frame["object"], frame["model"]) == ("chatcmpl-abc", "chat.completion.chunk", "alias")
    choices = [frame["choices"][0] for frame in frames]
    assert choices[0] == {
        "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None,
    }  # fmt: skip
    assert choices[1] == {
        "index": 0, "delta": {"reasoning": "Let me", "reasoning_content": "Let me"}, "logprobs": None,
        "finish_reason": None,
    }  # fmt: skip
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert joined(frames, "reasoning") == joined(frames, "reasoning_content") == "Let me see."
    assert joined(frames, "content").strip() == "Hello you"
    kinds = [next(iter(c["delta"]), "") for c in choices[1:-1]]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes before content"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
async def test_one_reasoning_field_on_demand(tokenizer: Tokenizer, field: Any) -> None:
    other = {"reasoning": "reasoning_content", "reasoning_content": "reasoning"}[field]
    script = words(tokenizer, "Hm", "</think>", "Yes")
    async with running(tokenizer, script, config(reasoning_field=field)) as server:
        frames = await chunks(server)
        _, whole = await server.post(CHAT, {"messages": HI})
    assert joined(frames, field) == "Hm" == whole["choices"][0]["message"][field]
    assert joined(frames, other) == ""
    assert other not in whole["choices"][0]["message"]


async def test_include_reasoning_false(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "Hm", "</think>", "Yes")) as server:
        frames = await chunks(server, include_reasoning=False)
        _, whole = await server.post(CHAT, {"messages": HI, "include_reasoning": False})
    assert joined(frames, "reasoning") == joined(frames, "reasoning_content") == ""
    assert joined(frames, "content") == "Yes"
    assert set(whole["choices"][0]["message"]) == {"role", "content"}


async def test_whole_answer_is_exact(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "Hm", "</think>", "Yes")) as server:
        status, reply = await server.post(CHAT, {"messages": HI, "request_id": "abc"})
        (request,) = server.client.requests
    assert status == 200
    created = reply.pop("created")
    assert isinstance(created, int)
    num_prompt, num_made = len(request.prompt_ids), len(tokenizer.encode("Hm</think>Yes")) + 1
    assert reply == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": NAME,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Yes", "reasoning": "Hm", "reasoning_content": "Hm"},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_made,
            "total_tokens": num_prompt + num_made,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": reply["usage"]["completion_tokens_details"]
                                          ["reasoning_tokens"]},
        },
    }  # fmt: skip
    assert 1 <= reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= len(tokenizer.encode("Hm")) + 1


async def test_tool_call(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "Hm", "</think>", "\n\n", *CALL)) as server:
        frames = await chunks(server, tools=TOOLS)
        _, whole = await server.post(CHAT, {"messages": HI, "tools": TOOLS})
    parts = [call for f in frames for c in f["choices"] for call in c["delta"].get("tool_calls", ())]
    assert set(parts[0]) == {"index", "id", "type", "function"}
    assert parts[0]["type"] == "function"
    assert parts[0]["function"] == {"name": "write", "arguments": ""}
    assert all(set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in parts[1:])
    assert len(parts) > 2, "arguments stream"
    arguments = "".join(part["function"]["arguments"] for part in parts)
    assert json.loads(arguments) == {"path": "/a/b.py", "mode": 644}
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "write", "arguments": arguments}


@pytest.mark.parametrize("num_whole", [0, 1])
async def test_a_call_that_a_stop_string_cut_is_not_to_be_run(tokenizer: Tokenizer, num_whole: int) -> None:
    """Clients parse the arguments of every call when the reason is tool_calls: half of an object is none."""
    said = ["</think>", "\n\n", CALL[0], *CALL[1:4] * num_whole, *CALL[1:4], CALL[4]]
    stop = ["644"] if num_whole == 0 else ["</invoke>\n<invoke name=\"write\">\n<parameter name=\"path\">/a/b"]
    async with running(tokenizer, words(tokenizer, *said)) as server:
        frames = await chunks(server, tools=TOOLS, stop=stop)
        _, whole = await server.post(CHAT, {"messages": HI, "tools": TOOLS, "stop": stop})
        _, kept = await server.post(CHAT, {"messages": HI, "tools": TOOLS, "stop": ["nowhere"]})
    choice = whole["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "write"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop[0])
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"
    assert kept["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_choice_none_mutes_calls(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "</think>", "Fine.", *CALL)) as server:
        _, whole = await server.post(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "none"})
    choice = whole["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"].strip() == "Fine."
    assert choice["finish_reason"] == "stop"


async def test_usage_chunk_and_running_usage(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "a", "</think>", "bc", "d")) as server:
        frames = await chunks(server, stream_options={"include_usage": True})
        running_frames = await chunks(server, stream_options={"continuous_usage_stats": True})
        _, whole = await server.post(CHAT, {"messages": HI})
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"] == whole["usage"] == running_frames[-1]["usage"]
    assert all("usage" not in frame for frame in frames[:-1])
    counts = [frame["usage"]["completion_tokens"] for frame in running_frames]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == whole["usage"]["completion_tokens"] > counts[1] >= 1


async def test_force_include_usage(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "a"), config(force_include_usage=True)) as server:
        frames = await chunks(server)
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["completion_tokens"] > 0


def with_logprobs(tokenizer: Tokenizer, *pieces: str) -> Any:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        prompt = None
        if request.params.prompt_logprobs is not None:
            prompt = [None, *(TokenLogprobs(i, -1.0, 2, [(5, -0.5)]) for i in request.prompt_ids[1:])]
        for piece in pieces:
            ids = tokenizer.encode(piece)
            entries = [TokenLogprobs(i, -0.25, 1, [(i, -0.25), (7, -2.0)]) for i in ids]
            yield TokenDelta(request_id=request.request_id, token_ids=ids, logprobs=entries, prompt_logprobs=prompt)
            prompt = None
        yield TokenDelta(request_id=request.request_id, token_ids=[tokenizer.eos_id],
                         logprobs=[TokenLogprobs(tokenizer.eos_id, -0.25, 1, [])],
                         finish_reason=FinishReason.STOP)  # fmt: skip

    return script


async def test_logprobs(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, with_logprobs(tokenizer, "ab", "</think>", "cd")) as server:
        ask = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
        _, whole = await server.post(CHAT, {"messages": HI, "prompt_logprobs": 1, **ask})
        frames = await chunks(server, **ask)
        requests = server.client.requests
    assert requests[0].params.logprobs == 2
    assert requests[0].params.prompt_logprobs == 1
    choice = whole["choices"][0]
    entries = choice["logprobs"]["content"]
    assert [tokenizer.token_text(i) for i in choice["token_ids"]] == [entry["token"] for entry in entries]
    assert entries[0]["logprob"] == -0.25
    assert entries[0]["bytes"] == list(entries[0]["token"].encode())
    assert [top["logprob"] for top in entries[0]["top_logprobs"]] == [-0.25, -2.0]
    assert whole["prompt_token_ids"] == requests[0].prompt_ids
    assert whole["prompt_logprobs"][0] is None
    row = whole["prompt_logprobs"][1]
    assert row[str(requests[0].prompt_ids[1])] == {
        "logprob": -1.0, "rank": 2, "decoded_token": tokenizer.token_text(requests[0].prompt_ids[1]),
    }  # fmt: skip
    assert row["5"]["rank"] == 1
    streamed = [c for f in frames for c in f["choices"]]
    assert frames[0]["prompt_token_ids"] == requests[0].prompt_ids
    assert [i for c in streamed for i in c.get("token_ids", ())] == choice["token_ids"]
    per_chunk = [c["token_ids"] for c in streamed if c.get("token_ids")]
    assert per_chunk == [*map(tokenizer.encode, ("ab", "</think>", "cd")), [tokenizer.eos_id]], "none waits for text"
    assert [e for c in streamed if c["logprobs"] for e in c["logprobs"]["content"]] == entries


async def test_logprobs_without_top_and_tokens_as_ids(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, with_logprobs(tokenizer, "</think>", "x")) as server:
        ask = {"messages": HI, "logprobs": True, "return_tokens_as_token_ids": True}
        _, whole = await server.post(CHAT, ask)
    entries = whole["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in entries)
    assert f"token_id:{tokenizer.encode('x')[0]}" in [entry["token"] for entry in entries]


async def test_several_choices(tokenizer: Tokenizer) -> None:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        number = int(request.request_id.rsplit("-", 1)[1]) % 3
        yield from words(tokenizer, "</think>", f"choice {number}", f" is {number}")(request)

    async with running(tokenizer, script) as server:
        _, whole = await server.post(CHAT, {"messages": HI, "n": 3, "seed": 5})
        frames = await chunks(server, n=3)
        requests = server.client.requests
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in whole["choices"]] == [f"choice {i} is {i}" for i in range(3)]
    assert [joined(frames, "content", i) for i in range(3)] == [f"choice {i} is {i}" for i in range(3)]
    assert [f["choices"][0]["delta"].get("role") for f in frames[:3]] == ["assistant"] * 3
    assert [request.params.seed for request in requests[:3]] == [5, 6, 7]
    assert whole["usage"]["prompt_tokens"] == len(requests[0].prompt_ids), "the prompt counts once"
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 4, "as far as its first choice found it"


async def test_stop_string_ends_the_engine_request(tokenizer: Tokenizer) -> None:
    script = words(tokenizer, "</think>", "one ST", "OP two", " three")
    async with running(tokenizer, script) as server:
        _, whole = await server.post(CHAT, {"messages": HI, "stop": "STOP"})
        frames = await chunks(server, stop=["nothing", "STOP"])
        finished = server.client.finished
    choice = whole["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "STOP")
    assert joined(frames, "content") == "one "
    assert frames[-1]["choices"][0]["stop_reason"] == "STOP"
    assert [(reason, count) for _, reason, count in finished] == [
        (FinishReason.STOP, whole["usage"]["completion_tokens"])
    ] * 2


async def test_length_and_stop_token(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "</think>", "abc", eos=False)) as server:
        _, cut = await server.post(CHAT, {"messages": HI, "max_tokens": 5})
    assert cut["choices"][0]["finish_reason"] == "length"
    stopped_by = tokenizer.encode("z")[0]
    script = words(tokenizer, "</think>", "abc", stop_token_id=stopped_by)
    async with running(tokenizer, script) as server:
        _, stopped = await server.post(CHAT, {"messages": HI, "stop_token_ids": [stopped_by]})
    assert (stopped["choices"][0]["finish_reason"], stopped["choices"][0]["stop_reason"]) == ("stop", stopped_by)


async def test_truncated_thinking_has_no_content(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "thinking on and on", eos=False)) as server:
        _, cut = await server.post(CHAT, {"messages": HI, "max_tokens": 5})
    message = cut["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning"].startswith("thinking on")


async def test_failure_in_the_middle(tokenizer: Tokenizer) -> None:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        yield TokenDelta(request_id=request.request_id, token_ids=tokenizer.encode("</think>abc"))
        error = "The step failed: /opt/x/run.py at 0x7f"
        yield TokenDelta(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=error)

    async with running(tokenizer, script) as server:
        frames = await server.frames(CHAT, {"messages": HI})
        status, reply = await server.post(CHAT, {"messages": HI})
        _, page = await server.get("/metrics")
    assert frames[-1] == "[DONE]"
    assert json.loads(frames[-2])["error"] == {
        "message": "The step failed: ……", "type": "InternalServerError", "param": None, "code": 500,
    }  # fmt: skip
    assert (status, reply["error"]["message"]) == (500, "The step failed: ……")
    assert f'saddle:request_success_total{{engine="0",finished_reason="error",model_name="{NAME}"}} 2.0' in page


async def test_keep_alive_comments_while_nothing_comes(tokenizer: Tokenizer) -> None:
    script = words(tokenizer, "</think>", "late")
    async with running(tokenizer, script, config(sse_keep_alive_s=0.05)) as server:
        server.client.pause_s = 0.2
        async with server.http.post(server.base + CHAT, json={"messages": HI, "stream": True}) as reply:
            text = await reply.text()
    assert text.count(": keep-alive\n\n") >= 3
    assert '"content":"late"' in text


async def test_sampling_fields_reach_the_engine(tokenizer: Tokenizer) -> None:
    body = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "max_completion_tokens": 9, "max_tokens": 8,
        "min_tokens": 2, "stop": "x", "stop_token_ids": [3], "ignore_eos": True, "logit_bias": {"4": -100},
        "allowed_token_ids": [1, 2, 3], "bad_words": ["foo"], "include_stop_str_in_output": True,
        "skip_special_tokens": False, "priority": 4, "cache_salt": "s",
    }  # fmt: skip
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, reply = await server.post(CHAT, {"messages": HI, **body})
        (request,) = server.client.requests
    assert status == 200, reply
    params = request.params
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
                 "repetition_penalty", "min_tokens", "ignore_eos", "include_stop_str_in_output",
                 "skip_special_tokens"):  # fmt: skip
        assert getattr(params, name) == body[name], name
    assert params.max_tokens == 9, "max_completion_tokens wins"
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("x",), (3,), {4: -100.0})
    assert params.allowed_token_ids == (1, 2, 3)
    assert tuple(tokenizer.encode("foo")) in params.bad_words_ids
    assert tuple(tokenizer.encode(" foo")) in params.bad_words_ids
    assert (request.priority, request.cache_salt) == (4, "s")


async def test_defaults_of_the_server(tokenizer: Tokenizer) -> None:
    defaults = {"temperature": 0.7, "top_p": 0.95, "top_k": 40}
    async with running(tokenizer, words(tokenizer, "x"), defaults=defaults) as server:
        await server.post(CHAT, {"messages": HI, "top_k": 3})
        (request,) = server.client.requests
    assert (request.params.temperature, request.params.top_p, request.params.top_k) == (0.7, 0.95, 3)
    assert request.params.max_tokens == 512 - len(request.prompt_ids), "all that the context leaves"


async def test_continue_final_message_and_echo(tokenizer: Tokenizer) -> None:
    messages = [*HI, {"role": "assistant", "content": "The answer"}]
    async with running(tokenizer, words(tokenizer, " is 4")) as server:
        body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
        status, whole = await server.post(CHAT, body)
        frames = await server.frames(CHAT, body)
        prompt = tokenizer.decode(server.client.requests[0].prompt_ids, skip_special_tokens=False)
    assert status == 200, whole
    assert prompt.endswith("The answer")
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "The answer is 4"}
    assert joined([json.loads(f) for f in frames[:-1]], "content") == "The answer is 4"


async def test_echo_of_a_message_in_parts(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "answer"}]
    body = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    async with running(tokenizer, words(tokenizer, " is 4")) as server:
        _, whole = await server.post(CHAT, {"messages": [*HI, {"role": "assistant", "content": parts}], **body})
    assert whole["choices"][0]["message"]["content"] == "The answer is 4"


async def test_continuing_an_answer_is_no_thinking(tokenizer: Tokenizer) -> None:
    """The last turn has closed its thinking, so what follows is content."""
    messages = [*HI, {"role": "assistant", "reasoning_content": "Hm", "content": "The answer"}]
    async with running(tokenizer, words(tokenizer, " is 4")) as server:
        _, whole = await server.post(CHAT, {"messages": messages, "continue_final_message": True})
        prompt = tokenizer.decode(server.client.requests[0].prompt_ids, skip_special_tokens=False)
    assert prompt.endswith("<think>\nHm\n</think>\n\nThe answer")
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": " is 4"}


async def test_generated_turn_is_replayed(tokenizer: Tokenizer) -> None:
    """The second turn of a tool loop starts with the very ids of the first prompt and answer."""
    made = ["Hm.\n", "</think>", "\n\n", *CALL]
    async with running(tokenizer, words(tokenizer, *made)) as server:
        server.client.state.ready = EngineReady(4096, 16, 64, tokenizer.vocab_size)
        _, first = await server.post(CHAT, {"messages": HI, "tools": TOOLS})
        message = first["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "done"}
        status, reply = await server.post(CHAT, {"messages": [*HI, message, result], "tools": TOOLS})
        assert status == 200, reply
        before, after = (request.prompt_ids for request in server.client.requests)
    generated = [i for piece in made for i in tokenizer.encode(piece)] + [tokenizer.eos_id]
    assert after[: len(before) + len(generated)] == before + generated


async def test_the_client_library_reads_a_stream(tokenizer: Tokenizer) -> None:
    import openai

    async with running(tokenizer, words(tokenizer, "Hm", "</think>", *CALL)) as server:
        client = openai.AsyncOpenAI(base_url=server.base + "/v1", api_key="none")
        async with client.chat.completions.stream(model=NAME, messages=HI, tools=TOOLS) as stream:  # type: ignore[arg-type]
            final = await stream.get_final_completion()
        await client.close()
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"path": "/a/b.py", "mode": 644}
    assert final.choices[0].finish_reason == "tool_calls"

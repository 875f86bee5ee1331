"""Completions: raw text, many prompts, echo, log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import FinishReason, TokenDelta, TokenLogprobs, TokenRequest
from tests.unit.server.harness import NAME, running, words

TEXT = "/v1/completions"


async def test_whole_answer_is_exact_and_nothing_is_parsed(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "a</think>", "<minimax:tool_call>b")) as server:
        status, reply = await server.post(TEXT, {"prompt": "Say", "request_id": "r"})
        (request,) = server.client.requests
    assert status == 200
    assert request.prompt_ids == tokenizer.encode("Say")
    assert request.params.max_tokens == 16
    del reply["created"]
    made = len(tokenizer.encode("a</think>")) + len(tokenizer.encode("<minimax:tool_call>b")) + 1
    assert reply == {
        "id": "cmpl-r",
        "object": "text_completion",
        "model": NAME,
        "choices": [
            {
                "index": 0,
                "text": "a</think><minimax:tool_call>b",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": made,
            "total_tokens": len(request.prompt_ids) + made,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_stream_frames_are_exact(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "ab", "cd")) as server:
        body = {"prompt": "Say", "request_id": "r", "stream_options": {"include_usage": True}}
        frames = await server.frames(TEXT, body)
    assert frames.pop() == "[DONE]"
    parsed = [json.loads(frame) for frame in frames]
    usage = parsed.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(tokenizer.encode("ab")) + len(tokenizer.encode("cd")) + 1
    assert {(f["id"], f["object"]) for f in parsed} == {("cmpl-r", "text_completion")}
    assert parsed[0]["choices"] == [
        {"index": 0, "text": "ab", "logprobs": None, "finish_reason": None, "stop_reason": None}
    ]
    assert "".join(f["choices"][0]["text"] for f in parsed) == "abcd"
    assert parsed[-1]["choices"][0]["finish_reason"] == "stop"


async def test_many_prompts_of_all_kinds(tokenizer: Tokenizer) -> None:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        text = tokenizer.decode(request.prompt_ids).upper()
        yield from words(tokenizer, text)(request)

    async with running(tokenizer, script) as server:
        _, strings = await server.post(TEXT, {"prompt": ["ab", "cde"], "n": 2})
        _, ids = await server.post(TEXT, {"prompt": [tokenizer.encode("xy"), tokenizer.encode("z")]})
        _, one = await server.post(TEXT, {"prompt": tokenizer.encode("one")})
        frames = await server.frames(TEXT, {"prompt": ["ab", "cde"], "n": 2})
    assert [(c["index"], c["text"]) for c in strings["choices"]] == [(0, "AB"), (1, "AB"), (2, "CDE"), (3, "CDE")]
    assert strings["usage"]["prompt_tokens"] == len(tokenizer.encode("ab")) + len(tokenizer.encode("cde"))
    assert [c["text"] for c in ids["choices"]] == ["XY", "Z"]
    assert [c["text"] for c in one["choices"]] == ["ONE"]
    texts = ["", "", "", ""]
    for frame in frames[:-1]:
        for choice in json.loads(frame)["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["AB", "AB", "CDE", "CDE"]


def scored(tokenizer: Tokenizer, text: str) -> Any:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        ids = tokenizer.encode(text)
        prompt = None
        if request.params.prompt_logprobs is not None:
            prompt = [None, *(TokenLogprobs(i, -3.0, 4, [(9, -0.5)]) for i in request.prompt_ids[1:])]
        yield TokenDelta(request_id=request.request_id, token_ids=ids, prompt_logprobs=prompt,
                         logprobs=[TokenLogprobs(i, -0.25, 1, [(i, -0.25)]) for i in ids],
                         finish_reason=FinishReason.LENGTH)  # fmt: skip

    return script


async def test_logprobs_with_echo(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, scored(tokenizer, "xy")) as server:
        _, reply = await server.post(TEXT, {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 2})
        (request,) = server.client.requests
    assert (request.params.logprobs, request.params.prompt_logprobs) == (1, 1)
    choice = reply["choices"][0]
    assert choice["text"] == "abcxy"
    shown = choice["logprobs"]
    num_prompt = len(request.prompt_ids)
    assert "".join(shown["tokens"]) == "abcxy"
    assert shown["token_logprobs"][0] is None
    assert shown["top_logprobs"][0] is None
    assert set(shown["token_logprobs"][1:num_prompt]) == {-3.0}
    assert set(shown["token_logprobs"][num_prompt:]) == {-0.25}
    assert shown["text_offset"] == [sum(map(len, shown["tokens"][:i])) for i in range(len(shown["tokens"]))]
    second = shown["top_logprobs"][1]
    assert second[tokenizer.token_text(request.prompt_ids[1])] == -3.0


async def test_streamed_logprobs_have_running_offsets(tokenizer: Tokenizer) -> None:
    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        for piece in ("ab", "cd"):
            ids = tokenizer.encode(piece)
            yield TokenDelta(request_id=request.request_id, token_ids=ids,
                             logprobs=[TokenLogprobs(i, -0.5, 1, [(i, -0.5)]) for i in ids])  # fmt: skip
        yield TokenDelta(request_id=request.request_id, finish_reason=FinishReason.LENGTH)

    async with running(tokenizer, script) as server:
        frames = await server.frames(TEXT, {"prompt": "p", "logprobs": 1, "return_token_ids": True})
    choices = [json.loads(frame)["choices"][0] for frame in frames[:-1]]
    shown = [c["logprobs"] for c in choices if c["logprobs"]]
    tokens = [t for s in shown for t in s["tokens"]]
    assert "".join(tokens) == "abcd"
    assert [o for s in shown for o in s["text_offset"]] == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert choices[0]["prompt_token_ids"] == tokenizer.encode("p")
    made = tokenizer.encode("ab") + tokenizer.encode("cd")
    assert [i for c in choices for i in c.get("token_ids", ())] == made


async def test_scoring_a_prompt_makes_no_output(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, scored(tokenizer, "x")) as server:
        body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0}
        _, reply = await server.post(TEXT, body)
        frames = await server.frames(TEXT, {"prompt": "abc", "echo": True, "max_tokens": 0})
    choice = reply["choices"][0]
    assert choice["text"] == "abc"
    assert "".join(choice["logprobs"]["tokens"]) == "abc"
    assert reply["usage"]["completion_tokens"] == 0
    assert "".join(json.loads(f)["choices"][0]["text"] for f in frames[:-1]) == "abc"


async def test_echo_streams_the_prompt_first(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x", "y")) as server:
        frames = await server.frames(TEXT, {"prompt": ["ab", "c"], "echo": True})
    texts = ["", ""]
    for frame in frames[:-1]:
        choice = json.loads(frame)["choices"][0]
        texts[choice["index"]] += choice["text"]
    assert texts == ["abxy", "cxy"]


async def test_truncated_prompts(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        await server.post(TEXT, {"prompt": [1, 2, 3, 4, 5], "truncate_prompt_tokens": 2})
        await server.post(TEXT, {"prompt": [1, 2, 3, 4, 5], "truncate_prompt_tokens": 2, "truncation_side": "right"})
        await server.post(TEXT, {"prompt": [7] * 600, "truncate_prompt_tokens": -1})
        left, right, whole = (request.prompt_ids for request in server.client.requests)
    assert (left, right) == ([4, 5], [1, 2])
    assert whole == [7] * 511


async def test_include_stop_string(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "one STOP two")) as server:
        body = {"prompt": "p", "stop": ["STOP"]}
        _, without = await server.post(TEXT, body)
        _, included = await server.post(TEXT, {**body, "include_stop_str_in_output": True})
    assert without["choices"][0]["text"] == "one "
    assert included["choices"][0]["text"] == "one STOP"
    assert included["choices"][0]["stop_reason"] == "STOP"

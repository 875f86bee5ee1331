"""OpenAI's Python SDK against `saddle serve` with a small random model: the whole path, no part of it scripted."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.processes import ServerProcess
from tests.support.checkpoint import write_random_checkpoint
from tests.unit.server.test_bad_requests import CASES

HI: list[Any] = [{"role": "user", "content": "Tell me something."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m2")
    server = ServerProcess([str(folder), "--served-model-name", "saddle-test", "alias", "--max-model-len", "1024",
                            "--kv-cache-memory-bytes", str(64 << 20), "--disable-uvicorn-access-log"])  # fmt: skip
    yield server
    server.wait_idle()
    assert server.stop() == 0, server.log()
    assert server.leaves_no_process()
    assert "Traceback" not in server.log()


def greedy(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="saddle-test", messages=HI, temperature=0, **fields)


def whole_text(message: Any) -> str:
    """Thinking and answer of a message; a random model rarely ends its thinking."""
    return ((message.model_extra or {}).get("reasoning") or "") + (message.content or "")


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["saddle-test", "alias"]
    assert (models[0].model_extra or {})["max_model_len"] == 1024


def test_chat_and_stream_agree(client: openai.OpenAI) -> None:
    whole = greedy(client, max_tokens=40)
    thinking, content, finish, usage = "", "", None, None
    stream = greedy(client, max_tokens=40, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thinking += (choice.delta.model_extra or {}).get("reasoning") or ""
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert thinking + content == whole_text(whole.choices[0].message) != ""
    assert finish == whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 40)
    assert usage.total_tokens == usage.prompt_tokens + 40
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > 0, "the second request finds the first one's blocks"


def test_seeds(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str:
        reply = client.chat.completions.create(
            model="saddle-test", messages=HI, temperature=1.5, top_p=1, seed=seed, max_tokens=20,
            extra_body={"top_k": 0, "ignore_eos": True},
        )  # fmt: skip
        return whole_text(reply.choices[0].message)

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_three_choices(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="saddle-test", messages=HI, n=3, temperature=2, top_p=1, seed=3,
                                           max_tokens=12, extra_body={"top_k": 0, "ignore_eos": True})  # fmt: skip
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({whole_text(choice.message) for choice in reply.choices}) > 1
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 36


def test_logprobs(client: openai.OpenAI) -> None:
    reply = greedy(client, max_tokens=6, logprobs=True, top_logprobs=4)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 6
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 4
        assert tops == sorted(tops, reverse=True)
        assert entry.logprob == pytest.approx(tops[0], abs=1e-4), "greedy takes the most likely token"
        assert entry.logprob <= 0
        assert sum(map(math.exp, tops)) <= 1.0001


def test_prompt_logprobs_by_scoring(client: openai.OpenAI) -> None:
    reply: Any = client.completions.create(model="saddle-test", prompt="one two three", echo=True, logprobs=2,
                                           max_tokens=0)  # fmt: skip
    choice = reply.choices[0]
    assert choice.text == "one two three"
    assert "".join(choice.logprobs.tokens) == "one two three"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs[1:])
    assert reply.usage.completion_tokens == 0


def test_stop_string(client: openai.OpenAI) -> None:
    text = whole_text(greedy(client, max_tokens=40).choices[0].message)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    reply = greedy(client, max_tokens=40, stop=stop)
    assert whole_text(reply.choices[0].message).rstrip() == text[: text.index(stop)].rstrip()
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.choices[0].model_extra or {})["stop_reason"] == stop
    assert reply.usage.completion_tokens < 40


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="saddle-test", prompt=["a", "b"], temperature=0, max_tokens=5)
    alone = client.completions.create(model="alias", prompt="b", temperature=0, max_tokens=5)
    parts = list(client.completions.create(model="saddle-test", prompt="b", temperature=0, max_tokens=5, stream=True))
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[1].text == alone.choices[0].text == "".join(part.choices[0].text for part in parts)
    assert alone.model == "alias"


def test_min_tokens_and_logit_bias(server: ServerProcess) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "logit_bias": {"65": 100}, "return_token_ids": True}
    _, reply = server.post("/v1/completions", body)
    assert reply["choices"][0]["token_ids"] == [65] * 8
    _, reply = server.post("/v1/completions", {**body, "stop_token_ids": [65]})
    assert (reply["choices"][0]["finish_reason"], reply["choices"][0]["stop_reason"]) == ("stop", 65)
    assert reply["usage"]["completion_tokens"] == 1
    _, reply = server.post("/v1/completions", {**body, "logit_bias": {}, "allowed_token_ids": [70]})
    assert reply["choices"][0]["token_ids"] == [70] * 8


def test_cancellation(client: openai.OpenAI, server: ServerProcess) -> None:
    before = server.wait_idle()["request_success_total{abort}"]
    stream = greedy(client, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    for _, _ in zip(range(5), stream, strict=False):
        pass
    stream.close()
    began = time.monotonic()
    after = server.wait_idle(5)
    assert time.monotonic() - began < 2
    assert after["request_success_total{abort}"] == before + 1


def test_bad_requests_leave_the_engine_alone(server: ServerProcess) -> None:
    """The same table as the unit test, through the real process."""
    before = server.metrics()["engine_steps_total"]
    wrong = []
    for route, body, status, param, part in CASES:
        got, reply = server.post(route, body)
        error = reply.get("error", {})
        if not (got == status and error["param"] == param and part in error["message"]):
            wrong.append((route, body, got, reply))
    assert not wrong, "\n".join(map(str, wrong))
    assert len(CASES) >= 30
    assert server.metrics()["engine_steps_total"] == before


def test_prompt_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens") as caught:
        client.completions.create(model="saddle-test", prompt=[7] * 2000)
    assert caught.value.param == "input_tokens"


def test_context_is_filled_to_the_end(server: ServerProcess) -> None:
    body = {"prompt": [7] * 1020, "max_tokens": 500, "ignore_eos": True, "temperature": 0}
    _, reply = server.post("/v1/completions", body)
    assert (reply["usage"]["total_tokens"], reply["choices"][0]["finish_reason"]) == (1024, "length")


def test_small_routes(server: ServerProcess) -> None:
    for path in ("/health", "/livez", "/ping", "/version", "/load", "/metrics", "/v1/models", "/"):
        assert server.status(path) == 200, path
    _, ids = server.post("/tokenize", {"prompt": "Grüße, 世界"})
    _, text = server.post("/detokenize", {"tokens": ids["tokens"]})
    assert text["prompt"] == "Grüße, 世界"


def test_log_says_what_was_decided(server: ServerProcess) -> None:
    assert f"serves saddle-test at http://127.0.0.1:{server.port}, context 1024 tokens" in server.log()

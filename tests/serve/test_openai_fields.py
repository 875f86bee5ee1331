"""The less common fields of chat and completions, each against `saddle serve` with the demo checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.conftest import served
from tests.serve.processes import ServerProcess

HI: list[Any] = [{"role": "user", "content": "What is 2 plus 2?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with served("--max-model-len", "1024", "--disable-uvicorn-access-log") as server:
        yield server


def chat(client: openai.OpenAI, messages: list[Any] = HI, **extra: Any) -> Any:
    return client.chat.completions.create(model="saddle-demo", messages=messages, temperature=0, max_tokens=8,
                                          extra_body=extra)  # fmt: skip


def decoded(server: ServerProcess, ids: list[int]) -> str:
    return str(server.post("/detokenize", {"tokens": ids})[1]["prompt"])


def test_token_ids_are_those_of_the_prompt_and_the_answer(client: openai.OpenAI, server: ServerProcess) -> None:
    reply = chat(client, return_token_ids=True)
    extra, choice = reply.model_extra, reply.choices[0]
    _, again = server.post(TEXT, {"prompt": extra["prompt_token_ids"], "temperature": 0, "max_tokens": 8,
                                  "return_token_ids": True})  # fmt: skip
    assert again["choices"][0]["token_ids"] == choice.model_extra["token_ids"]
    assert len(extra["prompt_token_ids"]) == reply.usage.prompt_tokens
    assert "What is 2 plus 2?" in decoded(server, extra["prompt_token_ids"])


def test_prompt_logprobs_cover_the_prompt(client: openai.OpenAI) -> None:
    reply = chat(client, prompt_logprobs=1, return_token_ids=True)
    ids, entries = reply.model_extra["prompt_token_ids"], reply.model_extra["prompt_logprobs"]
    assert len(entries) == len(ids)
    assert entries[0] is None
    for token_id, entry in zip(ids[1:], entries[1:], strict=True):
        assert entry[str(token_id)]["logprob"] <= 0


def test_continuing_an_answer(client: openai.OpenAI, server: ServerProcess) -> None:
    half = [*HI, {"role": "assistant", "content": "It is"}]
    reply = chat(client, half, continue_final_message=True, add_generation_prompt=False, echo=True,
                 return_token_ids=True)  # fmt: skip
    assert decoded(server, reply.model_extra["prompt_token_ids"]).endswith("It is")
    assert reply.choices[0].message.content.startswith("It is")
    assert not (reply.choices[0].message.model_extra or {}).get("reasoning")


def test_without_a_generation_prompt(client: openai.OpenAI, server: ServerProcess) -> None:
    reply = chat(client, add_generation_prompt=False, return_token_ids=True)
    text = decoded(server, reply.model_extra["prompt_token_ids"])
    assert text.endswith("2 plus 2?[e~[\n")
    assert "<think>" not in text


def test_template_kwargs_reach_the_template(client: openai.OpenAI, server: ServerProcess) -> None:
    reply = chat(client, chat_template_kwargs={"model_identity": "You are a lamp."}, return_token_ids=True)
    assert "You are a lamp." in decoded(server, reply.model_extra["prompt_token_ids"])


def test_a_salt_keeps_the_cache_apart(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "What is 2 plus 2? " * 20}]

    def cached(salt: str | None) -> int:
        return int(chat(client, long, cache_salt=salt).usage.prompt_tokens_details.cached_tokens)

    first, second, other = cached("a"), cached("a"), cached("b")
    assert (first, other) == (0, 0)
    assert second > 100


def test_request_ids_are_kept(client: openai.OpenAI, server: ServerProcess) -> None:
    assert chat(client, request_id="mine").id == "chatcmpl-mine"
    _, reply = server.post(TEXT, {"prompt": "a", "max_tokens": 1, "request_id": "mine"})
    assert reply["id"] == "cmpl-mine"


def test_priority_needs_the_policy(client: openai.OpenAI) -> None:
    assert chat(client, priority=0).choices
    with pytest.raises(openai.BadRequestError, match="--scheduling-policy priority") as raised:
        chat(client, priority=1)
    assert raised.value.param == "priority"


def test_prompts_of_all_shapes_agree(server: ServerProcess) -> None:
    """A text, its ids, and lists of both."""
    _, tokens = server.post("/tokenize", {"prompt": "One and"})
    ids, answers = tokens["tokens"], []
    for prompt in ("One and", ids, ["One and"] * 2, [ids, ids]):
        _, reply = server.post(TEXT, {"prompt": prompt, "temperature": 0, "max_tokens": 6})
        answers += [choice["text"] for choice in reply["choices"]]
    assert len(answers) == 6
    assert len(set(answers)) == 1


def test_echo_of_completions(server: ServerProcess) -> None:
    _, plain = server.post(TEXT, {"prompt": "One and", "temperature": 0, "max_tokens": 6})
    _, echoed = server.post(TEXT, {"prompt": "One and", "temperature": 0, "max_tokens": 6, "echo": True})
    assert echoed["choices"][0]["text"] == "One and" + plain["choices"][0]["text"]


def test_a_suffix_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="fill-in-the-middle") as raised:
        client.completions.create(model="saddle-demo", prompt="a", suffix="b")
    assert raised.value.param == "suffix"


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high"])
def test_efforts_change_nothing(client: openai.OpenAI, effort: Any) -> None:
    """M2 has no levels: the answer is the same, token by token."""
    plain, asked = chat(client, return_token_ids=True), chat(client, return_token_ids=True, reasoning_effort=effort)
    assert plain.choices[0].model_extra["token_ids"] == asked.choices[0].model_extra["token_ids"]
    assert plain.model_extra["prompt_token_ids"] == asked.model_extra["prompt_token_ids"]

"""Offline generation on the bundled demo checkpoint: real answers from the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import saddle
from saddle import LLM, SamplingParams
from saddle.errors import ContextTooLong, InvalidRequest, StartupError

GREEDY = SamplingParams(temperature=0.0, max_tokens=300)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather for a city.", "parameters": CITY},
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    model = LLM(max_num_seqs=8, max_model_len=2048, kv_cache_memory_bytes=128 << 20)
    yield model
    model.close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_public_names() -> None:
    assert saddle.__all__ == ["LLM", "SamplingParams"]
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        saddle.Engine  # noqa: B018


def test_chat_gives_thinking_and_an_exact_answer(llm: LLM) -> None:
    [answer] = llm.chat(user("What is 37 + 58 - 12?"), GREEDY)
    [output] = answer.outputs
    assert output.text.strip().endswith("= 83")
    assert output.reasoning.startswith("37+58-12")
    assert output.finish_reason == "stop" and output.stop_reason is None


@pytest.mark.parametrize(("asked", "num_thought"), [
    ({"chat_template_kwargs": {"enable_thinking": False}}, 0), ({"thinking_token_budget": 3}, 3),
    ({"thinking_token_budget": -1}, None), ({"chat_template_kwargs": {"enable_thinking": True}}, None),
])  # fmt: skip
def test_thinking_is_limited_as_in_the_server(llm: LLM, asked: dict[str, Any], num_thought: int | None) -> None:
    [free] = llm.chat(user("What is 37 + 58 - 12?"), GREEDY)
    [limited] = llm.chat(user("What is 37 + 58 - 12?"), GREEDY, **asked)
    free_ids, ids = free.outputs[0].token_ids, limited.outputs[0].token_ids
    if num_thought is None:
        assert ids == free_ids
        return
    assert ids[: num_thought + 1] == [*free_ids[:num_thought], llm.tokenizer.end_think_id]
    assert limited.outputs[0].text.strip()
    assert bool(limited.outputs[0].reasoning) is (num_thought > 0)


def test_limits_of_thinking_that_make_no_sense(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="thinking_token_budget must be 0 or more"):
        llm.chat(user("hi"), GREEDY, thinking_token_budget=-2)
    with pytest.raises(InvalidRequest, match="may leave no token"):
        llm.chat(user("hi"), SamplingParams(allowed_token_ids=(5,)), thinking_token_budget=2)


def test_many_conversations_keep_their_order(llm: LLM) -> None:
    answers = llm.chat([user(f"What is {n} + 1?") for n in range(20, 32)], GREEDY)
    assert [a.outputs[0].text.rsplit("= ")[-1] for a in answers] == [str(n + 1) for n in range(20, 32)]


def test_a_tool_loop_reuses_its_own_tokens(llm: LLM) -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "What is the weather in Paris?"}]
    [first] = llm.chat(messages, GREEDY, tools=[WEATHER])
    [call] = first.outputs[0].tool_calls
    assert (call.name, json.loads(call.arguments), call.is_complete) == ("get_weather", {"city": "Paris"}, True)
    assert first.outputs[0].finish_reason == "tool_calls"
    function = {"name": call.name, "arguments": '{ "city":"Paris" }'}  # another spelling of the same arguments
    messages += [
        {"role": "assistant", "content": None, "reasoning_content": first.outputs[0].reasoning,
         "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'},
    ]  # fmt: skip
    [second] = llm.chat(messages, GREEDY, tools=[WEATHER])
    assert second.outputs[0].text.strip() == "The temperature is 21."
    generated = len(first.prompt_token_ids) + len(first.outputs[0].token_ids)
    assert second.num_cached_tokens == (generated - 1) // 16 * 16


def test_generate_continues_text_and_ids(llm: LLM) -> None:
    system = "You are Saddle Demo, a small demonstration model."
    text = f"]~!b[]~b]system\n{system}[e~[\n]~b]user\n2+3[e~[\n]~b]ai\n<think>\n"
    prompts: list[str | list[int]] = [text, llm.tokenizer.encode(text)]
    by_text, by_ids = llm.generate(prompts, GREEDY)
    assert by_text.outputs[0].text == by_ids.outputs[0].text
    assert by_text.outputs[0].text.endswith("2 + 3 = 5")
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids


def test_n_seeds_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=12, n=3, seed=7, logprobs=2, ignore_eos=True)
    [one], [two] = llm.generate("Once upon", params), llm.generate("Once upon", params)
    drawn = [output.token_ids for output in one.outputs]
    assert drawn == [output.token_ids for output in two.outputs]
    assert len({tuple(ids) for ids in drawn}) == 3
    for output in one.outputs:
        assert output.logprobs is not None and [entry.token_id for entry in output.logprobs] == output.token_ids
        assert output.finish_reason == "length"


def test_stop_string(llm: LLM) -> None:
    [answer] = llm.chat(user("What is 37 + 58?"), SamplingParams(temperature=0.0, max_tokens=200, stop=(" = 95",)))
    assert (answer.outputs[0].finish_reason, answer.outputs[0].stop_reason) == ("stop", " = 95")
    assert " = 95" not in answer.outputs[0].reasoning + answer.outputs[0].text


def test_bad_input_names_the_field_and_harms_nobody(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        llm.generate([""])
    with pytest.raises(InvalidRequest, match="between 0 and 1023"):
        llm.generate([[1, 2], [99_999]])
    with pytest.raises(ContextTooLong, match="context of this model 2048"):
        llm.generate([[1] * 2048])
    with pytest.raises(InvalidRequest, match="logit_bias"):
        llm.generate("a", SamplingParams(logit_bias={5000: 1.0}))
    with pytest.raises(InvalidRequest, match="sampling_params must be one or 2"):
        llm.generate(["a", "b"], [GREEDY])
    [answer] = llm.chat(user("What is 2 + 2?"), GREEDY)
    assert answer.outputs[0].text.strip() == "2 + 2 = 4"


def test_values_for_a_gpu_are_checked_like_flags() -> None:
    with pytest.raises(StartupError, match="--kv-cache-dtype must be one of auto, bfloat16"):
        LLM(kv_cache_dtype="fp7")  # type: ignore[arg-type]
    with pytest.raises(StartupError, match="--compilation-config mode must be 0"):
        LLM(compilation_config={"mode": 9})

"""The bundled demo checkpoint: whole, small, in the published layout, and able to do what it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from demo import cases, export, sums, talk
from demo.model import Model
from demo.tokenizer import ADDED, NOT_SPECIAL, VOCABULARY
from saddle import LLM, SamplingParams
from saddle.launch import demo_model_path
from saddle.model.config import ModelConfig
from saddle.parsing.tokenizer import Tokenizer
from tests.unit.model import model_support as support

FOLDER = demo_model_path()
GREEDY = SamplingParams(temperature=0.0, max_tokens=700)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    model = LLM(max_num_seqs=8, max_model_len=2048, kv_cache_memory_bytes=128 << 20)
    yield model
    model.close()


def test_it_fits_in_sixteen_mebibytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16 << 20


def test_every_published_tensor_is_there_and_no_other() -> None:
    expected = {name: (list(t.shape), t.dtype) for name, t in export.tensors(Model()).items()}
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in index.items():
        with safe_open(FOLDER / file, "pt") as weights:
            tensor = weights.get_tensor(name)
            found[name] = (list(tensor.shape), tensor.dtype)
            assert torch.isfinite(tensor.float()).all(), name
    assert found == expected
    layer = re.compile(r"model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight(_scale_inv)?")
    kinds = {name: dtype for name, (_, dtype) in found.items() if layer.fullmatch(name)}
    assert set(kinds.values()) == {torch.float8_e4m3fn, torch.float32}


def test_it_has_the_traits_of_the_family() -> None:
    config = ModelConfig.load(FOLDER)
    assert config.num_heads == 6 * config.num_kv_heads and config.head_dim == 128
    assert config.rotary_dim * 2 == config.head_dim
    assert config.num_experts_per_tok < config.num_experts
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["temperature"] == 0.2 and generation["eos_token_id"] == Tokenizer.load(FOLDER).eos_id


def test_tokenizer_has_the_added_tokens_of_m2_last() -> None:
    raw = json.loads((FOLDER / "tokenizer.json").read_text())["added_tokens"]
    names = [name.replace("+", " ") for name in ADDED]
    assert [token["content"] for token in raw] == names
    assert [token["id"] for token in raw] == list(range(VOCABULARY - len(ADDED), VOCABULARY))
    assert [token["special"] for token in raw] == [n < len(ADDED) - NOT_SPECIAL for n in range(len(ADDED))]


@pytest.mark.parametrize("text", ["What is 12 + 7?", "Grüße, 日本語 😀\n\t{}", "<think>x</think>", "a" * 300])
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = Tokenizer.load(FOLDER)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert all(len(tokenizer.encode(digit)) == 1 for digit in "0123456789")


@pytest.mark.parametrize("task", ["sums", "stories", "tools", "no_tool", "results"])
def test_it_does_its_tasks(task: str, llm: LLM) -> None:
    asked = cases.cases(task, 8)
    answers = llm.generate([case.prompt for case in asked], GREEDY)
    right = [
        case.check(cases.read(llm.tokenizer.decode(answer.outputs[0].token_ids[:-1], skip_special_tokens=False)))
        for case, answer in zip(asked, answers, strict=True)
    ]
    assert sum(right) >= 7, (task, right)


def test_it_says_what_it_is_and_declines_the_rest(llm: LLM) -> None:
    prompts = ["Who are you?", "Who painted the Mona Lisa?", "Write a haiku about autumn rain."]
    answers = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], GREEDY)
    assert [answer.outputs[0].text.strip() for answer in answers] == [talk.SELF, talk.DECLINE, talk.DECLINE]


def test_it_shows_its_steps(llm: LLM) -> None:
    [answer] = llm.chat([{"role": "user", "content": "What is 37 + 58 - 12?"}], GREEDY)
    [only] = answer.outputs
    assert only.text.strip() == "37 + 58 - 12 = 83" and only.finish_reason == "stop"
    assert only.reasoning.strip() == sums.steps(sums.Expression((37, 58, 12), "+-"))


def test_it_calls_the_tool_that_fits(llm: LLM) -> None:
    text = {"type": "string"}
    offered = [
        {"type": "function", "function": {"name": name, "description": about, "parameters": {
            "type": "object", "properties": {key: text}, "required": [key]}}}
        for name, about, key in (("get_weather", "Get the weather.", "city"), ("send_email", "Send an email.", "to"))
    ]  # fmt: skip
    [answer] = llm.chat([{"role": "user", "content": "What is the weather in Paris?"}], GREEDY, tools=offered)
    [only] = answer.outputs
    assert [(call.name, json.loads(call.arguments)) for call in only.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert only.finish_reason == "tool_calls"


def test_greedy_tokens_are_those_of_transformers(llm: LLM) -> None:
    """Against MiniMaxM2ForCausalLM in float32 on the dequantised weights."""
    case = cases.cases("tools", 1)[0]
    [answer] = llm.generate([case.prompt], GREEDY)
    ids, generated = llm.tokenizer.encode(case.prompt), answer.outputs[0].token_ids
    model = support.oracle(FOLDER)
    with torch.inference_mode():
        logits = model(torch.tensor([ids + generated])).logits[0]
    # Each token is the most likely one behind those before it: so greedy decoding there writes the same.
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == generated
    assert len(generated) > 20 and generated[-1] == llm.tokenizer.eos_id


def test_scores_belong_to_the_tasks() -> None:
    scores = json.loads((Path(cases.__file__).parent / "scores.json").read_text())
    assert "python -m demo.score" in scores["command"]
    for by_task in scores["scores"].values():
        assert set(cases.TASKS) <= set(by_task)
        assert all(by_task[task]["exact"] >= 0.9 for task in ("sums", "stories", "tools", "no_tool", "results"))

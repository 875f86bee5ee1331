"""Forward over paged KV: however tokens are cut into steps, blocks and batches, the logits are the same."""

from __future__ import annotations

import dataclasses
import random

import model_support as support
import pytest
import torch

from saddle.kernels import attention
from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.model.m2 import MiniMaxM2
from saddle.parallel.layout import ParallelLayout
from tests.support.checkpoint import M2_LIKE, SMALL, Shape, config_json

TOLERANCE = 1e-5  # float32 rounding, relative to the largest logit


def dummy_model(shape: Shape, dtype: torch.dtype = torch.float32) -> MiniMaxM2:
    config = ModelConfig.from_dict(config_json(shape, fp8=False))
    weights = w.allocate(config, ParallelLayout(), dtype, torch.device("cpu"))
    w.dummy(weights, seed=3)
    return MiniMaxM2(config, weights, 2048)


@pytest.fixture(scope="module", params=[SMALL, M2_LIKE], ids=["head_dim 64", "head_dim 128"])
def model(request: pytest.FixtureRequest) -> MiniMaxM2:
    return dummy_model(request.param)


@pytest.fixture(scope="module")
def tokens(model: MiniMaxM2) -> list[int]:
    return support.prompt(150, model.config.vocab_size)


@pytest.fixture(scope="module")
def whole(model: MiniMaxM2, tokens: list[int]) -> torch.Tensor:
    """Logits of all tokens, computed in one step."""
    return support.Sequences(model).step({"a": tokens}, all_logits=True)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bounds"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 149])
def test_chunks_equal_one_step(
    model: MiniMaxM2, tokens: list[int], whole: torch.Tensor, chunk: int, exact: bool, block_size: int
) -> None:
    sequences = support.Sequences(model, num_blocks=64, block_size=block_size, order=chunk)
    parts = [sequences.step({"a": tokens[i : i + chunk]}, exact=exact, all_logits=True)
             for i in range(0, len(tokens), chunk)]  # fmt: skip
    assert support.relative_error(torch.cat(parts), whole) < TOLERANCE


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "bounds"])
def test_mixed_steps_equal_rows_alone(model: MiniMaxM2, exact: bool) -> None:
    rng = random.Random(5)
    vocab = model.config.vocab_size
    texts = {f"row {i}": support.prompt(rng.choice([3, 18, 40, 90]), vocab, seed=i) for i in range(16)}
    expected = {name: support.Sequences(model).step({name: text}, all_logits=True) for name, text in texts.items()}
    together = support.Sequences(model, num_blocks=512)
    done = dict.fromkeys(texts, 0)
    while any(done[name] < len(texts[name]) for name in texts):
        work = {}
        for name in rng.sample(sorted(texts), 12):  # rows come and go, in any order, decoding beside prompts
            length = min(rng.choice([1, 1, 1, 9, 33]), len(texts[name]) - done[name])
            if length:
                work[name] = texts[name][done[name] : done[name] + length]
        if not work:
            continue
        found = together.step(work, exact=exact)
        for row, name in enumerate(work):
            done[name] += len(work[name])
            assert support.relative_error(found[row], expected[name][done[name] - 1]) < TOLERANCE, name


def test_blocks_are_shared(model: MiniMaxM2, tokens: list[int], whole: torch.Tensor) -> None:
    sequences = support.Sequences(model)
    sequences.step({"a": tokens[:128]})
    sequences.blocks["b"], sequences.lens["b"] = list(sequences.blocks["a"]), 128
    found = sequences.step({"b": tokens[128:]}, all_logits=True)
    assert support.relative_error(found, whole[128:]) < TOLERANCE


def test_a_row_reads_what_another_writes_in_the_same_step(
    model: MiniMaxM2, tokens: list[int], whole: torch.Tensor
) -> None:
    sequences = support.Sequences(model)
    sequences.blocks["b"] = sequences.blocks["a"] = [sequences.free.pop() for _ in range(8)]
    sequences.blocks["b"], sequences.lens["b"] = list(sequences.blocks["a"]), 128
    found = sequences.step({"b": tokens[128:], "a": tokens[:128]})
    assert support.relative_error(found, whole[[149, 127]]) < TOLERANCE


@pytest.mark.parametrize("limit", ["GROUP_NUMBERS", "MAX_SCORES"])
def test_limits_change_nothing(
    model: MiniMaxM2, tokens: list[int], whole: torch.Tensor, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, limit, {"cpu": 1} if limit == "GROUP_NUMBERS" else 500)
    sequences = support.Sequences(model)
    sequences.step(dict.fromkeys("abcd", tokens[:50]))
    found = sequences.step({"a": tokens[50:51], "b": tokens[50:], "c": tokens[50:51], "d": tokens[50:70]})
    assert support.relative_error(found, whole[[50, 149, 50, 69]]) < TOLERANCE


def test_groups_of_decoding_rows_are_bounded() -> None:
    kv = torch.zeros(100, 2, 2, 16, 64)
    per_block = 2 * 2 * 16 * 64
    contexts = [900, 20, 30, 17, 500, 1]
    budget = attention.GROUP_NUMBERS["cpu"]
    found = attention.plan(torch.zeros(6, 64, dtype=torch.int64), torch.tensor(contexts), torch.zeros(6),
                           [(1, context) for context in contexts], kv, torch.float32)  # fmt: skip
    assert found.decode_tokens is not None
    assert found.decode_tokens.tolist() == [5, 3, 1, 2, 4, 0]
    sizes = [group.chunks.shape[1] for group in found.decodes]
    assert sum(sizes) == 6
    for group, size in zip(found.decodes, sizes, strict=True):
        assert group.chunks.numel() // 4 * per_block <= budget or size == 1
    assert found.num_gathered == max(group.chunks.numel() for group in found.decodes) * 16 * 64


def test_logits_only_where_asked(model: MiniMaxM2, tokens: list[int], whole: torch.Tensor) -> None:
    found = support.Sequences(model).step({"a": tokens[:100], "b": tokens[:60]})
    assert found.shape == (2, model.config.vocab_size)
    assert found.dtype == torch.float32
    assert support.relative_error(found, whole[[99, 59]]) < TOLERANCE


def test_narrower_kv_memory(model: MiniMaxM2, tokens: list[int], whole: torch.Tensor) -> None:
    sequences = support.Sequences(model)
    sequences.kv = sequences.kv.bfloat16()
    sequences.step({"a": tokens[:100]})
    found = sequences.step({"a": tokens[100:]}, all_logits=True)
    error = support.relative_error(found, whole[100:])
    assert TOLERANCE < error < 0.1


def test_bfloat16_chunks() -> None:
    tokens = support.prompt(150, SMALL.vocab_size)
    model = dummy_model(dataclasses.replace(SMALL, num_layers=1), torch.bfloat16)
    expected = support.Sequences(model).step({"a": tokens}, all_logits=True)
    sequences = support.Sequences(model)
    parts = [sequences.step({"a": tokens[i : i + 10]}, all_logits=True) for i in range(0, len(tokens), 10)]
    assert support.relative_error(torch.cat(parts), expected) < 0.05


def test_steps_without_logits_or_tokens(model: MiniMaxM2, tokens: list[int], whole: torch.Tensor) -> None:
    sequences = support.Sequences(model)
    assert sequences.step({"a": tokens[:100]}, logit_index=[]).shape == (0, model.config.vocab_size)
    assert sequences.step({}).shape == (0, model.config.vocab_size)
    assert support.relative_error(sequences.step({"a": tokens[100:]}), whole[-1:]) < TOLERANCE

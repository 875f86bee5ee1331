"""The sampling kernels draw what torch's sampler draws, id for id, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from saddle.kernels import sampling
from saddle.protocol import SamplingParams
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.sampling_reference import PARAMS, scores, state_of

CPU = torch.device("cpu")
POISON = -77


def draw(
    logits: torch.Tensor, params: list[SamplingParams], seeds: list[int], num_valid: int, rows: list[int]
) -> tuple[list[int], torch.Tensor]:
    """Ids of the slots, and the rows' ids afterwards; slot i is for row rows[i], at position 3."""
    state = state_of(params, seeds, num_valid)
    work = sampling.SamplingWork.allocate(len(rows), logits.shape[1], CPU)
    for part in (work.group_max, work.chunk_max, work.chunk_sum, work.chunk_best):
        part.fill_(torch.nan)
    token_ids = torch.full((len(params), 8), POISON, dtype=torch.int32)
    out = torch.full((len(rows),), POISON, dtype=torch.int32)
    slots = torch.tensor(rows, dtype=torch.int32)
    sampling.launch(logits, slots, torch.full_like(slots, 3), state, work, token_ids, out, num_valid)
    return out.tolist(), token_ids


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize(("vocab_size", "spread"), [(400, 1.0), (9001, 1.0), (9001, 6.0)])
def test_ids_equal_those_of_torch(vocab_size: int, spread: float) -> None:
    torch.manual_seed(vocab_size)
    params, seeds = list(PARAMS), list(range(7, 7 + len(PARAMS)))
    logits = torch.randn(len(params), vocab_size) * spread
    found, token_ids = draw(logits, params, seeds, vocab_size, list(range(len(params))))
    wanted = [int(scores(logits[row], params[row], seeds[row], 3).argmax()) for row in range(len(params))]
    assert found == wanted
    assert token_ids[:, 3].tolist() == wanted
    assert (token_ids[:, [0, 1, 2, 4, 5, 6, 7]] == POISON).all()


@in_interpreter
def test_slots_in_any_order_and_padding_between_them() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 3000)
    params = [SamplingParams(top_k=9), SamplingParams(temperature=0.0), SamplingParams()]
    found, token_ids = draw(logits, params, [1, 2, 3], 3000, [2, -1, 0, 1])
    assert found[1] == POISON
    wanted = {row: int(scores(logits[slot], params[row], row + 1, 3).argmax())
              for slot, row in ((0, 2), (2, 0), (3, 1))}  # fmt: skip
    assert {2: found[0], 0: found[2], 1: found[3]} == wanted
    assert token_ids[:, 3].tolist() == [wanted[row] for row in range(3)]


@in_interpreter
@pytest.mark.parametrize("params", [PARAMS[2], PARAMS[3], PARAMS[5]], ids=str)
def test_ids_behind_the_valid_ones_never_come(params: SamplingParams) -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 5000)
    logits[:, 4100:] = 50.0
    found, _ = draw(logits, [params] * 4, list(range(4)), 4100, list(range(4)))
    assert found == [int(scores(logits[row, :4100], params, row, 3).argmax()) for row in range(4)]


@in_interpreter
@pytest.mark.parametrize(
    "params",
    [SamplingParams(top_k=3), SamplingParams(top_k=80), SamplingParams(top_p=0.25), SamplingParams(top_k=9, top_p=0.5)],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [600, 4500])
def test_of_equal_logits_the_lower_ids_are_kept(params: SamplingParams, vocab_size: int) -> None:
    """Four of 2.0, then everything equal: the first ids of the vocabulary fill what is left."""
    logits = torch.zeros(4, vocab_size)
    high = [vocab_size - 1, 17, 311, 400]
    logits[:, high] = 2.0
    found, _ = draw(logits, [params] * 4, list(range(4)), vocab_size, list(range(4)))
    order = sorted(high) + [token_id for token_id in range(vocab_size) if token_id not in high]
    kept = min(params.top_k or vocab_size, vocab_size)
    probs = torch.softmax(logits[0, order[:kept]].double(), 0)
    before = probs.cumsum(0) - probs
    support = order[: int((before < params.top_p).sum()) if params.top_p < 1 else kept]
    assert set(found) <= set(support)
    masked = torch.full((vocab_size,), -torch.inf)
    masked[support] = logits[0, support]
    assert found == [int(scores(masked, SamplingParams(), row, 3).argmax()) for row in range(4)]


@in_interpreter
def test_masked_rows_with_few_ids_left() -> None:
    torch.manual_seed(3)
    params = list(PARAMS[:8])
    logits = torch.full((8, 5000), -torch.inf)
    allowed = [5, 4095, 4096, 4999]
    logits[:, allowed] = torch.randn(8, 4)
    for only in ([0, 1, 2, 3], [3]):
        row_logits = torch.full_like(logits, -torch.inf)
        ids = [allowed[index] for index in only]
        row_logits[:, ids] = logits[:, ids]
        found, _ = draw(row_logits, params, list(range(8)), 5000, list(range(8)))
        assert found == [int(scores(row_logits[row], params[row], row, 3).argmax()) for row in range(8)]
        assert set(found) <= set(ids)

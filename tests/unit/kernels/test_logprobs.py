"""Log-probabilities by kernels equal those of torch in float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from saddle.kernels import logprobs
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.logprob_reference import assert_equal

CPU = torch.device("cpu")


def score(logits: torch.Tensor, rows: list[int], tokens: torch.Tensor, num_top: int, num_valid: int) -> torch.Tensor:
    work = logprobs.LogprobWork.allocate(max(4, len(rows)), logits.shape[1], CPU)
    for part in (work.group_max, work.chunk_max, work.chunk_sum, work.values):
        part.fill_(torch.nan)
    out = torch.full((len(rows), 3 + 2 * num_top), torch.nan, dtype=torch.float64)
    index = torch.tensor(rows, dtype=torch.int32)
    logprobs.launch(logits, index, tokens.to(torch.int32), num_top, work, out, num_valid)
    return out


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
@pytest.mark.parametrize(("vocab_size", "num_valid"), [(100, 97), (4096, 4096), (9001, 8500)])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20, 64])
def test_equal_to_torch(vocab_size: int, num_valid: int, num_top: int) -> None:
    torch.manual_seed(num_top)
    logits = torch.randn(5, vocab_size) * 4
    logits[:, num_valid:] = 60.0
    tokens = torch.randint(0, num_valid, (5,))
    tokens[1] = logits[1, :num_valid].argmax()
    rows = [1, 4, 0, 2]
    assert_equal(score(logits, rows, tokens, num_top, num_valid), logits[rows, :num_valid], tokens[rows], num_top)


@in_interpreter
@pytest.mark.parametrize("kind", ["all equal", "rounded", "best ones adjacent", "few left"])
def test_ties_and_crowds(kind: str) -> None:
    """Of equal logits the lower ids come first; the best may all lie in one group, or one in each."""
    torch.manual_seed(3)
    logits = torch.randn(2, 5000)
    if kind == "all equal":
        logits.fill_(-1.5)
    elif kind == "rounded":
        logits = (logits * 2).round()
    elif kind == "best ones adjacent":
        logits[:, 1030:1130] += 9.0
    else:
        logits.fill_(-torch.inf)
        logits[:, [7, 4321, 99]] = torch.tensor([1.0, 2.0, 2.0])
    tokens = torch.tensor([7, 4321])
    assert_equal(score(logits, [0, 1], tokens, 20, 5000), logits, tokens, 20)


@in_interpreter
def test_a_sum_of_many_small_numbers() -> None:
    """Two hundred thousand equal ids: adding them up in float32 one by one would lose the fifth digit."""
    logits = torch.full((1, 200_064), 0.1)
    logits[0, 5] = 12.0
    found = score(logits, [0], torch.tensor([100]), 1, 200_064)
    wanted = logits.double().log_softmax(-1)
    assert abs(float(found[0, 1] - wanted[0, 100])) < 1e-6 and abs(float(found[0, 3] - wanted[0, 5])) < 1e-6


@in_interpreter
def test_logits_that_are_no_numbers_give_ids_that_exist() -> None:
    logits = torch.full((1, 700), torch.nan)
    found = score(logits, [0], torch.tensor([3]), 5, 650)
    ids = found[0, 3 + 5 :].tolist()
    assert len(set(ids)) == 5 and all(0 <= token_id < 650 for token_id in ids)


@in_interpreter
def test_bounds_are_named() -> None:
    with pytest.raises(ValueError, match="num_top must be at most 50"):
        score(torch.zeros(1, 80), [0], torch.tensor([0]), 60, 50)
    with pytest.raises(ValueError, match="num_top must be at most 64"):
        score(torch.zeros(1, 800), [0], torch.tensor([0]), 65, 800)

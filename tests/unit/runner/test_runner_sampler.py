"""What each sampling parameter does to a row, and that it does nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sampling_support import EOS, Row, assert_drawn_from, draws, ids, reference, sample, sampler_over

from saddle.protocol import RowAdmit, RowWork, SamplingParams, StepMask
from saddle.runner import sampler as sampling

VOCAB = 48
GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(11)) * 2


def ranking(logits: torch.Tensor) -> list[int]:
    return logits.argsort(descending=True).tolist()


def bits_of(allowed: set[int], vocab_size: int = VOCAB) -> bytes:
    number = sum(1 << token_id for token_id in allowed)
    return number.to_bytes(4 * -(-vocab_size // 32), "little")


def edited(logits: torch.Tensor, request: Row) -> torch.Tensor:
    """The logits that a row draws from, seen through the share of each id over all."""
    found = torch.full((len(logits),), -math.inf)
    rows, sampler = sampler_over([request], len(logits))
    length = len(request.prompt) + len(request.output)
    work = [RowWork(0, 1, length, 0, [], True, length)]
    rows.begin(work)
    table = logits[None].clone()
    sampler.sample(table, work, torch.tensor([0]), torch.tensor([length]), None)
    found.copy_(table[0])
    return found


# choosing ------------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_whatever_else_is_set(logits: torch.Tensor) -> None:
    best = ranking(logits)[0]
    for extra in ({}, {"top_k": 7}, {"top_p": 0.1}, {"min_p": 0.5}, {"seed": 4}):
        assert draws(SamplingParams(**GREEDY, **extra), logits, 3) == [best] * 3


def test_greedy_and_sampled_rows_side_by_side(logits: torch.Tensor) -> None:
    cold, hot = SamplingParams(temperature=0.0), SamplingParams(temperature=2.0)
    found = ids(sample([Row(cold if i % 2 else hot, seed=i) for i in range(200)], logits))
    assert found[1::2] == [ranking(logits)[0]] * 100
    assert len(set(found[::2])) > 10


def test_a_seed_decides_and_position_moves_on(logits: torch.Tensor) -> None:
    params = SamplingParams(temperature=1.5)
    again = [ids(sample([Row(params, seed=5, output=[2] * n)], logits))[0] for n in range(40)]
    assert again == [ids(sample([Row(params, seed=5, output=[3] * n)], logits))[0] for n in range(40)]
    assert len(set(again)) > 8
    assert again != [ids(sample([Row(params, seed=6, output=[2] * n)], logits))[0] for n in range(40)]
    assert again != [ids(sample([Row(params, seed=5 + (1 << 32), output=[2] * n)], logits))[0] for n in range(40)]


def test_draws_do_not_depend_on_the_batch_or_the_row(logits: torch.Tensor) -> None:
    variants = [SamplingParams(), SamplingParams(top_k=9, top_p=0.9), SamplingParams(min_p=0.1, temperature=0.7),
                SamplingParams(repetition_penalty=1.3, top_k=20), SamplingParams(logit_bias={4: 3.0}),
                SamplingParams(logprobs=3), SamplingParams(temperature=0.0)]  # fmt: skip
    requests = [Row(variants[i % 7], seed=i, prompt=[i % 5 + 2], output=[7] * (i % 3)) for i in range(63)]
    alone = [ids(sample([request], logits))[0] for request in requests]
    assert ids(sample(requests, logits)) == alone
    assert ids(sample(requests, logits, order=range(20, 40))) == alone[20:40]


def test_the_next_step_reads_what_was_drawn(logits: torch.Tensor) -> None:
    rows, sampler = sampler_over([Row(SamplingParams(**GREEDY), prompt=(5, 6, 7))], VOCAB)
    work = [RowWork(0, 1, 3, 0, [], True, 3)]
    rows.begin(work)
    sampler.sample(logits[None].clone(), work, torch.tensor([0]), torch.tensor([3]), None)
    assert rows.token_ids[0, :4].tolist() == [5, 6, 7, ranking(logits)[0]]


# bias and bans -------------------------------------------------------------------------------------------------------


def test_logit_bias_adds_and_touches_nothing_else(logits: torch.Tensor) -> None:
    found = edited(logits, Row(SamplingParams(logit_bias={3: 2.5, 40: -100.0})))
    expected = logits.clone()
    expected[3] += 2.5
    expected[40] -= 100.0
    assert torch.equal(found, expected)


def test_only_allowed_ids_come(logits: torch.Tensor) -> None:
    allowed = (9, 2, 31)
    params = SamplingParams(allowed_token_ids=allowed, temperature=2.0)
    hidden = torch.full_like(logits, -math.inf)
    hidden[list(allowed)] = logits[list(allowed)]
    assert_drawn_from(draws(params, logits, 2000), reference(hidden, SamplingParams(temperature=2.0)))


def test_bad_words_never_complete(logits: torch.Tensor) -> None:
    first, second, third = ranking(logits)[:3]
    words = ((first,), (8, 9, second), (7, second), (6, second), (5, third))
    params = SamplingParams(**GREEDY, bad_words_ids=words)

    def after(*output: int) -> int:
        return ids(sample([Row(params, prompt=(0,), output=output)], logits))[0]

    assert after() == second
    assert after(8) == second
    assert after(8, 9) == third
    assert after(9, 9) == second
    assert after(7) == after(6) == third  # two words end with the same id: one match is enough
    assert after(5) == second
    # The sequence may begin in the prompt, be all of it, or be longer than what is there.
    assert ids(sample([Row(params, prompt=(7,))], logits))[0] == third
    assert ids(sample([Row(params, prompt=(9,))], logits))[0] == second
    assert ids(sample([Row(params, prompt=(0, 8), output=(9,))], logits))[0] == third


def test_min_tokens_holds_back_every_stop(logits: torch.Tensor) -> None:
    (eos,) = EOS
    logits[eos] = logits.max() + 5
    stop = 30
    logits[stop] = logits.max() + 5
    rest = [token_id for token_id in ranking(logits) if token_id not in (eos, stop)]
    params = SamplingParams(**GREEDY, min_tokens=2, stop_token_ids=(stop, 10**6))
    for num_output, expected in ((0, rest[0]), (1, rest[0]), (2, stop), (3, stop)):
        assert ids(sample([Row(params, output=[5] * num_output)], logits)) == [expected]
    ignoring = SamplingParams(**GREEDY, min_tokens=2, stop_token_ids=(stop,), ignore_eos=True)
    assert ids(sample([Row(ignoring)], logits)) == [eos]


def test_ids_that_pad_the_vocabulary_never_come(logits: torch.Tensor) -> None:
    logits[40:] = logits.max() + 9
    params = [SamplingParams(**GREEDY, logprobs=3), SamplingParams(logprobs=3), SamplingParams(top_k=5, logprobs=3)]
    for found in sample([Row(one, seed) for seed in range(60) for one in params], logits, num_valid=40):
        assert found.token_ids[0] < 40
        assert found.logprobs is not None
        assert all(token_id < 40 for token_id, _ in found.logprobs[0].top)
        assert found.logprobs[0].logprob == pytest.approx(
            float(logits[:40].log_softmax(-1)[found.token_ids[0]]), abs=1e-5
        )


# penalties -----------------------------------------------------------------------------------------------------------


def test_penalties_by_their_formulas(logits: torch.Tensor) -> None:
    prompt, output = (4, 5, 5), (6, 6, 6, 7, 5)
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25)
    expected = logits.clone()
    for token_id in (4, 5, 6, 7):
        expected[token_id] = expected[token_id] / 1.3 if expected[token_id] > 0 else expected[token_id] * 1.3
    for token_id, count in ((6, 3), (7, 1), (5, 1)):
        expected[token_id] -= 0.4 + 0.25 * count
    found = edited(logits, Row(params, prompt=prompt, output=output))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("extra", "changed"),
    [({"repetition_penalty": 0.8}, {4, 6}), ({"presence_penalty": -1.0}, {6}), ({"frequency_penalty": 1.0}, {6})],
    ids=repr,
)
def test_each_penalty_alone(logits: torch.Tensor, extra: dict[str, Any], changed: set[int]) -> None:
    found = edited(logits, Row(SamplingParams(**extra), prompt=(4,), output=(6,)))
    assert set((found != logits).nonzero().flatten().tolist()) == changed


def test_counts_follow_what_is_drawn_and_survive_readmission(logits: torch.Tensor) -> None:
    """Step by step, and all at once after a preemption: the same ids."""
    params = SamplingParams(temperature=0.9, frequency_penalty=1.5, repetition_penalty=1.1)
    request = Row(params, seed=3)
    rows, sampler = sampler_over([request], VOCAB)
    found: list[int] = []
    for length in range(1, 9):
        work = [RowWork(0, 1, 1, 0, [], True, length)]
        rows.begin(work)
        found += ids(sampler.sample(logits[None].clone(), work, torch.tensor([0]), torch.tensor([length]), None))
    for done in range(8):
        assert ids(sample([Row(params, seed=3, output=found[:done])], logits)) == found[done : done + 1]
    assert len(set(found)) > len(set(draws(SamplingParams(temperature=0.0), logits, 8)))


def test_a_new_request_forgets_the_edits_of_the_last(logits: torch.Tensor) -> None:
    rows, sampler = sampler_over([Row(SamplingParams(**GREEDY, logit_bias={9: 50.0}))], VOCAB)
    admit = RowAdmit(0, 2, [0], 1, 0, [], SamplingParams(**GREEDY), 0)
    rows.admit(admit)
    sampler.admit(admit)
    work = [RowWork(0, 2, 1, 0, [], True, 1)]
    rows.begin(work)
    found = sampler.sample(logits[None].clone(), work, torch.tensor([0]), torch.tensor([1]), None)
    assert ids(found) == ranking(logits)[:1]


# masks ---------------------------------------------------------------------------------------------------------------


def test_masked_rows_take_allowed_ids_and_others_are_free(logits: torch.Tensor) -> None:
    order = ranking(logits)
    params = SamplingParams(**GREEDY)
    mask = StepMask(0, [2, 0], [bits_of({order[3], order[5]}), bits_of({order[-1]})])
    found = ids(sample([Row(params)] * 3, logits, mask))
    assert found == [order[-1], order[0], order[3]]


def test_a_mask_of_every_id_of_an_odd_vocabulary() -> None:
    size = 77
    for token_id in range(size):
        mask = StepMask(0, [0], [bits_of({token_id}, size)])
        assert ids(sample([Row(SamplingParams(top_k=20))], torch.zeros(size), mask)) == [token_id]


def test_a_mask_for_a_row_that_ended_is_left_alone(logits: torch.Tensor) -> None:
    mask = StepMask(0, [1], [bits_of({5})])
    assert ids(sample([Row(SamplingParams(**GREEDY))] * 2, logits, mask, order=[0])) == ranking(logits)[:1]


def test_a_mask_of_the_wrong_size_is_an_error(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a mask of 48 ids has 8 bytes, got 4"):
        sample([Row(SamplingParams())], logits, StepMask(0, [0], [b"\xff" * 4]))


# logprobs ------------------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits(logits: torch.Tensor) -> None:
    """Neither temperature nor truncation, bias, penalties or a mask change them."""
    raw = logits.log_softmax(-1)
    order = ranking(logits)
    params = SamplingParams(temperature=0.3, top_k=4, logit_bias={order[9]: 90.0}, presence_penalty=1.0, logprobs=5)
    (found,) = sample([Row(params, output=(order[0],))], logits)
    assert found.logprobs is not None
    (entry,) = found.logprobs
    assert (entry.token_id, entry.rank) == (order[9], 10) and found.token_ids == [order[9]]
    assert entry.logprob == pytest.approx(float(raw[order[9]]), abs=1e-6)
    assert [token_id for token_id, _ in entry.top] == order[:5]
    assert [value for _, value in entry.top] == pytest.approx(raw[order[:5]].tolist(), abs=1e-6)


def test_each_row_gets_as_many_as_it_asked_for(logits: torch.Tensor) -> None:
    asked = [None, 0, 3, None, 1, 1000]
    found = sample([Row(SamplingParams(**GREEDY, logprobs=count)) for count in asked], logits)
    sizes = [None if one.logprobs is None else len(one.logprobs[0].top) for one in found]
    assert sizes == [None, 0, 3, None, 1, VOCAB]
    best = ranking(logits)[0]
    assert all(one.logprobs is None or (one.logprobs[0].token_id, one.logprobs[0].rank) == (best, 1) for one in found)


def test_logprobs_of_rows_with_different_logits() -> None:
    table = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3))
    asked = [None, 2, None, 0, 4]
    for row, found in enumerate(sample([Row(SamplingParams(**GREEDY, logprobs=count)) for count in asked], table)):
        raw = table[row].log_softmax(-1)
        assert found.token_ids == [int(raw.argmax())]
        if asked[row] is None:
            assert found.logprobs is None
        else:
            assert found.logprobs is not None
            assert found.logprobs[0].logprob == pytest.approx(float(raw.max()), abs=1e-6)
            assert [token_id for token_id, _ in found.logprobs[0].top] == ranking(raw)[: asked[row]]


def test_the_rank_counts_equal_logits_as_vllm_does() -> None:
    """How many ids are at least as likely, the chosen one included."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]] * 4)
    found = sampling.score(logits, torch.tensor([1, 3, 4, 5]), 0)
    assert found[:, 2].tolist() == [1, 2, 5, 6]


def test_scores_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position by position, in parts, and without the padding of the vocabulary."""
    table = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(4))
    wanted = torch.tensor([3, 0, 39, 3, 8, 20, 1])
    _, sampler = sampler_over([Row(SamplingParams())], VOCAB, num_valid=40)
    monkeypatch.setattr(sampling, "MAX_SCORED", 3)
    raw = table[:, :40].log_softmax(-1)
    for place, entry in enumerate(sampler.score_prompt(table.clone(), wanted, 2)):
        own = raw[place, wanted[place]]
        best = raw[place].topk(2)
        assert (entry.token_id, entry.rank) == (int(wanted[place]), int((raw[place] > own).sum()) + 1)
        assert entry.logprob == pytest.approx(float(own), abs=1e-6)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert len(sampler.score_prompt(table.clone(), wanted, 0)) == 7


def test_asking_for_logprobs_changes_no_token(logits: torch.Tensor) -> None:
    assert draws(SamplingParams(), logits, 50) == draws(SamplingParams(logprobs=4), logits, 50)

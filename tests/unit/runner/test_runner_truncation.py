"""What may be sampled: the same ids as a full sort of the vocabulary leaves, and the right shares of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from sampling_support import Row, assert_drawn_from, draws, ids, reference, sample

from saddle.protocol import SamplingParams
from saddle.runner import truncation

VOCAB = 1500  # more than any number of candidates that is gathered
TEMPERATURES, TOP_KS = (0.3, 1.0, 1.7), (0, 1, 5, 40, 64, 65, 1024, 1100, 1500, 9999)
TOP_PS, MIN_PS = (1.0, 0.95, 0.3, 1e-6), (0.0, 0.02, 1.0)


def kept(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[V] float64, probabilities after truncation of one row, as a sampler computes them."""
    limits = truncation.Limits(
        temperature=torch.tensor([[params.temperature]]),
        top_p=torch.tensor([[params.top_p]]),
        min_p=torch.tensor([[params.min_p]]),
        top_k=torch.tensor([[params.top_k if 0 < params.top_k < VOCAB else VOCAB]]),
    )
    found, token_ids = truncation.candidates(logits[None], limits, truncation.width_of(params, VOCAB))
    return torch.zeros(VOCAB, dtype=torch.float64).scatter(0, token_ids[0], found[0].double().softmax(-1))


def test_how_many_candidates_are_gathered() -> None:
    def width(vocab_size: int = VOCAB, **params: float) -> int:
        return truncation.width_of(SamplingParams(**params), vocab_size)  # type: ignore[arg-type]

    assert [width(top_k=k) for k in (1, 64, 65, 1024, 1025, 1499)] == [64, 64, 1024, 1024, VOCAB, VOCAB]
    assert [width(top_k=k) for k in (0, -1, 1500, 9999)] == [0] * 4
    assert [width(top_p=0.9), width(min_p=0.5), width(top_k=40, top_p=0.9)] == [VOCAB, 0, 64]
    assert [width(50, top_k=5), width(50, top_k=50), width(50, top_p=0.5)] == [50, 0, 50]


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_support_and_shares_equal_a_full_sort(spread: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(7)) * spread
    for temperature, top_k, top_p, min_p in itertools.product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        expected, found = reference(logits, params), kept(logits, params)
        assert torch.equal(found > 0, expected > 0), params
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_most_likely_id_always_stays() -> None:
    logits = torch.zeros(VOCAB)
    logits[3] = 1e-3
    for params in (SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0), SamplingParams(top_k=40, top_p=1e-9),
                   SamplingParams(top_p=1e-300),
                   SamplingParams(top_k=40, min_p=1.0)):  # fmt: skip
        assert kept(logits, params).nonzero().flatten().tolist() == [3]


def test_nothing_is_cut_where_nothing_is_asked() -> None:
    """Also not by rounding: with top_p 1 the mass of the last candidates may sum to a little more than 1."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    assert (kept(logits, SamplingParams(min_p=1e-30)) > 0).all()
    for seed in range(50):
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
        assert int((kept(logits, SamplingParams(top_k=60, min_p=1e-30)) > 0).sum()) == 60


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_k=40, top_p=0.95),
        SamplingParams(top_p=0.8, temperature=1.5),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=20, min_p=0.05, temperature=1.9),
    ],
    ids=repr,
)
def test_ids_come_as_often_as_they_should(params: SamplingParams) -> None:
    logits = torch.randn(96, generator=torch.Generator().manual_seed(5)) * 1.5
    assert_drawn_from(draws(params, logits, 4000), reference(logits, params))


def test_many_equal_logits_share_evenly() -> None:
    """Noise of 32 bits is fine enough for a wide vocabulary that is flat."""
    logits = torch.zeros(200)
    assert_drawn_from(draws(SamplingParams(), logits, 8000), torch.full((200,), 1 / 200, dtype=torch.float64))


def test_neighbours_do_not_change_a_row_even_where_logits_tie() -> None:
    """Logits rounded to few values, as bfloat16 gives: the k-th largest is one of many that are equal."""
    logits = (torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * 2).round()
    kinds = [SamplingParams(top_k=3), SamplingParams(top_k=40, top_p=0.9), SamplingParams(top_k=64, min_p=0.1),
             SamplingParams(top_k=900), SamplingParams(top_k=1200), SamplingParams(top_p=0.7), SamplingParams(),
             SamplingParams(temperature=0.0)]  # fmt: skip
    requests = [Row(kinds[i % len(kinds)], seed=i) for i in range(48)]
    together = ids(sample(requests, logits))
    assert [ids(sample([request], logits))[0] for request in requests] == together
    order = list(range(48))[::-1]
    assert ids(sample(requests, logits, order=order)) == together[::-1]

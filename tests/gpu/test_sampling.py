"""Sampling kernels on a GPU: the ids of torch's float64 reference, at M2's vocabulary."""

from __future__ import annotations

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from saddle.kernels import logit_edits, logprobs, sampling
from saddle.protocol import SamplingParams
from saddle.runner import logits as edit
from saddle.runner.random import keys_of, uniform
from tests.support.edited_rows import edited_both_ways
from tests.support.logprob_reference import assert_equal
from tests.support.sampling_reference import PARAMS, p_value, scores, state_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

VOCAB = 200_064
POISON = -77
# The kernel's noise and quotients are float32: an id that scores this much less than the best may win.
CLOSE = 2e-5


def draw(
    logits: torch.Tensor, params: list[SamplingParams], seeds: list[int], num_valid: int, rows: list[int] | None = None
) -> tuple[list[int], torch.Tensor]:
    """Ids of the slots, and the rows' ids afterwards; all at position 3."""
    rows = list(range(len(params))) if rows is None else rows
    work = sampling.SamplingWork.allocate(len(rows), logits.shape[1], torch.device("cuda"))
    for part in (work.group_max, work.chunk_max, work.chunk_sum, work.chunk_best):
        part.fill_(torch.nan)
    token_ids = torch.full((len(params), 8), POISON, dtype=torch.int32, device="cuda")
    out = torch.full((len(rows),), POISON, dtype=torch.int32, device="cuda")
    slots = torch.tensor(rows, dtype=torch.int32, device="cuda")
    state = state_of(params, seeds, num_valid).cuda()
    sampling.launch(logits, slots, torch.full_like(slots, 3), state, work, token_ids, out, num_valid)
    return out.tolist(), token_ids.cpu()


@pytest.mark.parametrize("vocab_size", [1024, VOCAB])
@pytest.mark.parametrize("spread", [0.02, 1.0, 5.0])
def test_ids_are_those_of_the_reference(spread: float, vocab_size: int) -> None:
    params, seeds = [one for one in PARAMS for _ in range(2)], list(range(2 * len(PARAMS)))
    logits = torch.randn(len(params), vocab_size, device="cuda") * spread
    found, token_ids = draw(logits, params, seeds, vocab_size)
    assert token_ids[:, 3].tolist() == found and (token_ids[:, [0, 1, 2, 4, 5, 6, 7]] == POISON).all()
    for row, token_id in enumerate(found):
        wanted = scores(logits[row], params[row], seeds[row], 3)
        assert wanted[token_id] >= wanted.max() - CLOSE, f"{params[row]}: {token_id}, not {int(wanted.argmax())}"


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 31, 33, 64, 128, 256])
def test_any_number_of_rows_and_padding(num_rows: int) -> None:
    params = [PARAMS[row % 6] for row in range(num_rows)]
    logits = torch.randn(num_rows + 2, VOCAB, device="cuda") * 3
    rows = [-1, *reversed(range(num_rows)), -1]
    found, _ = draw(logits, params, list(range(num_rows)), VOCAB, rows)
    assert found[0] == found[-1] == POISON
    for slot in range(1, num_rows + 1, max(1, num_rows // 8)):
        wanted = scores(logits[slot], params[rows[slot]], rows[slot], 3)
        assert wanted[found[slot]] >= wanted.max() - CLOSE


# 60 ids with known logits from 6 down to 3.05, far from each other; all others have -4 to -6. By way of drawing: what
# is asked for, and in how many cells draws are counted: an id that should come 20 times has its own, others share one.
WAYS = {
    "uncut": (SamplingParams(temperature=0.9), 61),
    "short": (SamplingParams(temperature=0.8, top_k=50, top_p=0.9), 32),
    "long": (SamplingParams(temperature=1.1, top_k=2000, top_p=0.97), 55),
}
DRAWS = 1 << 16
# Of a sampler that is right, one in a million choices of logits and seeds fails; these are fixed.
FALSE_POSITIVES = 1e-6


def known_logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(21)
    logits = -4 - 2 * torch.rand(VOCAB, generator=generator)
    logits[torch.arange(60) * 3331 + 17] = 6 - 0.05 * torch.arange(60)
    return logits


def kept_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[V] float64: how often each id should come."""
    kept = scores(logits, params, 0, 3) > -torch.inf
    return torch.where(kept, logits.double() / params.temperature, -torch.inf).softmax(0)


def drawn_counts(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """How often each id came with seeds 0, 1, 2, ..."""
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    row = logits.cuda().expand(256, -1)
    for start in range(0, DRAWS, 256):
        found, _ = draw(row, [params] * 256, list(range(start, start + 256)), VOCAB)
        counts += torch.bincount(torch.tensor(found), minlength=VOCAB)
    return counts


@pytest.mark.parametrize("way", WAYS)
def test_ids_come_as_often_as_they_should(way: str) -> None:
    """And the same test notices a temperature that is 5 % too high."""
    (params, num_cells), logits = WAYS[way], known_logits()
    probs = kept_probs(logits, params)
    found, cells = p_value(drawn_counts(logits, params), probs)
    hotter = msgspec.structs.replace(params, temperature=1.05 * params.temperature)
    wrong, _ = p_value(drawn_counts(logits, hotter), probs)
    print(f"\n{way}: p {found:.3g} over {cells} cells; 5 % too hot p {wrong:.3g}")
    assert cells == num_cells and found > FALSE_POSITIVES
    assert wrong < FALSE_POSITIVES


def test_the_chi_square_test_notices_squeezed_uniforms() -> None:
    """The reference's noise of 60 ids from uniform numbers that never reach the last hundredth, and from right ones."""
    params, ids = WAYS["uncut"][0], torch.arange(60)[None]
    logits = known_logits()[ids * 3331 + 17].double() / params.temperature
    keys = torch.stack([keys_of(seed) for seed in range(DRAWS)])
    right = uniform(keys, torch.full((DRAWS,), 3), ids.expand(DRAWS, -1))
    found = {}
    for factor in (1.0, 0.99):
        noise = -((factor * right).log().neg().log())
        counts = torch.bincount((logits + noise).argmax(-1), minlength=60)
        found[factor], cells = p_value(counts, logits[0].softmax(0))
        assert cells == 60
    print(f"\nuniforms p {found[1.0]:.3g}, squeezed p {found[0.99]:.3g}")
    assert found[1.0] > FALSE_POSITIVES > found[0.99]


def test_logits_that_are_no_numbers_give_an_id_that_exists() -> None:
    logits = torch.full((len(PARAMS), VOCAB), torch.nan, device="cuda")
    found, _ = draw(logits, list(PARAMS), [0] * len(PARAMS), 200_000)
    assert all(0 <= token_id < 200_000 for token_id in found)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(2, VOCAB, device="cuda")
    logits[0, [5000, 70_000, 4097]] = 1.0
    assert draw(logits, [SamplingParams(temperature=0.0)] * 2, [0, 0], VOCAB)[0] == [4097, 0]


def test_masks_and_penalties_equal_those_of_torch() -> None:
    logits = torch.randn(6, VOCAB, device="cuda") * 4
    wanted = logits.clone()
    bits = torch.randint(-(2**31), 2**31 - 1, (2, -(-VOCAB // 32)), dtype=torch.int32)
    for slot, words in ((4, bits[0]), (1, bits[1])):
        allowed = edit.mask_bits(words.numpy().tobytes(), VOCAB, torch.device("cuda"))
        wanted[slot].masked_fill_(~allowed, -torch.inf)
    logit_edits.mask_rows(logits, torch.tensor([4, 1], dtype=torch.int32, device="cuda"), bits.cuda())
    assert torch.equal(logits, wanted)
    params = [SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.2),
              SamplingParams(repetition_penalty=0.8), SamplingParams(frequency_penalty=0.7)]  # fmt: skip
    state = state_of(params, [0, 1, 2], VOCAB).cuda()
    counts = torch.full((3, VOCAB), POISON, dtype=torch.int32, device="cuda")
    rows = torch.tensor([1, 2, 0, 1, 2, 0], dtype=torch.int32, device="cuda")
    slots = torch.tensor([2, 0, 4], dtype=torch.int32, device="cuda")  # rows 0, 1, 2
    drawn = torch.tensor([7, 0, 9, 0, 7, 0], dtype=torch.int32, device="cuda")
    for row, slot in ((0, 2), (1, 0), (2, 4)):
        ids = torch.randint(0, 3000, (2500,), dtype=torch.int32, device="cuda")
        logit_edits.mark_tokens(ids, counts[row], 1500)
        in_prompt = torch.zeros(VOCAB, dtype=torch.bool, device="cuda")
        in_prompt[ids[:1500].long()] = True
        output = torch.bincount(ids[1500:].long(), minlength=VOCAB).float()
        output[drawn[slot].long()] += 1
        edit.penalise(wanted[slot], in_prompt, output, params[row])
    logit_edits.count_tokens(slots, rows, drawn, counts)
    logit_edits.penalise_rows(logits, slots, rows, state, counts)
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


def test_lists_of_edits_equal_those_of_torch() -> None:
    found, wanted, raw = edited_both_ways(VOCAB, torch.device("cuda"))
    assert torch.equal(found, wanted)
    assert (found != raw).any(1).sum() == 7  # of nine rows one asks for nothing, and one is long enough


@pytest.mark.parametrize("num_valid", [VOCAB, 200_000])
@pytest.mark.parametrize(("num_rows", "num_top"), [(1, 20), (2, 0), (3, 1), (33, 5), (64, 20), (256, 64)])
def test_logprobs_equal_those_of_torch(num_rows: int, num_top: int, num_valid: int) -> None:
    logits = torch.randn(num_rows + 1, VOCAB, device="cuda") * 3
    logits[::2] = (logits[::2] * 4).round() / 4  # with ties
    logits[:, num_valid:] = 50.0
    order = torch.randperm(num_rows + 1)[:num_rows].to(torch.int32).cuda()
    tokens = torch.randint(num_valid, (num_rows + 1,), device="cuda")
    tokens[::3] = logits[::3, :num_valid].argmax(-1)
    work = logprobs.LogprobWork.allocate(num_rows, VOCAB, torch.device("cuda"))
    for part in (work.group_max, work.chunk_max, work.chunk_sum, work.values):
        part.fill_(torch.nan)
    out = torch.full((num_rows, 3 + 2 * num_top), torch.nan, dtype=torch.float64, device="cuda")
    logprobs.launch(logits, order, tokens.to(torch.int32), num_top, work, out, num_valid)
    index = order.long()
    assert_equal(out, logits[index, :num_valid], tokens[index], num_top)

"""Masks, lists of edits and penalties by kernels equal those of torch, in Triton's interpreter."""

from __future__ import annotations

import torch

from saddle.kernels import logit_edits
from saddle.protocol import SamplingParams
from saddle.runner import logits as edit
from tests.support.edited_rows import edited_both_ways
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.sampling_reference import state_of

VOCAB = 4500
POISON = -77


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


@in_interpreter
def test_masks() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB)
    bits = torch.randint(-(2**31), 2**31 - 1, (2, -(-VOCAB // 32)), dtype=torch.int32)
    wanted = logits.clone()
    for slot, words in ((3, bits[0]), (1, bits[1])):
        allowed = edit.mask_bits(words.numpy().tobytes(), VOCAB, torch.device("cpu"))
        wanted[slot].masked_fill_(~allowed, -torch.inf)
    logit_edits.mask_rows(logits, torch.tensor([3, 1], dtype=torch.int32), bits)
    assert torch.equal(logits, wanted)


@in_interpreter
def test_lists_of_edits() -> None:
    found, wanted, raw = edited_both_ways(VOCAB, torch.device("cpu"))
    assert torch.equal(found, wanted)
    changed = (found != raw).sum(1).tolist()
    # All but the row that asks for nothing and the one whose least length is reached.
    assert changed[0] == changed[6] == 0 and all(count > 0 for count in (*changed[1:6], *changed[7:]))


@in_interpreter
def test_penalties_of_prompt_and_output() -> None:
    torch.manual_seed(1)
    params = [SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.2),
              SamplingParams(repetition_penalty=0.8), SamplingParams(frequency_penalty=0.7)]  # fmt: skip
    logits = torch.randn(6, VOCAB) * 4
    logits[2, 17] = -torch.inf
    wanted = logits.clone()
    counts = torch.full((3, VOCAB), POISON, dtype=torch.int32)
    rows = torch.tensor([1, 2, 0, 1, 2, 0], dtype=torch.int32)
    drawn = torch.tensor([7, 0, 9, 0, 7, 0], dtype=torch.int32)
    for row, slot in ((0, 2), (1, 0), (2, 4)):
        ids = torch.randint(0, 300, (1500,), dtype=torch.int32)
        logit_edits.mark_tokens(ids, counts[row], 1100)
        in_prompt = torch.zeros(VOCAB, dtype=torch.bool)
        in_prompt[ids[:1100].long()] = True
        output = torch.bincount(ids[1100:].long(), minlength=VOCAB).float()
        output[drawn[slot].long()] += 1
        edit.penalise(wanted[slot], in_prompt, output, params[row])
    slots = torch.tensor([2, 0, 4], dtype=torch.int32)  # rows 0, 1, 2
    logit_edits.count_tokens(slots, rows, drawn, counts)
    logit_edits.penalise_rows(logits, slots, rows, state_of(params, [0, 1, 2], VOCAB), counts)
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)

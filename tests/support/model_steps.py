"""Rows over the fused model's paged memory, stepped by hand: what a runner would do, in plain sight."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from saddle.kernels.paged_kv import BLOCK_SIZE
from saddle.model.fused import FusedMiniMaxM2
from saddle.model.inputs import DeviceInputs

NUM_ROWS = 16


class Steps:
    """A few sequences in scattered blocks. Rows that decode come first in a step, as `DeviceInputs` wants it."""

    def __init__(self, model: FusedMiniMaxM2, kind: str = "bf16", num_blocks: int = 64, blocks_a_row: int = 16) -> None:
        self.model, self.device = model, model.weights.embed.device
        self.kv = model.allocate_kv(num_blocks, BLOCK_SIZE, kind)
        order = list(range(num_blocks))
        random.Random(0).shuffle(order)
        self.tables = torch.zeros(NUM_ROWS, blocks_a_row, dtype=torch.int32, device=self.device)
        self.blocks = {row: order[row * blocks_a_row : (row + 1) * blocks_a_row]
                       for row in range(min(NUM_ROWS, num_blocks // blocks_a_row))}  # fmt: skip
        for row, own in self.blocks.items():
            self.tables[row] = torch.tensor(own, dtype=torch.int32)
        self.lens = dict.fromkeys(self.blocks, 0)

    @torch.inference_mode()
    def step(
        self, work: Mapping[int, Sequence[int]], padding: int = 0, through_pieces: bool = False
    ) -> dict[int, torch.Tensor]:
        """Compute new tokens of some rows; logits [n, V] float32 of each row's new tokens, copied.

        Args:
            work: token ids by row.
            padding: rows added to a decode step, tokens to one with prompts.
            through_pieces: call the pieces of a step with prompts from outside, as graphs are.
        """
        rows = sorted(work, key=lambda row: len(work[row]) > 1)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, contexts = [0], []
        for row in rows:
            begin = self.lens[row]
            self.lens[row] = end = begin + len(work[row])
            ids += work[row]
            positions += range(begin, end)
            slots += [self.blocks[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(begin, end)]
            starts.append(len(ids))
            contexts.append(end)
        lens = tuple(len(work[row]) for row in rows)
        decodes = sum(length == 1 for length in lens)
        every = list(range(len(ids)))
        ids += [0] * padding
        positions += [-1] * padding
        slots += [-1] * padding
        if decodes == len(rows):
            contexts += [0] * padding
            starts += range(len(rows) + 1, len(rows) + padding + 1)
            rows += [-1] * padding
            decodes += padding

        def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        only_decodes = decodes == len(rows)
        inputs = DeviceInputs(
            ints(ids), ints(positions), ints(slots, torch.int64), self.tables, ints(rows), ints(starts), ints(contexts),
            ints(every), decodes, max(lens), max(contexts), None if only_decodes else lens,
        )  # fmt: skip
        piece = (lambda number: self.model.piece(number, inputs, self.kv)) if through_pieces else None
        hidden = self.model.hidden(inputs, self.kv, piece)
        most = self.model.max_rows
        logits = torch.cat([self.model.logits(part).clone() for part in hidden.split(most)])  # type: ignore
        return {row: logits[begin : begin + length]
                for row, begin, length in zip(rows, starts, lens, strict=False)}  # fmt: skip


def follow_alone(steps: Steps, ids: Sequence[int], part: int, num_decoded: int = 26) -> torch.Tensor:
    """Logits [T, V] of one text: prompts in parts, then single tokens beside padding."""
    last = len(ids) - num_decoded
    found = [steps.step({0: ids[start : min(start + part, last)]})[0] for start in range(0, last, part)]
    found += [steps.step({0: [token]}, padding=2)[0] for token in ids[last:]]
    return torch.cat(found)


def divergence(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence of next-token distributions from the expected ones, and the share of equal
    most likely tokens; both [N, V] logits."""
    wanted = expected.double().log_softmax(-1)
    kl = (wanted.exp() * (wanted - found.double().log_softmax(-1))).sum(-1).mean()
    return float(kl), float((found.argmax(-1) == expected.argmax(-1)).double().mean())


def sure_misses(found: torch.Tensor, expected: torch.Tensor, margin: float) -> tuple[int, int]:
    """At how many positions the most likely token is another one although it leads by more than `margin` in the
    expected logits, and how many positions are as sure; both [N, V] logits."""
    best = expected.topk(2)
    is_sure = best.values[:, 0] - best.values[:, 1] > margin
    misses = is_sure & (found.argmax(-1) != best.indices[:, 0])
    return int(misses.sum()), int(is_sure.sum())

"""Conversations that the bundled checkpoint was trained for, with the answers that it must give, and its float32 self.

What the model writes in its own tasks has wide margins: over the answers of `tasks`, the most likely token is always
`MARGIN` above the next in float32, which is checked when they are made. FP8 moves logits of that size by a tenth, so
greedy answers are compared token by token, without any allowance. What users write is less certain, and its
log-probabilities show what greedy answers would forgive.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from demo.chat import a_conversation
from saddle.launch import demo_model_path
from saddle.model.m2 import MiniMaxM2
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import SamplingParams
from saddle.runner import logits as edit
from tests.support import plain_model
from tests.support.sampling_reference import scores

MARGIN = 5.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """ids, and for each whether the model wrote it."""

    ids: list[int]
    own: list[bool]


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, and what the model says to it, its end token included."""

    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer


def conversations(count: int, seed: int) -> list[Conversation]:
    """Conversations as in training, from a seed."""
    tokenizer, rng = Tokenizer.load(demo_model_path()), random.Random(seed)
    found = []
    for _ in range(count):
        ids: list[int] = []
        own: list[bool] = []
        for text, is_own in a_conversation(rng).segments:
            part = tokenizer.encode(text)
            ids += part
            own += [is_own] * len(part)
        found.append(Conversation(ids, own))
    return found


def last_turn(conversation: Conversation) -> Task:
    """The last turn that the model wrote, behind everything before it."""
    end = len(conversation.own)
    while not conversation.own[end - 1]:
        end -= 1
    begin = end
    while conversation.own[begin - 1]:
        begin -= 1
    return Task(conversation.ids[:begin], conversation.ids[begin:end])


@dataclass(slots=True)
class Truth:
    """The bundled checkpoint in plain torch and float32."""

    device: torch.device
    model: MiniMaxM2 = field(init=False)

    def __post_init__(self) -> None:
        self.model = plain_model.load(demo_model_path(), self.device)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """[T, V] float32."""
        return plain_model.logits(self.model, list(ids))

    def tasks(self, count: int, seed: int = 11, longest: int = 700) -> list[Task]:
        """Tasks that the model answers with wide margins; the first three prompts end before, at and behind the end
        of a block, if there are so many."""
        ends, others = dict.fromkeys((63, 0, 1)), []  # type: dict[int, Task | None], list[Task]
        for task in map(last_turn, conversations(500, seed)):
            if len(task.ids) > longest or len(task.answer) < 12 or not self.is_sure(task):
                continue
            offset = len(task.prompt) % 64
            if offset in ends and ends[offset] is None:
                ends[offset] = task
            elif len(others) < count:
                others.append(task)
            if len(others) == count and all(ends.values()):
                return [*filter(None, ends.values()), *others][:count]
        raise AssertionError(f"500 conversations have no {count} tasks of the lengths that were asked for.")

    def is_sure(self, task: Task) -> bool:
        """Whether the reference gives the answer, each token `MARGIN` above the next."""
        rows = self.logits(task.ids)[len(task.prompt) - 1 : -1]
        best = rows.topk(2)
        margins = best.values[:, 0] - best.values[:, 1]
        return best.indices[:, 0].tolist() == task.answer and float(margins.min()) > MARGIN

    def shortfalls(
        self, ids: Sequence[int], num_prompt: int, params: SamplingParams, seed: int = 0
    ) -> list[float]:
        """For each generated id, how much better another one would have been: 0 where the reference draws it.

        In units of the noisy score, logit over temperature; penalties are applied as `runner.logits` states.
        """
        rows, found = self.logits(ids), []
        for position in range(num_prompt, len(ids)):
            row = rows[position - 1].clone()
            if params.has_penalties:
                in_prompt = torch.zeros_like(row, dtype=torch.bool)
                in_prompt[torch.tensor(ids[:num_prompt], device=row.device)] = True
                output = torch.tensor(ids[num_prompt:position], dtype=torch.int64, device=row.device)
                edit.penalise(row, in_prompt, torch.bincount(output, minlength=len(row)).float(), params)
            wanted = scores(row, params, seed, position)
            found.append(float(wanted.max() - wanted[ids[position]]))
        return found

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Of each id behind the first."""
        rows = self.logits(ids).double().log_softmax(-1)
        return rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:], device=rows.device)].tolist()

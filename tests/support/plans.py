"""Plans by hand: a runner with a pool of scattered blocks, and nothing that decides anything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from saddle.protocol import DeviceInfo, RowAdmit, RowWork, SamplingParams, StepMask, StepPlan, StepResult
from saddle.runner.runner import Runner

GREEDY = SamplingParams(temperature=0.0)


def prompt_of(length: int, seed: int, vocab_size: int = 256) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]


@dataclass
class RowState:
    """What the host knows of a row."""

    row: int
    epoch: int
    ids: list[int]
    num_prompt: int
    computed: int
    blocks: list[int] = field(default_factory=list)


class Plans:
    """Builds plans for a runner and runs them.

    Args:
        order: seed of the order in which blocks are given out.
    """

    def __init__(self, runner: Runner, info: DeviceInfo, order: int = 0) -> None:
        self.runner, self.block_size, self.vocab_size = runner, info.block_size, info.vocab_size
        self.free = list(range(info.num_blocks))
        random.Random(order).shuffle(self.free)
        self.rows: dict[int, RowState] = {}
        self.epochs = [0] * info.max_num_seqs
        self.next_step = 0

    def admit(
        self,
        row: int,
        ids: Sequence[int],
        params: SamplingParams = GREEDY,
        seed: int = 0,
        num_prompt: int | None = None,
        cached: Sequence[int] = (),
    ) -> RowAdmit:
        """Give a row to a request whose first blocks are `cached`."""
        self.epochs[row] += 1
        computed = len(cached) * self.block_size
        count = len(ids) if num_prompt is None else num_prompt
        self.rows[row] = RowState(row, self.epochs[row], list(ids), count, computed, list(cached))
        return RowAdmit(row, self.epochs[row], list(ids), count, computed, list(cached), params, seed)

    def work(self, row: int, num_tokens: int, cached: Sequence[int] = ()) -> RowWork:
        """The next tokens of a row; ids that no result brought yet count as known."""
        state = self.rows[row]
        state.blocks += cached
        new = list(cached)
        num_cached = len(cached) * self.block_size
        state.computed += num_cached + num_tokens
        while len(state.blocks) * self.block_size < state.computed:
            state.blocks.append(self.free.pop())
            new.append(state.blocks[-1])
        samples = state.computed >= len(state.ids)
        return RowWork(row, state.epoch, num_tokens, num_cached, new, samples, state.computed)

    def plan(self, admits: Sequence[RowAdmit], work: Sequence[RowWork], masked: Sequence[int] = ()) -> StepPlan:
        self.next_step += 1
        return StepPlan(self.next_step, list(admits), list(work), list(masked))

    def run(self, plan: StepPlan, mask: StepMask | None = None) -> StepResult:
        """One step from end to end, its ids taken up."""
        self.runner.forward(plan)
        result = self.runner.sample(plan.step_id, mask).wait()
        self.take(result)
        return result

    def take(self, result: StepResult) -> None:
        for sample in result.samples:
            self.rows[sample.row].ids += sample.token_ids

    def step(self, *work: RowWork, admits: Sequence[RowAdmit] = ()) -> StepResult:
        """`run`, and no error."""
        result = self.run(self.plan(admits, work))
        assert result.error is None, result.error
        return result

    def start(self, row: int, ids: Sequence[int], params: SamplingParams = GREEDY, seed: int = 0) -> StepResult:
        """Admit a request and compute its prompt in one step."""
        admit = self.admit(row, ids, params, seed)
        return self.step(self.work(row, len(ids)), admits=[admit])

    def finish(self, rows: Sequence[int], num_output: int) -> None:
        """Decode rows until each has `num_output` ids; those that have them rest."""
        while left := [row for row in rows if len(self.rows[row].ids) - self.rows[row].num_prompt < num_output]:
            self.step(*(self.work(row, 1) for row in left))

    def output(self, row: int) -> list[int]:
        state = self.rows[row]
        return state.ids[state.num_prompt :]

    def release(self, *rows: int) -> None:
        """The rows ended: their blocks may be used again."""
        for row in rows:
            self.free += reversed(self.rows.pop(row).blocks)

    def generate(self, ids: Sequence[int], num_output: int, params: SamplingParams = GREEDY, seed: int = 0,
                 row: int = 0) -> list[int]:  # fmt: skip
        """A request alone, its prompt in one step."""
        self.start(row, ids, params, seed)
        self.finish([row], num_output)
        found = self.output(row)
        self.release(row)
        return found

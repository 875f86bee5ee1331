"""What a runner is put through: each function drives it by plans, ends with no row in use, and returns what came out.

They judge nothing. `test_runner.py` compares what they return with the float32 reference, once for a runner that is
right and once for each planted fault, which the same comparison must notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from saddle.protocol import SamplingParams, StepMask
from tests.support.demo_texts import Task
from tests.support.plans import GREEDY, Plans

Answers = dict[int, list[int]]  # by number of the task


def finish(plans: Plans, counts: Mapping[int, int]) -> None:
    """Decode until each row has so many ids, in another order of the rows at each step."""
    turn = 0
    while left := [row for row, count in counts.items() if len(plans.output(row)) < count]:
        turn += 1
        shift = turn % len(left)
        plans.step(*(plans.work(row, 1) for row in left[shift:] + left[:shift]))


def taken(plans: Plans, rows: Sequence[int]) -> Answers:
    """What the rows wrote; they end."""
    found = {row: plans.output(row) for row in rows}
    plans.release(*rows)
    return found


def alone(plans: Plans, tasks: Sequence[Task], params: SamplingParams = GREEDY) -> Answers:
    return {i: plans.generate(task.prompt, len(task.answer), params, row=i % 3) for i, task in enumerate(tasks)}


def together(plans: Plans, tasks: Sequence[Task], params: Sequence[SamplingParams] = (GREEDY,)) -> Answers:
    """All tasks in one batch, from which they drop out at different times."""
    for i, task in enumerate(tasks):
        plans.start(i, task.prompt, params[i % len(params)], seed=i)
    finish(plans, {i: len(task.answer) for i, task in enumerate(tasks)})
    return taken(plans, range(len(tasks)))


def late(plans: Plans, tasks: Sequence[Task], num_steps: int) -> Answers:
    """Steps are enqueued before the first is read, with every wait of the host an error; ids come afterwards."""
    rows = range(len(tasks))
    admits = [plans.admit(row, tasks[row].prompt) for row in rows]
    first = plans.plan(admits, [plans.work(row, len(tasks[row].prompt)) for row in rows])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    handles = []
    for step in range(num_steps):
        if step:
            for state in plans.rows.values():
                state.ids.append(0)  # there is one more, nobody knows which
        plan = first if step == 0 else plans.plan([], [plans.work(row, 1) for row in rows])
        plans.runner.forward(plan)
        handles.append(plans.runner.sample(plan.step_id, None))
    torch.cuda.set_sync_debug_mode("default")
    results = [handle.wait() for handle in handles]
    assert [result.error for result in results] == [None] * num_steps
    assert all(result.device_s > 0 for result in results)
    plans.release(*rows)
    return {row: [result.samples[row].token_ids[0] for result in results] for row in rows}


def beside_prompts(plans: Plans, tasks: Sequence[Task]) -> Answers:
    """Three rows decode while the prompts of the others come in odd chunks, two rows at a time."""
    for row in range(3):
        plans.start(row, tasks[row].prompt)
    for first in range(3, len(tasks), 2):
        coming = [row for row in (first, first + 1) if row < len(tasks)]
        admits = [plans.admit(row, tasks[row].prompt) for row in coming]
        chunk = 0
        while left := {row: len(tasks[row].prompt) - plans.rows[row].computed for row in coming
                       if plans.rows[row].computed < len(tasks[row].prompt)}:  # fmt: skip
            decoding = [row for row in range(3) if len(plans.output(row)) < len(tasks[row].answer)]
            chunk += 1
            work = [plans.work(row, min(rest, (17, 1, 64, 90)[(chunk + row) % 4])) for row, rest in left.items()]
            plans.step(*work, *(plans.work(row, 1) for row in decoding), admits=admits)
            admits = []
    finish(plans, {i: len(task.answer) for i, task in enumerate(tasks)})
    return taken(plans, range(len(tasks)))


def shared_prefix(plans: Plans, task: Task, foreign: Task | None = None) -> Answers:
    """Row 1 is admitted with all whole blocks of row 0's prompt; row 2 computes one block itself and then finds the
    others; `foreign`: a task whose blocks they are given instead, a planted fault."""
    size = plans.block_size
    owner = foreign or task
    whole = (min(len(task.prompt), len(owner.prompt)) - 1) // size
    assert whole >= 2
    plans.start(0, owner.prompt)
    blocks = plans.rows[0].blocks[:whole]
    admit = plans.admit(1, task.prompt, cached=blocks)
    plans.step(plans.work(1, len(task.prompt) - whole * size), admits=[admit])
    admit = plans.admit(2, task.prompt)
    plans.step(plans.work(2, size), plans.work(0, 1), admits=[admit])
    rest = len(task.prompt) - whole * size
    plans.step(plans.work(2, rest, cached=blocks[1:]), plans.work(1, 1))
    finish(plans, dict.fromkeys(range(3), len(task.answer)))
    found = {row: plans.output(row)[: len(task.answer)] for row in range(3)}
    for row in (1, 2):  # the blocks belong to row 0
        plans.rows[row].blocks = [block for block in plans.rows[row].blocks if block not in blocks]
    plans.release(0, 1, 2)
    return found


def resumed(plans: Plans, tasks: Sequence[Task]) -> Answers:
    """Rows are preempted at half their answers; others take their blocks; they come back in other rows."""
    half = {row: len(tasks[row].answer) // 2 for row in range(3)}
    for row in half:
        plans.start(row, tasks[row].prompt)
    finish(plans, half)
    written = taken(plans, range(3))
    others = together(plans, tasks[3:6])
    for row, ids in written.items():
        known = tasks[row].prompt + ids
        admit = plans.admit(row + 4, known, num_prompt=len(tasks[row].prompt))
        plans.step(plans.work(row + 4, len(known)), admits=[admit])
    finish(plans, {row + 4: len(tasks[row].answer) for row in range(3)})
    found = {row - 4: ids for row, ids in taken(plans, range(4, 7)).items()}
    return found | {3 + i: ids for i, ids in others.items()}


def free(plans: Plans, prompts: Sequence[list[int]], params: Sequence[SamplingParams], num_output: int) -> Answers:
    """Text of a given length behind each prompt."""
    for row, prompt in enumerate(prompts):
        plans.start(row, prompt, params[row], seed=1000 + row)
    finish(plans, dict.fromkeys(range(len(prompts)), num_output))
    return taken(plans, range(len(prompts)))


def only(token_ids: Sequence[int], vocab_size: int) -> bytes:
    """A mask that allows these ids."""
    return sum(1 << token_id for token_id in token_ids).to_bytes(4 * -(-vocab_size // 32), "little")


def forced(plans: Plans, texts: Sequence[list[int]], num_prompt: int, num_output: int) -> list[list[float]]:
    """Masks that allow one id lead each row through its text; log-probabilities of those ids, by row."""
    rows = range(len(texts))
    params = SamplingParams(temperature=0.7, logprobs=1)
    found: list[list[float]] = [[] for _ in rows]
    admits = [plans.admit(row, texts[row][:num_prompt], params) for row in rows]
    for step in range(num_output):
        work = [plans.work(row, 1 if step else num_prompt) for row in rows]
        plan = plans.plan([] if step else admits, work, masked=list(rows))
        bits = [only([texts[row][num_prompt + step]], plans.vocab_size) for row in rows]
        result = plans.run(plan, StepMask(plan.step_id, list(rows), bits))
        assert result.error is None, result.error
        for sample in result.samples:
            assert sample.logprobs is not None
            found[sample.row].append(sample.logprobs[0].logprob)
    for row in rows:
        wanted = texts[row][num_prompt : num_prompt + num_output]
        if plans.output(row) != wanted:  # a mask was not obeyed: nothing that was read means anything
            found[row] = [float("nan")] * num_output
    plans.release(*rows)
    return found


def prompt_logprobs(plans: Plans, ids: list[int], chunks: Sequence[int]) -> list[float]:
    """Log-probabilities of a prompt's ids behind the first, computed in chunks."""
    assert sum(chunks) == len(ids)
    admit = plans.admit(0, ids, SamplingParams(temperature=0.0, prompt_logprobs=2))
    entries = []
    for number, chunk in enumerate(chunks):
        result = plans.step(plans.work(0, chunk), admits=[] if number else [admit])
        entries += [entry for part in result.prompt_logprobs for entry in part.logprobs]
    plans.release(0)
    assert [entry.token_id for entry in entries] == ids[1:]
    return [entry.logprob for entry in entries]

"""A device without a model: it answers from a script, one step late, and checks that it is told only sound things.

Plans are queued and run when a result is collected, as late as any device may run them; so a host that changes a
plan after issuing it, or that relies on a result it cannot have yet, is found out.

In place of keys and values the fake stores at each position a digest of all tokens up to it, which is what real keys
and values are a function of. Before a row samples, its whole context is compared with what its own tokens demand: a
block that was given to two rows, evicted too early, found in the cache with other tokens in front, or left behind by
a failed step shows up as a `DeviceContractError`. Tests of the scheduler are tests of memory through this.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from saddle.errors import EngineError
from saddle.executor.base import DeviceInfo, ProgressFn
from saddle.protocol import (
    RowAdmit,
    RowPromptLogprobs,
    RowSample,
    RowWork,
    StepMask,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

# The ids that a row samples from now on; called at every admission, also after a preemption, when
# `admit.token_ids` ends with what was generated before.
Script = Callable[[RowAdmit], Iterator[int]]

UNWRITTEN = 0
GARBAGE = -1  # what a failed step leaves behind


class DeviceContractError(AssertionError):
    """The plans issued so far cannot be right."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise DeviceContractError(message)


def from_function(token_at: Callable[[Sequence[int], int], int]) -> Script:
    """A script from a function of the prompt and the index of a generated token."""

    def script(admit: RowAdmit) -> Iterator[int]:
        prompt = admit.token_ids[: admit.num_prompt]
        index = len(admit.token_ids) - admit.num_prompt
        while True:
            yield token_at(prompt, index)
            index += 1

    return script


@dataclass(slots=True)
class Row:
    """A row as a device keeps it. `digests[i]` stands for the keys and values of position i."""

    admit: RowAdmit
    answers: Iterator[int]
    token_ids: list[int]
    num_computed: int
    block_ids: list[int]
    digests: list[int] = field(default_factory=list)

    def digest_all(self) -> None:
        """A digest for every known token: of the token and of all before it."""
        for position in range(len(self.digests), len(self.token_ids)):
            before = self.digests[-1] if self.digests else 1
            self.digests.append(hash((before, self.token_ids[position])) & (2**62 - 1) | 1)


class FakeExecutor:
    """One device that answers from a script.

    Args:
        script: what rows sample.
        num_blocks, block_size, max_model_len, max_num_seqs, max_num_batched_tokens, vocab_size: what `start` reports.
        step_s: seconds that a step takes, or a function of its plan; steps run one after the other.
        fail_steps: ids of steps that fail; asked when a step runs, so that it may be changed until then.
        verify: check every plan and the content of every block read; the cost grows with the context.

    Attributes:
        num_tokens_computed: over all steps, cached ones not included.
        num_steps: steps that ran.
        num_rows_seen: rows admitted, again after preemptions.
    """

    def __init__(
        self,
        script: Script,
        *,
        num_blocks: int,
        block_size: int = 16,
        max_model_len: int = 4096,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        vocab_size: int = 256,
        step_s: float | Callable[[StepPlan], float] = 0.0,
        fail_steps: Collection[int] = (),
        verify: bool = True,
    ) -> None:
        self._script = script
        self._info = DeviceInfo(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            vocab_size=vocab_size,
            lines=[f"The device answers from a script, with {num_blocks} blocks of {block_size} tokens."],
        )
        self._step_s = step_s
        self._fail_steps = fail_steps
        self._verify = verify
        self._rows: dict[int, Row] = {}
        self._memory = [[UNWRITTEN] * block_size for _ in range(num_blocks)]
        self._forwards: deque[tuple[StepPlan, float]] = deque()  # with the time when the step is done
        self._masks: deque[StepMask | None] = deque()
        self._busy_until = 0.0
        self._last_step = -1  # issued
        self._suspect_until = -1  # steps up to this one were issued before a failure was known
        self._stopped = False
        self.num_tokens_computed = 0
        self.num_steps = 0
        self.num_rows_seen = 0

    # executor ----------------------------------------------------------------------------------------------------

    def start(self, on_progress: ProgressFn) -> DeviceInfo:
        on_progress("starting", 1.0, "fake device")
        return self._info

    def forward(self, plan: StepPlan) -> None:
        require(not self._stopped, "forward after stop")
        require(plan.step_id > self._last_step, f"step {plan.step_id} after step {self._last_step}")
        require(len(self._masks) == len(self._forwards), "forward before the previous step was sampled")
        self._last_step = plan.step_id
        step_s = self._step_s(plan) if callable(self._step_s) else self._step_s
        self._busy_until = max(self._busy_until, time.monotonic()) + step_s
        self._forwards.append((plan, self._busy_until))

    def sample(self, step_id: int, mask: StepMask | None) -> None:
        require(len(self._masks) == len(self._forwards) - 1, "sample without forward")
        plan = self._forwards[-1][0]
        require(plan.step_id == step_id, f"sample of step {step_id}, forward was step {plan.step_id}")
        require((mask is not None) == bool(plan.masked_rows), f"step {step_id}: a mask for each masked row, or none")
        if mask is not None:
            require(mask.step_id == step_id and set(mask.rows) <= set(plan.masked_rows), f"step {step_id}: other mask")
        self._masks.append(mask)

    def collect(self, timeout_s: float | None) -> StepResult | None:
        if not self._masks:
            raise EngineError("No step is in flight, so no result will come.")
        plan, done_s = self._forwards[0]
        wait_s = max(0.0, done_s - time.monotonic())
        if timeout_s is not None and wait_s > timeout_s:
            time.sleep(timeout_s)
            return None
        time.sleep(wait_s)
        self._forwards.popleft()
        mask = self._masks.popleft()
        return self._run(plan, mask)

    def stop(self) -> None:
        self._stopped = True

    # the device --------------------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan, mask: StepMask | None) -> StepResult:
        """Forward and sample of one step."""
        self.num_steps += 1
        self.num_tokens_computed += plan.num_tokens
        fails = plan.step_id in self._fail_steps
        if fails:
            self._suspect_until = self._last_step
        suspect = plan.step_id <= self._suspect_until
        for admit in plan.admits:
            self._admit(admit)
        prompt_logprobs = self._compute(plan, suspect)
        samples = [self._sample(work, mask, suspect) for work in plan.work if work.samples]
        device_s = self._step_s(plan) if callable(self._step_s) else self._step_s
        if fails:
            return StepResult(plan.step_id, [], [], f"step {plan.step_id} is scripted to fail", device_s)
        return StepResult(plan.step_id, samples, prompt_logprobs, None, device_s)

    def _admit(self, admit: RowAdmit) -> None:
        before = self._rows.get(admit.row)
        require(before is None or admit.epoch > before.admit.epoch, f"row {admit.row}: epoch {admit.epoch} again")
        size = self._info.block_size
        require(admit.num_computed == len(admit.block_ids) * size, f"row {admit.row}: cached blocks do not add up")
        require(admit.num_computed < len(admit.token_ids), f"row {admit.row}: nothing to compute")
        require(admit.num_computed == 0 or admit.params.prompt_logprobs is None, "prompt_logprobs row reads the cache")
        self.num_rows_seen += 1
        self._rows[admit.row] = Row(
            admit, self._script(admit), list(admit.token_ids), admit.num_computed, list(admit.block_ids)
        )

    def _compute(self, plan: StepPlan, suspect: bool) -> list[RowPromptLogprobs]:
        """All rows write, then all rows read: as every layer of a model does."""
        written: set[tuple[int, int]] = set()
        found = []
        for work in plan.work:
            row = self._rows[work.row]
            row.block_ids += work.new_block_ids
            start = row.num_computed + work.num_cached
            row.num_computed = start + work.num_tokens
            if self._verify:
                self._check_work(row, work)
                self._write(row, start, written, suspect)
            if row.admit.params.prompt_logprobs is not None and start < row.admit.num_prompt - 1:
                ids = row.token_ids[start + 1 : min(row.num_computed + 1, row.admit.num_prompt)]
                found.append(RowPromptLogprobs(work.row, work.epoch, start + 1, [answer(token) for token in ids]))
        if self._verify and not suspect:
            for work in plan.work:
                self._check_context(plan.step_id, self._rows[work.row])
        return found

    def _check_work(self, row: Row, work: RowWork) -> None:
        name = f"row {work.row} epoch {work.epoch}"
        require(row.admit.epoch == work.epoch, f"{name}: the row has epoch {row.admit.epoch}")
        require(work.num_tokens > 0, f"{name}: no tokens")
        require(row.num_computed <= len(row.token_ids), f"{name}: tokens past those that exist")
        require(work.samples == (row.num_computed == len(row.token_ids)), f"{name}: samples at the wrong place")
        require(work.context_bound >= row.num_computed, f"{name}: the context is longer than its bound")
        require(row.num_computed <= len(row.block_ids) * self._info.block_size, f"{name}: positions without a block")
        require(len(set(row.block_ids)) == len(row.block_ids), f"{name}: a block twice")
        require(work.num_cached == 0 or row.admit.params.prompt_logprobs is None, f"{name}: reads the cache")

    def _write(self, row: Row, start: int, written: set[tuple[int, int]], suspect: bool) -> None:
        row.digest_all()
        size = self._info.block_size
        for position in range(start, row.num_computed):
            index, offset = divmod(position, size)
            slot = row.block_ids[index], offset
            require(slot not in written, f"row {row.admit.row}: slot {slot} is written twice in one step")
            written.add(slot)
            self._memory[slot[0]][offset] = GARBAGE if suspect else row.digests[position]

    def _check_context(self, step_id: int, row: Row) -> None:
        size = self._info.block_size
        for index, block in enumerate(row.block_ids):
            first = index * size
            wanted = row.digests[first : min(first + size, row.num_computed)]
            require(
                self._memory[block][: len(wanted)] == wanted,
                f"step {step_id}, row {row.admit.row}: block {block} does not hold tokens {first} to "
                f"{first + len(wanted)} of the row",
            )

    def _sample(self, work: RowWork, mask: StepMask | None, suspect: bool) -> RowSample:
        row = self._rows[work.row]
        token = self._info.vocab_size - 1 if suspect else next(row.answers)
        if mask is not None and work.row in mask.rows:
            token = first_allowed(mask.bits[mask.rows.index(work.row)], token, self._info.vocab_size)
        row.token_ids.append(token)
        logprobs = None if row.admit.params.logprobs is None else [answer(token)]
        return RowSample(work.row, work.epoch, [token], logprobs)


def answer(token_id: int) -> TokenLogprobs:
    """The log-probabilities of a device that is sure of its script."""
    return TokenLogprobs(token_id, 0.0, 1, [(token_id, 0.0)])


def first_allowed(bits: bytes, wanted: int, vocab_size: int) -> int:
    """`wanted` if the mask allows it, else the smallest id that it allows."""
    require(len(bits) == 4 * -(-vocab_size // 32), f"a mask of {len(bits)} bytes for {vocab_size} ids")
    allowed = int.from_bytes(bits, "little") & ((1 << vocab_size) - 1)
    require(allowed != 0, "a mask that allows nothing")
    if allowed >> wanted & 1:
        return wanted
    return (allowed & -allowed).bit_length() - 1

"""The path of GPUs around a scripted model: inputs, graphs, sampling and late reading, in Triton's interpreter.

The model is a function of token and position; a "graph" runs what it was captured of. So every id that comes out is
known in advance, whatever way it took.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import saddle
from saddle.config import CacheConfig, CompileConfig, EngineConfig, LoadConfig, SchedulerConfig
from saddle.kernels import ahead, launching
from saddle.kernels.target import of_arch
from saddle.model.config import ModelConfig
from saddle.model.inputs import DeviceInputs
from saddle.plan.memory import plan_device
from saddle.protocol import DeviceInfo, DeviceMemory, SamplingParams, StepMask, StepPlan, TokenLogprobs
from saddle.runner import fused_path
from saddle.runner.graphs import DecodeGraphs, PieceGraphs
from saddle.runner.runner import Runner
from tests.support.interpreted import in_interpreter, outside, run_file
from tests.support.plans import GREEDY, Plans, prompt_of

FOLDER = Path(saddle.__file__).parent / "demo_model"
VOCAB, NUM_ROWS = 1024, 5
CONFIG = EngineConfig(
    load=LoadConfig(model=str(FOLDER)),
    cache=CacheConfig(kv_cache_memory_bytes=64 << 20),
    scheduler=SchedulerConfig(max_model_len=320, max_num_seqs=NUM_ROWS, max_num_batched_tokens=64),
)
TABLE = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))


def logits_of(token_id: int, position: int) -> torch.Tensor:
    """[VOCAB]: what the model says after a token at a position."""
    return TABLE.roll(37 * token_id + 11 * position)


def continued(prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy tokens behind a prompt."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(logits_of(ids[-1], len(ids) - 1).argmax()))
    return ids[len(prompt) :]


class Model:
    """In place of `FusedMiniMaxM2`; notes where each token was written, and reads nothing that is padding."""

    def __init__(self, config: ModelConfig, weights: Any, **sizes: Any) -> None:
        self._logits = torch.full((sizes["max_rows"], VOCAB), torch.nan)
        self.num_forwards = 0
        self.num_pieces = 3
        self.slots: dict[int, tuple[int, int]] = {}

    @staticmethod
    def workspace_bytes_for(*sizes: Any) -> int:
        return 1 << 20

    def paths(self) -> list[str]:
        return ["steps: scripted"]

    def failure(self) -> None:
        return None

    def allocate_kv(self, num_blocks: int, block_size: int, kind: str) -> str:
        return kind

    def piece(self, number: int, inputs: DeviceInputs, kv: str) -> None:
        self.tokens = inputs.token_ids, inputs.positions, inputs.slots

    def hidden(
        self, inputs: DeviceInputs, kv: str, piece: Callable[[int], object] | None = None
    ) -> torch.Tensor:  # fmt: skip
        self.num_forwards += 1
        if piece is not None:
            for number in range(self.num_pieces):
                piece(number)  # what was captured reads the memory that the step's inputs are in
                for own, given in zip(self.tokens, (inputs.token_ids, inputs.positions, inputs.slots), strict=True):
                    assert own.data_ptr() == given.data_ptr() and own.shape == given.shape
        if ahead.only_compiles():  # its inputs were not made
            return torch.zeros(len(inputs.logit_index), 2)
        tokens, positions = inputs.token_ids.tolist(), inputs.positions.tolist()
        for token, position, slot in zip(tokens, positions, inputs.slots.tolist(), strict=True):
            assert (position < 0) == (slot < 0)
            if position >= 0:
                self.slots[slot] = token, position
        for index, row in enumerate(inputs.row_ids.tolist()):
            if any(tokens):  # a prompt of zeros is a warm-up's: the context that it claims was never written
                self._check_context(inputs, index, row)
        chosen = inputs.logit_index.tolist()
        return torch.tensor([[tokens[index], positions[index]] for index in chosen], dtype=torch.float32)

    def _check_context(self, inputs: DeviceInputs, index: int, row: int) -> None:
        """All positions of a row's context were written where its table says."""
        length = int(inputs.context_lens[index])
        assert (row < 0) == (length == 0)
        for position in range(length):
            block = int(inputs.block_tables[row, position // 64])
            assert self.slots[block * 64 + position % 64][1] == position

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self._logits[: len(hidden)]
        for place, (token, position) in enumerate(hidden.int().tolist()):
            out[place] = logits_of(token, position) if position >= 0 else torch.nan
        return out

    def forward(self, inputs: DeviceInputs, kv: str) -> torch.Tensor:
        return self.logits(self.hidden(inputs, kv))


class Event:
    """In place of `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None:
        assert not ahead.only_compiles(), "what was never drawn is waited for"

    def elapsed_time(self, other: Event) -> float:
        return 2.0


class Graph:
    def __init__(self, launch: Callable[[], object]) -> None:
        self.replay = launch


def capture(
    graphs: DecodeGraphs, forward: Callable[[int], object], sample: Callable[[int], object],
    on_size: Callable[[int, int], None],
) -> None:  # fmt: skip
    for size in reversed(graphs.sizes):
        forward(size)
        sample(size)
        graphs._forward[size] = cast(Any, Graph(functools.partial(forward, size)))
        graphs._sample[size] = cast(Any, Graph(functools.partial(sample, size)))


def capture_pieces(
    graphs: PieceGraphs, launch: Callable[[int, int], object], pool: Any, on_size: Callable[[int, int], None]
) -> None:  # fmt: skip
    for size in reversed(graphs.sizes):
        graphs._pieces[size] = [cast(Any, Graph(functools.partial(launch, size, number)))
                                for number in range(graphs.num_pieces)]  # fmt: skip


@outside
def test_in_the_interpreter() -> None:
    run_file(__file__)


def started(config: EngineConfig) -> tuple[Runner, DeviceInfo]:
    """A runner with the fused path on the CPU."""
    shape = ModelConfig.load(FOLDER, {})
    path = fused_path.FusedPath(config, FOLDER, shape, of_arch("sm_90"), torch.device("cpu"), None,
                                lambda phase, share, note: None)  # fmt: skip
    memory = DeviceMemory(
        kind="cuda", total_bytes=80 << 30, free_bytes=70 << 30, weight_bytes=path.weight_bytes,
        step_bytes=path.step_bytes, bytes_per_token=path.bytes_per_token, vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
    )  # fmt: skip
    info = plan_device(config, memory)
    runner = Runner(config, FOLDER)
    runner.path, runner._device = path, torch.device("cpu")
    runner.allocate(info, lambda phase, share, note: None)
    return runner, info


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_path, "FusedMiniMaxM2", Model)
        patch.setattr(DecodeGraphs, "capture", capture)
        patch.setattr(PieceGraphs, "capture", capture_pieces)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        yield


@pytest.fixture(scope="module")
def loaded(patched: None) -> tuple[Runner, DeviceInfo]:
    return started(CONFIG)


@pytest.fixture
def plans(loaded: tuple[Runner, DeviceInfo]) -> Plans:
    return Plans(*loaded)


@in_interpreter
def test_rows_that_come_and_go(plans: Plans) -> None:
    """Batches of one to four rows: sizes with and without a graph of their own, over the ends of blocks."""
    prompts = {0: prompt_of(62, 1, VOCAB), 1: prompt_of(1, 2, VOCAB), 3: prompt_of(20, 3, VOCAB)}
    for row, ids in prompts.items():
        plans.start(row, ids)
        plans.finish([row], 2)
    plans.finish([*prompts], 5)
    for row, ids in prompts.items():
        assert plans.output(row) == continued(ids, 5)
    plans.release(1)
    again = prompt_of(9, 4, VOCAB)
    admit = plans.admit(1, again)
    plans.step(plans.work(0, 1), plans.work(1, 9), plans.work(3, 1), admits=[admit])
    plans.finish([0, 3], 9)
    assert plans.output(0) == continued(prompts[0], 9) and plans.output(1) == continued(again, 1)
    plans.release(0, 1, 3)


@in_interpreter
def test_graphs_serve_decode_steps_that_are_plain(plans: Plans) -> None:
    path: Any = plans.runner.path
    assert path._graphs.sizes == (1, 2, 4, 5)
    replayed: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "sample"):
            own = getattr(path._graphs, name)
            patch.setattr(path._graphs.__class__, name,
                          lambda graphs, size, own=own, name=name: (replayed.append((name, size)), own(size)))
        for row in range(3):
            plans.start(row, prompt_of(5, row, VOCAB), replace_params(row))
        assert replayed == []
        plans.step(*(plans.work(row, 1) for row in range(2)))
        assert replayed == [("forward", 2), ("sample", 2)] and path.num_graphs == 2
        plans.step(*(plans.work(row, 1) for row in range(3)))  # row 2 wants log-probabilities
        assert replayed[2:] == [("forward", 4)] and path.num_graphs == 1
    plans.release(0, 1, 2)


@in_interpreter
def test_pieces_of_steps_with_prompts_are_graphs_up_to_a_size(plans: Plans) -> None:
    """By the number of tokens, and never where no row has more than one; the ids are those of the prompts."""
    path: Any = plans.runner.path
    assert path._pieces.sizes == (16, 32, 64)
    replayed: list[tuple[int, int]] = []
    prompts = {0: prompt_of(20, 1, VOCAB), 1: prompt_of(16, 2, VOCAB), 2: prompt_of(15, 3, VOCAB)}
    with pytest.MonkeyPatch.context() as patch:
        own = path._pieces.replay
        patch.setattr(path._pieces, "replay", lambda size, number: (replayed.append((size, number)), own(size, number)))
        plans.start(0, prompts[0])
        assert replayed == [(32, 0), (32, 1), (32, 2)] and path.piece_size == 32 and path.num_graphs == 3
        plans.start(1, prompts[1])
        assert replayed[3:] == [(16, 0), (16, 1), (16, 2)]
        admit = plans.admit(2, prompts[2])
        plans.step(plans.work(0, 1), plans.work(1, 1), plans.work(2, 15), admits=[admit])
        assert replayed[6:] == [(32, 0), (32, 1), (32, 2)]
        plans.finish([*prompts], 3)
        assert len(replayed) == 9 and path.piece_size == 0
    for row, ids in prompts.items():
        assert plans.output(row) == continued(ids, 3)
    plans.release(0, 1, 2)


def replace_params(row: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, logprobs=1) if row == 2 else GREEDY


@in_interpreter
def test_steps_are_enqueued_before_any_is_read(plans: Plans) -> None:
    prompt = prompt_of(30, 5, VOCAB)
    admit = plans.admit(0, prompt)
    handles = []
    for step in range(6):
        if step:
            plans.rows[0].ids.append(0)  # there is one more, nobody knows which
        plan = plans.plan([] if step else [admit], [plans.work(0, 1 if step else 30)])
        plans.runner.forward(plan)
        handles.append(plans.runner.sample(plan.step_id, None))
    results = [handle.wait() for handle in handles]
    assert [result.samples[0].token_ids[0] for result in results] == continued(prompt, 6)
    assert {result.device_s for result in results} == {0.002}
    plans.release(0)


@in_interpreter
def test_masks_logprobs_bias_and_penalties(plans: Plans) -> None:
    prompt = prompt_of(12, 6, VOCAB)
    best = continued(prompt, 1)
    params = [SamplingParams(temperature=0.0, logprobs=2), SamplingParams(temperature=0.0, logit_bias={5: 99.0}),
              SamplingParams(temperature=0.0, presence_penalty=2.0, repetition_penalty=1.5), GREEDY]  # fmt: skip
    admits = [plans.admit(row, prompt, one) for row, one in enumerate(params)]
    plan = plans.plan(admits, [plans.work(row, 12) for row in range(4)], masked=[3])
    result = plans.run(plan, StepMask(plan.step_id, [3], [(1 << 77).to_bytes(VOCAB // 8, "little")]))
    assert [sample.token_ids for sample in result.samples] == [best, [5], best, [77]]
    assert result.samples[3].logprobs is None and result.samples[0].logprobs is not None
    wanted = logits_of(prompt[-1], 11).log_softmax(-1)
    [entry] = result.samples[0].logprobs
    assert (entry.token_id, entry.rank, len(entry.top)) == (best[0], 1, 2)
    assert [value for _, value in entry.top] == pytest.approx(wanted.topk(2).values.tolist(), abs=1e-5)
    plans.finish([3], 3)
    assert plans.output(3)[1:] == continued([*prompt, 77], 2)
    plans.release(0, 1, 2, 3)


@in_interpreter
def test_logprobs_of_edited_rows_are_those_of_the_model(plans: Plans) -> None:
    """Edited rows come first and last, and ask for more of the best ids, or for all of a thousand."""
    prompts = [prompt_of(12, 20 + row, VOCAB) for row in range(4)]
    params = [SamplingParams(temperature=0.0, logit_bias={5: 99.0}, logprobs=4), SamplingParams(logprobs=0),
              SamplingParams(temperature=0.0, logprobs=1), SamplingParams(temperature=0.0, logprobs=1000)]  # fmt: skip
    for count in (3, 4):  # by kernels, and by torch
        admits = [plans.admit(row, prompts[row], params[row]) for row in range(count)]
        plan = plans.plan(admits, [plans.work(row, 12) for row in range(count)], masked=[2])
        result = plans.run(plan, StepMask(plan.step_id, [2], [(1 << 77).to_bytes(VOCAB // 8, "little")]))
        for row, sample in enumerate(result.samples):
            raw = logits_of(prompts[row][-1], 11)
            wanted, [entry] = raw.log_softmax(-1), sample.logprobs or []
            token_id = sample.token_ids[0]
            assert entry.token_id == token_id and token_id == {0: 5, 2: 77}.get(row, token_id)
            assert entry.logprob == pytest.approx(float(wanted[token_id]), abs=1e-5)
            assert entry.rank == int((raw >= raw[token_id]).sum())
            best = raw.topk(params[row].logprobs or 0).indices.tolist()
            assert [top_id for top_id, _ in entry.top] == best
        plans.release(*range(count))


@in_interpreter
@pytest.mark.parametrize("chunks", [[20], [7, 12, 1]])
def test_prompt_logprobs_where_more_logits_than_rows_are_needed(plans: Plans, chunks: list[int]) -> None:
    prompt = prompt_of(20, 7, VOCAB)
    other = prompt_of(6, 8, VOCAB)
    plans.start(1, other)
    admit = plans.admit(0, prompt, SamplingParams(temperature=0.0, prompt_logprobs=1))
    entries: list[TokenLogprobs] = []
    for number, chunk in enumerate(chunks):
        result = plans.step(plans.work(0, chunk), plans.work(1, 1), admits=[admit] if number == 0 else [])
        for part in result.prompt_logprobs:
            assert part.start == len(entries) + 1
            entries += part.logprobs
    assert [entry.token_id for entry in entries] == prompt[1:]
    wanted = [float(logits_of(prompt[i], i).log_softmax(-1)[prompt[i + 1]]) for i in range(19)]
    assert [entry.logprob for entry in entries] == pytest.approx(wanted, abs=1e-5)
    assert plans.output(0) == continued(prompt, 1)
    assert plans.output(1) == continued(other, 1 + len(chunks))
    plans.release(0, 1)


@in_interpreter
def test_an_empty_plan(plans: Plans) -> None:
    result = plans.run(StepPlan(99_000, [], [], []))
    assert (result.samples, result.error) == ([], None)


@in_interpreter
def test_what_is_compiled_ahead_leaves_rows_as_they_were(patched: None) -> None:
    """All kinds of steps are enqueued once with no launch at all, and nothing is read; then they run."""
    config = replace(CONFIG, scheduler=replace(CONFIG.scheduler, max_num_batched_tokens=320))

    @contextmanager
    def dropping_launches() -> Iterator[bool]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ahead, "_asked", {})
            patch.setattr(launching, "_count", lambda kernel: 0)  # interpreted kernels do not say
            patch.setattr(ahead, "ask", lambda key, compiling, device: dropped.append(key))
            yield True

    dropped: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "side_by_side", dropping_launches)
        plans = Plans(*started(config))
    assert len(dropped) > 20
    assert set(plans.runner.path.rows.epochs) == {-1}  # type: ignore[attr-defined]
    prompts = {0: prompt_of(63, 1, VOCAB), 2: prompt_of(4, 2, VOCAB)}
    for row, ids in prompts.items():
        plans.start(row, ids)
    plans.finish([*prompts], 4)
    for row, ids in prompts.items():
        assert plans.output(row) == continued(ids, 4)


@in_interpreter
def test_without_graphs(patched: None) -> None:
    plans = Plans(*started(replace(CONFIG, compile=CompileConfig(enforce_eager=True))))
    path: Any = plans.runner.path
    assert path._graphs.sizes == () == path._pieces.sizes
    prompts = {0: prompt_of(63, 1, VOCAB), 2: prompt_of(4, 2, VOCAB)}
    for row, ids in prompts.items():
        plans.start(row, ids)
    plans.finish([*prompts], 4)
    assert path.num_graphs == 0
    for row, ids in prompts.items():
        assert plans.output(row) == continued(ids, 4)

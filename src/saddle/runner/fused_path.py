"""Steps on a GPU through the fused kernels: everything is enqueued, nothing waits.

A decode step is an upload of a few numbers, a graph of the forward pass and a graph of plain sampling; the ids go to
pinned memory behind an event, and are read when the engine asks for them. Rows that ask for more than plain sampling
make that second half a handful of launches. Steps with prompts are launched kernel by kernel, or, up to some hundred
tokens, as a graph between any two layers' attention.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from saddle import env
from saddle.config import EngineConfig
from saddle.errors import EngineError
from saddle.kernels import ahead, tuning
from saddle.kernels.target import Target
from saddle.model import packed
from saddle.model.config import GenerationConfig, ModelConfig
from saddle.model.fused import FusedMiniMaxM2
from saddle.model.kv_memory import KVMemory, kind_of
from saddle.parallel.layout import ParallelLayout
from saddle.protocol import (
    DeviceInfo,
    ProgressFn,
    RowAdmit,
    RowPromptLogprobs,
    RowWork,
    SamplingParams,
    StepMask,
)
from saddle.runner import gpu_memory
from saddle.runner.compile_watch import CompileWatch
from saddle.runner.device_batch import DeviceBatch, DeviceBatcher
from saddle.runner.device_rows import DeviceRows
from saddle.runner.device_sampler import DeviceSampler, Drawn, to_samples
from saddle.runner.graphs import DecodeGraphs, PieceGraphs
from saddle.runner.sampler import to_logprobs
from saddle.runner.steps import Outcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Launched:
    """A step between its two launches: logits [S, vocab], or hidden states where there are more than fit."""

    batch: DeviceBatch
    logits: torch.Tensor | None
    hidden: torch.Tensor | None
    began: torch.cuda.Event


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of a row's prompt, on their way to the host: as `sampler.score` gives them."""

    item: RowWork
    first: int
    num_top: int
    scores: torch.Tensor


class FusedPath:
    """See `steps.StepPath`.

    Args:
        num_valid_tokens: ids that the tokenizer knows; the rest of the embedding is padding. None: all are valid.

    Raises:
        StartupError: with what would work.
    """

    waits = False

    def __init__(
        self, config: EngineConfig, folder: Path, shape: ModelConfig, target: Target, device: torch.device,
        num_valid_tokens: int | None, on_progress: ProgressFn,
    ) -> None:  # fmt: skip
        layout = ParallelLayout()
        kinds = packed.formats(shape, layout, target.is_fnuz)
        target, tiles_line = _tiles(shape, kinds, target, device)
        self._config, self._shape, self._target, self._device = config, shape, target, device
        self._num_valid = min(num_valid_tokens or shape.vocab_size, shape.vocab_size)
        self._eos_ids = GenerationConfig.load(folder).eos_ids
        self._kind = kind_of(config.cache.kv_cache_dtype, target)
        self._weights = packed.allocate(shape, layout, device, fnuz=target.is_fnuz)
        self.uniform_routing = config.load.load_format == "dummy"
        if self.uniform_routing:
            packed.dummy(self._weights, config.load.seed)
            line = f"weights: random (--load-format dummy, seed {config.load.seed})"
        else:
            line = packed.load(folder, shape, layout, self._weights,
                               lambda share, note: on_progress("loading weights", share, note))  # fmt: skip
        self.weight_bytes = max(self._weights.num_bytes, gpu_memory.held_by_torch(device))
        self.bytes_per_token = KVMemory.bytes_per_token(shape, self._kind)
        sizes = config.sizes("cuda")
        most_rows, most_tokens = sizes.max_num_seqs, sizes.max_num_batched_tokens
        self.step_bytes = self._count_step_bytes(most_rows, most_tokens, sizes.block_size)
        self.lines = [line, *target.decisions(), tiles_line, *kinds.lines,
                      *map(str, config.compile.decisions(most_rows, most_tokens))]  # fmt: skip
        self.compile_watch = CompileWatch()
        self.num_graphs = 0  # that the last step replayed
        self.piece_size = 0  # tokens of the last step's pieces, padding included; 0: it had no such graphs
        self.rows: DeviceRows
        self.model: FusedMiniMaxM2
        self.kv: KVMemory
        self.kv_blocks: int
        self._batcher: DeviceBatcher
        self._sampler: DeviceSampler
        self._graphs: DecodeGraphs
        self._pieces: PieceGraphs
        self._logits: dict[int, torch.Tensor] = {}  # of decode steps, by size

    def _count_step_bytes(self, max_rows: int, max_tokens: int, block_size: int) -> int:
        """What a step needs beside weights and KV memory, from the largest context that may be asked for."""
        shape, config = self._shape, self._config
        longest = min(config.scheduler.max_model_len or shape.max_position_embeddings, shape.max_position_embeddings)
        beside = gpu_memory.beside(
            outside_bytes=gpu_memory.outside_of_torch(self._device), num_layers=shape.num_layers,
            hidden_size=shape.hidden_size, vocab_size=shape.vocab_size, max_tokens=max_tokens,
            num_graphs=len(config.compile.capture_sizes(max_rows)),
            num_piece_sizes=len(config.compile.piece_sizes(max_tokens)),
        )  # fmt: skip
        return (
            FusedMiniMaxM2.workspace_bytes_for(shape, max_tokens, max_rows, self._target)
            + 2 * longest * (shape.rotary_dim // 2) * 4
            + DeviceRows.num_bytes(max_rows, longest, block_size)
            + DeviceSampler.num_bytes(max_rows, shape.vocab_size)
            + beside.num_bytes
        )

    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None:
        longest = info.max_model_len
        self.model = FusedMiniMaxM2(
            self._shape, self._weights, max_positions=longest, max_tokens=info.max_num_batched_tokens,
            max_rows=info.max_num_seqs, target=self._target, uniform_routing=self.uniform_routing,
            cache_dir=env.cache_dir(),
        )  # fmt: skip
        self.kv = self.model.allocate_kv(info.num_blocks, info.block_size, self._kind)
        for line in self.model.paths():
            logger.info("%s", line)
        if self.uniform_routing:
            logger.info("Experts are a hash of layer, position and token: random weights would route unevenly.")
        self.rows = DeviceRows(info.max_num_seqs, longest, info.block_size, info.vocab_size, self._device)
        self._pieces = PieceGraphs(self._config.compile.piece_sizes(info.max_num_batched_tokens), self.model.num_pieces)
        self._batcher = DeviceBatcher(self.rows, longest, max(self._pieces.sizes, default=0))
        self._sampler = DeviceSampler(self.rows, self._num_valid, self._eos_ids)
        self.kv_blocks = info.num_blocks
        self._max_tokens, self._longest = info.max_num_batched_tokens, longest
        self._graphs = DecodeGraphs(self._config.compile.capture_sizes(info.max_num_seqs))

    # warming up --------------------------------------------------------------------------------------------------

    def warm_up(self, num_tokens: int, on_progress: ProgressFn) -> None:
        """Compile what every kind of step needs, then capture the graphs.

        Prompts of each size class; everything that sampling offers; a decoding row beside a prompt; decode steps. All
        of it is enqueued twice, the first time for its kernels alone, which are compiled side by side.
        """
        on_progress("warming up", 0.0, "compiling")
        with ahead.side_by_side() as can:
            if can:
                self._run_kinds(num_tokens, lambda phase, share, note: None)
                for size in self._graphs.sizes:
                    self._decode(size)
                    self._sample_plain(size)
                for size in self._pieces.sizes:
                    for number in range(self.model.num_pieces):
                        self._piece(size, number)
        self._run_kinds(num_tokens, on_progress)
        self._graphs.capture(
            self._decode,
            self._sample_plain,
            lambda done, count: on_progress("warming up", 0.5 + done / (4 * count), f"graph {done + 1} of {count}"),
        )
        self._pieces.capture(
            self._piece,
            self._graphs.pool,
            lambda done, count: on_progress("warming up", 0.75 + done / (4 * count), f"pieces {done + 1} of {count}"),
        )
        torch.cuda.synchronize()
        self.compile_watch.start()

    def _run_kinds(self, num_tokens: int, on_progress: ProgressFn) -> None:
        """Every kind of step, eagerly."""
        lengths = [1 << power for power in range(num_tokens.bit_length()) if 1 << power < num_tokens] + [num_tokens]
        params = SamplingParams(top_k=40, top_p=0.95, logprobs=1, presence_penalty=0.1, logit_bias={0: 0.0})
        for number, length in enumerate(lengths):
            on_progress("warming up", number / (2 * len(lengths)), f"a prompt of {length} tokens")
            self._run_prompt(length, params if number == 0 else SamplingParams())
        self._run_rows(num_tokens)
        self._run_late()
        self._run_mixed(min(num_tokens, 8))
        self._batcher.pad()
        for size in eager_sizes(max(self._graphs.sizes, default=0), len(self.rows.epochs)):
            self._decode(size)
            self._sample_plain(size)

    def _piece(self, size: int, number: int) -> None:
        self.model.piece(number, self._batcher.piece_inputs(size), self.kv)

    def _run(self, work: list[RowWork], mask: StepMask | None = None) -> None:
        """A step to its end."""
        read = self.sample(self.forward(work), mask)
        if not ahead.only_compiles():  # else nothing was drawn
            read()

    def _run_prompt(self, length: int, params: SamplingParams) -> None:
        """A prompt and a decoding step, in the row and the blocks of whoever comes first."""
        blocks = list(range(-(-(length + 1) // self.rows.block_size)))
        self.admit(RowAdmit(0, 0, [0] * length, length, 0, blocks, params, 0))
        everything = b"\xff" * (4 * -(-self._shape.vocab_size // 32))
        mask = StepMask(-1, [0], [everything]) if params.logprobs is not None else None
        for count in (length, 1):
            self._run([RowWork(0, 0, count, 0, [], True, length + 1)], mask)
        self.rows.epochs[0] = -1

    def _run_rows(self, longest: int) -> None:
        """Steps of more tokens than one prompt has: several prompts, in one block that they all overwrite."""
        sizes = [1 << power for power in range(longest.bit_length(), self._max_tokens.bit_length())]
        for size in [*sizes, self._max_tokens]:
            num_rows = -(-size // longest)
            if longest < size <= self._max_tokens and num_rows <= len(self.rows.epochs):
                self._run_prompts([size // num_rows] * num_rows)

    def _run_prompts(self, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            blocks = [0] * -(-length // self.rows.block_size)
            self.admit(RowAdmit(row, 0, [0] * length, length, 0, blocks, SamplingParams(), 0))
        self._run([RowWork(row, 0, length, 0, [], True, length) for row, length in enumerate(lengths)])
        self.rows.epochs[: len(lengths)] = [-1] * len(lengths)

    def _run_late(self) -> None:
        """A few new tokens behind the longest context, whose keys are attended in parts."""
        block_size = self.rows.block_size
        computed = (self._longest - 1) // block_size * block_size - block_size
        if computed <= 0:
            return
        length = computed + block_size
        blocks = [0] * (length // block_size)
        self.admit(RowAdmit(0, 0, [0] * length, length, computed, blocks, SamplingParams(), 0))
        self._run([RowWork(0, 0, block_size, 0, [], True, length)])
        self.rows.epochs[0] = -1

    def _run_mixed(self, length: int) -> None:
        """A row that decodes beside a prompt."""
        if len(self.rows.epochs) < 2 or length < 2 or self.kv_blocks < 2:
            return
        for row in range(2):
            self.admit(RowAdmit(row, 0, [0] * length, length, 0, [row], SamplingParams(), 0))
        self._run([RowWork(0, 0, length, 0, [], True, length)])
        self._run([RowWork(0, 0, 1, 0, [], True, length + 1), RowWork(1, 0, length, 0, [], True, length)])
        self.rows.epochs[:2] = [-1, -1]

    # steps -------------------------------------------------------------------------------------------------------

    def admit(self, admit: RowAdmit) -> None:
        self.rows.admit(admit)
        self._sampler.admit(admit)

    def forward(self, work: list[RowWork]) -> Launched:
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        self.num_graphs, self.piece_size = 0, 0
        if not self._batcher.is_decode(work):
            batch, hidden = self._forward_mixed(work)
            logits = None if batch.scored else self.model.logits(hidden)
            return Launched(batch, logits, hidden, began)
        size = self._graphs.size_for(len(work))
        batch = self._batcher.decode(work, size)
        if size:
            self.num_graphs += 1
            self._graphs.forward(size)
        else:
            self._decode(len(work))
        return Launched(batch, self._logits[len(batch.inputs.row_ids)], None, began)

    def _forward_mixed(self, work: list[RowWork]) -> tuple[DeviceBatch, torch.Tensor]:
        """A step that may hold prompts, and the hidden states of its tokens that need logits."""
        size = 0
        if any(item.num_tokens > 1 for item in work):
            size = self._pieces.size_for(sum(item.num_tokens for item in work))
        batch = self._batcher.mixed(work, size)
        if not size:
            return batch, self.model.hidden(batch.inputs, self.kv)
        self.num_graphs, self.piece_size = self.model.num_pieces, size
        return batch, self.model.hidden(batch.inputs, self.kv, functools.partial(self._pieces.replay, size))

    def _decode(self, size: int) -> None:
        self._batcher.launch_decode(size)
        # A view of the work space: the same memory in every step of this size.
        self._logits[size] = self.model.forward(self._batcher.decode_inputs(size), self.kv)

    def _sample_plain(self, size: int) -> None:
        inputs = self._batcher.decode_inputs(size)
        self._sampler.launch(self._logits[size], inputs.row_ids, inputs.context_lens)

    def sample(self, launched: Launched, mask: StepMask | None) -> Callable[[], Outcome]:
        batch, logits = launched.batch, launched.logits
        scored = self._score_prompts(launched) if batch.scored else []
        drawn: Drawn | None = None
        if batch.sampling:
            if logits is None:
                assert launched.hidden is not None
                logits = self.model.logits(launched.hidden[: len(batch.sampling)])
            drawn = self._draw(batch, logits, mask)
        ids = _to_host(drawn.ids) if drawn is not None else None
        numbers = _to_host(drawn.scores) if drawn is not None and drawn.scores is not None else None
        prompts = [Scored(one.item, one.first, one.num_top, _to_host(one.scores)) for one in scored]
        done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        done.record()

        def finish() -> Outcome:
            try:
                done.synchronize()
            except RuntimeError as error:
                raise EngineError(f"The GPU failed: {self.model.failure() or error}") from error
            samples = []
            if drawn is not None and ids is not None:
                samples = to_samples(drawn, ids.tolist(), [] if numbers is None else numbers.flatten().tolist())
            found = [
                RowPromptLogprobs(one.item.row, one.item.epoch, one.first + 1,
                                  to_logprobs(one.scores.flatten().tolist(), one.scores.shape[1],
                                              [one.num_top] * len(one.scores)))
                for one in prompts
            ]  # fmt: skip
            return Outcome(samples, found, launched.began.elapsed_time(done) / 1000)

        return finish

    def _draw(self, batch: DeviceBatch, logits: torch.Tensor, mask: StepMask | None) -> Drawn:
        work = batch.sampling
        if not self._sampler.is_plain(work, mask):
            return self._sampler.sample(logits, work, batch.rows, batch.positions, mask)
        if batch.size:
            self.num_graphs += 1
            self._graphs.sample(batch.size)
            return Drawn(work, self._sampler.ids[: len(work)], None, {})
        return Drawn(work, self._sampler.launch(logits, batch.rows, batch.positions), None, {})

    def _score_prompts(self, launched: Launched) -> list[Scored]:
        batch, hidden = launched.batch, launched.hidden
        assert hidden is not None
        found, start = [], len(batch.sampling)
        for item, first in batch.scored:
            count = min(item.num_tokens, self.rows.num_prompt[item.row] - 1 - first)
            num_top = self.rows.params[item.row].prompt_logprobs or 0
            ids = self.rows.token_ids[item.row, first + 1 : first + 1 + count]
            most = len(self.rows.epochs)
            parts = [
                self._sampler.score(self.model.logits(hidden[start + at : start + min(at + most, count)]),
                                    ids[at : at + most], num_top)
                for at in range(0, count, most)
            ]  # fmt: skip
            found.append(Scored(item, first, num_top, torch.cat(parts)))
            start += item.num_tokens
        return found


def eager_sizes(largest_graph: int, num_rows: int) -> list[int]:
    """Decode steps to run at start for those that no graph holds: one for each power of two, by which kernels choose
    their tiles and lanes."""
    powers = [1 << power for power in range(num_rows.bit_length() + 1) if 1 << power < 2 * num_rows]
    return [size for size in (min(power, num_rows) for power in powers) if size > largest_graph]


def _tiles(
    shape: ModelConfig, kinds: packed.Formats, target: Target, device: torch.device
) -> tuple[Target, str]:
    """The target with the tiles of its card, shipped or measured, and a line that says which."""
    widths = tuning.Shapes(
        hidden=shape.hidden_size,
        qkv_rows=(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim,
        o_columns=shape.num_heads * shape.head_dim,
        vocab=shape.vocab_size,
        num_experts=shape.num_experts,
        top_k=shape.num_experts_per_tok,
        intermediate=shape.intermediate_size,
        attention=kinds.qkv,
        experts=kinds.w13,
    )
    return tuning.prepare(widths, target, device, env.cache_dir())


def _to_host(found: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, complete when an event behind it is."""
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
    host.copy_(found, non_blocking=True)
    return host

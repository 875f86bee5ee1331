"""MiniMax-M2 as a few fused kernels over packed weights: the forward pass on GPUs.

A decode step is at most eight launches a layer, whatever the number of rows:

    1 norm      x += the experts' pairs of the layer before; h = norm(x), of few tokens but for 1 / rms, quantised
    2 qkv       h W_qkv; of many tokens of prompts, queries times the gain of their norm and rotated
    3 attention QK-norm, rotary, write of K and V, attention over the paged context
    4 o         partial sums of attn W_o; of many tokens, x += attn W_o
    5, 6 router x += the partial sums; scores, top-k, lists of tokens by expert; h2 = norm(x), quantised
    7, 8 experts  silu(h2 W_1) * (h2 W_3), quantised; times W_2, weighted, one row for each (token, expert)

The first layer's norm looks the tokens up in the embedding; behind the last layer a norm of the rows that sample and
the lm_head follow. With prompts in the step, attention is up to three launches: QK-norm and rotary of all tokens, then
the decoding rows, then the prompts. What lies between two layers' attention, a *piece*, then depends on the number of
tokens alone, up to `MIN_TURNED_TOKENS`, and can be a CUDA graph for each of a few numbers (`runner.graphs`).

On GPUs that have it, decode steps of few rows are one launch in all, that of the persistent kernel, over the same
weights. Nothing is allocated and nothing waits, so a decode step can be a CUDA graph. The math is that of `m2.py`;
each kernel says where it comes from.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from saddle.errors import StartupError
from saddle.kernels import (
    experts,
    fused_norm,
    gate,
    grouped,
    linear,
    paged_decode,
    paged_prefill,
    prompt_attention,
    qk_rope,
    router,
)
from saddle.kernels.norm_rope import rotary_table
from saddle.kernels.nvrtc import CudaError
from saddle.kernels.paged_kv import BLOCK_SIZE, HEAD_DIM, KVLayer
from saddle.kernels.persistent import MAX_ROWS, DecodeShape, PersistentDecode, unsupported
from saddle.kernels.target import Target
from saddle.kernels.tile_dot import takes_fp8
from saddle.kernels.tiles import Fp8Tiles
from saddle.model import packed
from saddle.model.config import ModelConfig
from saddle.model.inputs import DeviceInputs
from saddle.model.kv_memory import KVMemory
from saddle.model.packed import PackedLayer, PackedModel
from saddle.model.workspace import Buffers, Workspace
from saddle.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

ROTARY_DIM = 64
# Programmatic dependent launch: the next kernel's programs may start early (1: after this one's wait; 2: before its
# epilogue). Late is better for kernels of one or two programs a multiprocessor, which would lose their even spread.
PDL_LATE = 2
# From here on the product of qkv turns the queries of steps without decoding rows. Smaller steps may be graphs, which
# serve any rows.
MIN_TURNED_TOKENS = 1024


class FusedMiniMaxM2:
    """One rank's model on a GPU. Holds weights, tables and the work space of a step.

    Args:
        max_positions: longest context; the rotary table covers it.
        max_tokens, max_rows: the largest step.
        uniform_routing: experts are a hash of layer, position and token (random weights route unevenly).
        cache_dir: where binaries of kernels in CUDA C++ are kept; None: nowhere.

    Raises:
        StartupError: the checkpoint's shape is none that the kernels are made for.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedModel,
        *,
        max_positions: int,
        max_tokens: int,
        max_rows: int,
        target: Target,
        uniform_routing: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        reason = why_not(config)
        if reason is not None:
            raise StartupError(f"This checkpoint does not run here: {reason}.")
        self.config, self.weights, self.target = config, weights, target
        self.uniform_routing = uniform_routing
        self._cache_dir = cache_dir
        self.max_rows = max_rows
        device = weights.embed.device
        self.pdl = PDL_LATE if target.has_pdl and device.type != "cpu" else 0
        kinds = packed.formats(config, ParallelLayout(), target.is_fnuz)
        self.space = Workspace(config, kinds, target, max_tokens, max_rows, device)
        first, top_k = weights.layers[0], config.num_experts_per_tok
        self.grouped, self._experts_path = grouped.prepare(
            first.w13, first.w2, first.qkv, first.o, top_k, target, cache_dir
        )
        gates = [(layer.gate, layer.post_norm) for layer in weights.layers]
        self._gates, self._gate_path = gate.prepare(
            gates, top_k, takes_fp8(first.w13, target), target, cache_dir
        )
        self.prompt_attention: prompt_attention.PromptAttention | None = None
        self._attention_path = "attention of prompts: not chosen before there is KV memory"
        self.persistent: PersistentDecode | None = None
        self._not_persistent = unsupported(target, decode_shape(config), weights)
        self.cos, self.sin = rotary_table(config.rotary_dim, config.rope_theta, max_positions, torch.float32, device)

    @staticmethod
    def workspace_bytes_for(config: ModelConfig, max_tokens: int, max_rows: int, target: Target) -> int:
        """Bytes of the work space, known before anything is allocated."""
        kinds = packed.formats(config, ParallelLayout(), target.is_fnuz)
        own = Workspace(config, kinds, target, max_tokens, max_rows, torch.device("meta")).num_bytes
        experts_fp8 = isinstance(kinds.w13, Fp8Tiles) and target.has_fp8_dot
        if gate.unsupported(config.hidden_size, config.num_experts, config.num_experts_per_tok, experts_fp8,
                            target) is None:  # fmt: skip
            own += config.num_layers * gate.image_bytes(config.hidden_size)
        shape = decode_shape(config)
        if unsupported(target, shape) is not None:
            return own
        return own + PersistentDecode.num_bytes(shape, min(MAX_ROWS, max_rows), target.num_sms)

    @property
    def workspace_bytes(self) -> int:
        own = self.space.num_bytes + sum(one.image.num_bytes for one in self._gates)
        if self.persistent is None:
            return own
        rows = min(MAX_ROWS, self.max_rows)
        return own + PersistentDecode.num_bytes(self.persistent.shape, rows, self.target.num_sms)

    def paths(self) -> list[str]:
        """Which kernels run which steps, one line each with the reason."""
        line = f"steps: Triton kernels ({self.target.arch}), eight launches a layer where all rows decode"
        if self._not_persistent is not None:
            decode = f"decode steps: no persistent kernel, because {self._not_persistent}"
        else:
            decode = f"decode steps of up to {MAX_ROWS} rows: the persistent kernel, one launch a step"
        return [line, decode, self._experts_path, self._gate_path, self._attention_path]

    def path_of(self, num_rows: int) -> str:
        """What a decode step of so many rows runs through."""
        return "persistent" if self.persistent is not None and num_rows <= MAX_ROWS else "kernels"

    def failure(self) -> str | None:
        """Why the persistent kernel gave up, readable also when the device is gone; None: it did not."""
        return None if self.persistent is None else self.persistent.failure()

    def allocate_kv(self, num_blocks: int, block_size: int, kind: str) -> KVMemory:
        """KV memory of `num_blocks` blocks, zeros; kinds as in `kv_memory`.

        The persistent kernel, where it runs, is made for this memory: later steps must use it. Its type also decides
        what attends for prompts.

        Raises:
            StartupError: blocks are not of 64 tokens.
        """
        if block_size != BLOCK_SIZE:
            raise StartupError(f"--block-size must be {BLOCK_SIZE} on a GPU, got {block_size}.")
        scales = [layer.kv_scales for layer in self.weights.layers]
        device = self.weights.embed.device
        kv = KVMemory.allocate(self.config, num_blocks, kind, scales, device, self.target.fp8_dtype)
        self.prompt_attention, self._attention_path = prompt_attention.prepare(
            kv.layers[0], self.config.num_heads, self.target, self._cache_dir
        )
        if self._not_persistent is None and device.type == "cuda":
            try:
                self.persistent = PersistentDecode(
                    self.weights, decode_shape(self.config), self.target, kv.layers, min(MAX_ROWS, self.max_rows),
                    self._cache_dir, self.uniform_routing,
                )  # fmt: skip
            except CudaError as error:
                self._not_persistent = f"it does not compile here: {error}"
                logger.warning("No persistent kernel: %s", error)
        return kv

    def forward(self, inputs: DeviceInputs, kv: KVMemory) -> torch.Tensor:
        """Compute one step, writing its keys and values into `kv`.

        Args:
            inputs: at most `max_rows` rows sample.

        Returns:
            Logits [S, vocab] float32 of the tokens in `inputs.logit_index`: a view of the work space, overwritten by
            the next step.
        """
        num_rows = len(inputs.row_ids)
        # In a decode step every row samples its one token.
        if self.path_of(num_rows) == "persistent" and inputs.num_decode_rows == num_rows == len(inputs.logit_index):
            assert self.persistent is not None
            out = self.space.logits[:num_rows]
            self.persistent.step(inputs.token_ids, inputs.positions, inputs.context_lens, inputs.row_ids,
                                 inputs.block_tables, out)  # fmt: skip
            return out
        return self.logits(self.hidden(inputs, kv))

    def hidden(
        self, inputs: DeviceInputs, kv: KVMemory, piece: Callable[[int], object] | None = None
    ) -> torch.Tensor:
        """Normalised last hidden states [S, H] bfloat16 of the tokens in `inputs.logit_index`; KV is written.

        Args:
            piece: runs a piece of a step with prompts, as `self.piece` does, which is taken where there is none.

        A view of the work space for up to `max_rows` of them, else newly allocated.
        """
        num_samples = len(inputs.logit_index)
        out = self.space.hidden[:num_samples]
        if num_samples > self.max_rows:
            out = torch.empty(num_samples, self.config.hidden_size, dtype=torch.bfloat16, device=out.device)
        if len(inputs.token_ids) == 0:
            return out
        work = self.space.buffers(len(inputs.token_ids))
        if inputs.num_decode_rows:
            paged_decode.plan_decode(inputs.context_lens, self.space.decode, inputs.num_decode_rows, self.pdl)
        layers = list(zip(self.weights.layers, kv.layers, strict=True))
        if inputs.num_decode_rows == len(inputs.row_ids):
            for number, (layer, layer_kv) in enumerate(layers):
                self.norm(number, inputs, work)
                self.qkv(layer, inputs, work)
                self.attention(layer, layer_kv, inputs, work)
                self._behind_attention(number, inputs, work)
        else:
            run = piece or functools.partial(self.piece, inputs=inputs, kv=kv, work=work)
            for number, (_, layer_kv) in enumerate(layers):
                run(number)
                self._attend(layer_kv, inputs, work)
            run(len(layers))
        eps = self.config.rms_norm_eps
        fused_norm.final_norm(work.x, work.sums, inputs.logit_index, self.weights.norm, eps, out, self.pdl)
        return out

    @property
    def num_pieces(self) -> int:
        return len(self.weights.layers) + 1

    def piece(self, number: int, inputs: DeviceInputs, kv: KVMemory, work: Buffers | None = None) -> None:
        """What lies between attention of layer `number` - 1 and that of layer `number`; numbers from 0 to the number
        of layers. It depends on addresses in `inputs` and on their length, T, alone."""
        work = work or self.space.buffers(len(inputs.token_ids))
        if number:
            self._behind_attention(number - 1, inputs, work)
        if number < len(kv.layers):
            layer = self.weights.layers[number]
            self.norm(number, inputs, work)
            self.qkv(layer, inputs, work)
            self._rope(layer, kv.layers[number], inputs, work)

    def _behind_attention(self, number: int, inputs: DeviceInputs, work: Buffers) -> None:
        layer = self.weights.layers[number]
        self.project(layer, work)
        self.route(number, inputs, work)
        self.experts(layer, work)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [S, vocab] float32 of hidden states [S, H], at most `max_rows`; a view of the work space."""
        out = self.space.logits[: len(hidden)]
        if len(hidden):
            linear.lm_head(hidden, self.weights.lm_head, out, self.target, self.pdl)
        return out

    # stages, also timed one by one -------------------------------------------------------------------------------

    def norm(self, number: int, inputs: DeviceInputs, work: Buffers) -> None:
        """Launch 1: the residual of layer `number`, and its norm."""
        weight, eps = self.weights.layers[number].input_norm, self.config.rms_norm_eps
        if number == 0:
            fused_norm.embed_norm(inputs.token_ids, self.weights.embed, work.x, weight, eps, work.h, self.pdl,
                                  work.norms)  # fmt: skip
        else:
            fused_norm.add_norm(work.x, work.sums, weight, eps, work.h, self.pdl, work.norms)

    def qkv(self, layer: PackedLayer, inputs: DeviceInputs, work: Buffers) -> None:
        """Launch 2."""
        if self._turns(inputs):
            assert self.grouped.qkv is not None
            self.grouped.qkv.turned(work.h, layer.qkv, work.qkv, layer.q_norm, self.cos, self.sin, inputs.positions,
                                    work.squares)  # fmt: skip
        else:
            linear.linear(work.h, layer.qkv, work.qkv, self.target, self.pdl, self.grouped.qkv, squares=work.norms,
                          eps=self.config.rms_norm_eps)  # fmt: skip

    def _turns(self, inputs: DeviceInputs) -> bool:
        """Whether the product of qkv turns the queries, and attention takes their 1 / rms as factors."""
        wgmma = self.prompt_attention is not None and self.grouped.qkv is not None and self.grouped.qkv.turns
        return wgmma and inputs.num_decode_rows == 0 and len(inputs.token_ids) >= MIN_TURNED_TOKENS

    def attention(self, layer: PackedLayer, kv: KVLayer, inputs: DeviceInputs, work: Buffers) -> None:
        """Launch 3; with prompts up to three launches."""
        if inputs.num_decode_rows == len(inputs.row_ids):
            paged_decode.decode_fused(
                work.qkv, layer.q_norm, layer.k_norm, self.config.rms_norm_eps, self.cos, self.sin, kv,
                inputs.block_tables, inputs.row_ids, inputs.context_lens, self.space.decode, inputs.num_decode_rows,
                work.attn, self.pdl,
            )  # fmt: skip
        else:
            self._rope(layer, kv, inputs, work)
            self._attend(kv, inputs, work)

    def _rope(self, layer: PackedLayer, kv: KVLayer, inputs: DeviceInputs, work: Buffers) -> None:
        eps = self.config.rms_norm_eps
        if self._turns(inputs):
            qk_rope.kv_write(work.qkv, work.squares, layer.k_norm, eps, self.cos, self.sin, inputs.positions,
                             inputs.slots, kv, work.factors, self.pdl)  # fmt: skip
            return
        qk_rope.qk_rope_write(work.qkv, layer.q_norm, layer.k_norm, eps, self.cos, self.sin, inputs.positions,
                              inputs.slots, kv, work.q, self.pdl)  # fmt: skip

    def _attend(self, kv: KVLayer, inputs: DeviceInputs, work: Buffers) -> None:
        """Attention of a step with prompts, behind QK-norm and rotary."""
        decodes, num_rows, pdl = inputs.num_decode_rows, len(inputs.row_ids), self.pdl
        if decodes:
            paged_decode.decode(work.q, kv, inputs.block_tables, inputs.row_ids, inputs.context_lens,
                                self.space.decode, decodes, work.attn, pdl)  # fmt: skip
        q, factors = work.q, None
        if self._turns(inputs):
            q, factors = work.qkv[:, : self.config.q_width], work.factors
        paged_prefill.prefill(
            q, kv, inputs.block_tables, inputs.row_ids, inputs.query_starts, inputs.context_lens, decodes,
            num_rows - decodes, inputs.num_prompt_tokens, work.attn, self.target, pdl, self.space.prefill,
            inputs.max_context_len, self.prompt_attention, factors,
        )  # fmt: skip

    def project(self, layer: PackedLayer, work: Buffers) -> None:
        """Launch 4; of many tokens it adds to the residual."""
        add = work.o_parts is None
        out = work.x if work.o_parts is None else work.o_parts
        linear.linear(work.attn, layer.o, out, self.target, self.pdl, self.grouped.o, add)

    def route(self, number: int, inputs: DeviceInputs, work: Buffers) -> None:
        """Launches 5 and 6."""
        layer = self.weights.layers[number]
        router.route(
            work.x, work.o_parts, layer.post_norm, self.config.rms_norm_eps, layer.gate, layer.gate_bias,
            inputs.positions, inputs.token_ids, number, self.uniform_routing, self.space.router, work.h2, self.target,
            self.pdl, self._gates[number] if self._gates else None, self.grouped.experts is None,
        )  # fmt: skip

    def experts(self, layer: PackedLayer, work: Buffers) -> None:
        """Launches 7 and 8."""
        experts.experts(work.h2, layer.w13, layer.w2, self.space.router, work.active, work.pairs, self.target,
                        self.pdl, self.grouped.experts)  # fmt: skip


def why_not(config: ModelConfig) -> str | None:
    """What keeps a checkpoint off these kernels, for the line that says which path it takes; None: nothing."""
    for key, value, right in (
        ("head_dim", config.head_dim, HEAD_DIM),
        ("rotary_dim", config.rotary_dim, ROTARY_DIM),
    ):
        if value != right:
            return f"the GPU kernels need {key} {right}, not {value}"
    for key, width in (("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)):
        if width % 128:
            return f"the GPU kernels need a {key} that is a multiple of 128, not {width}"
    return packed.unlike(config)


def decode_shape(config: ModelConfig) -> DecodeShape:
    """What the persistent kernel is compiled for."""
    return DecodeShape(
        config.hidden_size, config.num_heads, config.num_kv_heads, config.num_experts, config.num_experts_per_tok,
        config.intermediate_size, config.vocab_size, config.num_layers, config.rms_norm_eps, config.rope_theta,
    )  # fmt: skip

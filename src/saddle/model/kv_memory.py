"""The fused model's KV memory: all layers, in bf16 or FP8, and what a token of it costs.

[layer][block][k|v][kv head][64 tokens][128], inside a token as `kernels/paged_kv.py` says. FP8 numbers have a static
scale (one for a layer's keys and one for its values: the checkpoint's, else 1) or a dynamic one for each token and
head, which lie in a second tensor and count as part of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saddle.errors import StartupError
from saddle.kernels.paged_kv import BLOCK_SIZE, HEAD_DIM, KVLayer
from saddle.kernels.target import Target
from saddle.model.config import ModelConfig

# `--kv-cache-dtype` -> kind.
KINDS = {"auto": "bf16", "bfloat16": "bf16", "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_dynamic": "fp8_dynamic"}


def kind_of(kv_cache_dtype: str, target: Target) -> str:
    """The kind that `--kv-cache-dtype` asks for.

    Raises:
        StartupError: the GPU kernels have no such memory, or this GPU cannot convert it.
    """
    if kv_cache_dtype not in KINDS:
        raise StartupError(f"--kv-cache-dtype must be one of {', '.join(KINDS)} on a GPU, got {kv_cache_dtype!r}.")
    kind = KINDS[kv_cache_dtype]
    if kind != "bf16" and not target.has_fp8_dot:
        raise StartupError(f"--kv-cache-dtype {kv_cache_dtype} needs a GPU that converts FP8 (sm_89 or newer), "
                           f"{target.name} is {target.arch}. bfloat16 would work.")  # fmt: skip
    return kind


@dataclass(frozen=True, slots=True)
class KVMemory:
    """KV memory of one rank.

    kind     "bf16", "fp8" (static scales) or "fp8_dynamic"
    data     [layers, blocks, 2, kv_heads, 64, 128] bfloat16 or float8 e4m3
    scales   [layers, blocks, 2, kv_heads, 64] float32 of "fp8_dynamic", else None
    layers   the same, one by one, as the kernels take them
    """

    kind: str
    data: torch.Tensor
    scales: torch.Tensor | None
    layers: tuple[KVLayer, ...]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        kind: str,
        kv_scales: Sequence[tuple[float, float]],
        device: torch.device,
        fp8: torch.dtype = torch.float8_e4m3fn,
    ) -> KVMemory:
        """Zeros.

        Args:
            kv_scales: static scales of each layer's keys and values; used by "fp8" alone.
        """
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, BLOCK_SIZE, HEAD_DIM)
        if kind == "bf16":
            data = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        else:
            data = torch.zeros(shape, dtype=torch.uint8, device=device).view(fp8)
        scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device) if kind == "fp8_dynamic" else None
        layers = []
        for number, static in enumerate(kv_scales):
            own = None if scales is None else scales[number]
            k_scale, v_scale = static if kind == "fp8" else (1.0, 1.0)
            layers.append(KVLayer(data[number], own, k_scale, v_scale))
        return cls(kind, data, scales, tuple(layers))

    @staticmethod
    def bytes_per_token(config: ModelConfig, kind: str) -> int:
        """Bytes that one token takes in all layers, scales included."""
        if kind == "bf16":
            return config.kv_bytes_per_token("bfloat16")
        scales = 2 * config.num_layers * config.num_kv_heads * 4 if kind == "fp8_dynamic" else 0
        return config.kv_bytes_per_token("fp8") + scales

    @property
    def num_blocks(self) -> int:
        return self.data.shape[1]

    @property
    def num_bytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.numel() * 4
        return self.data.numel() * self.data.element_size() + scales

    @torch.inference_mode()
    def randomise(self, seed: int) -> None:
        """Fill with numbers of standard deviation 1, as normalised keys have it: what benches read in place of
        prompts that nobody computed."""
        generator = torch.Generator(self.data.device).manual_seed(seed)
        for layer in self.layers:
            for block in layer.data.split(max(1, (1 << 26) // layer.data[0].numel())):  # type: ignore[no-untyped-call]
                numbers = torch.empty(block.shape, device=block.device).normal_(generator=generator)
                if self.scales is not None:
                    numbers.mul_(64)  # of the 448 that FP8 ends at; the scales below undo it
                elif layer.scale_kind:
                    numbers.div_(layer.k_scale)
                block.copy_(numbers.clamp_(-448, 448) if layer.data.element_size() == 1 else numbers)
        if self.scales is not None:
            self.scales.fill_(1 / 64)

"""What the model's tests share: loading, an independent oracle from transformers, and hand-made steps over paged KV."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from saddle.model import weights as w
from saddle.model.config import ModelConfig
from saddle.model.inputs import StepInputs
from saddle.model.m2 import MiniMaxM2
from saddle.parallel.layout import ParallelLayout


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> MiniMaxM2:
    """A checkpoint on the CPU, as the runner loads it."""
    config = ModelConfig.load(folder)
    weights = w.allocate(config, ParallelLayout(), dtype, torch.device("cpu"))
    w.load(folder, config, ParallelLayout(), weights, lambda share, note: None)
    return MiniMaxM2(config, weights, config.max_position_embeddings)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, as stored."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in list(file.keys())}
    return found


def dequantised(stored: dict[str, torch.Tensor], shift: int = 0) -> dict[str, torch.Tensor]:
    """float32 weights by published name; scales applied element by element.

    Args:
        shift: rows by which the blocks of the scales are displaced (a seeded fault).
    """
    found = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(name + "_scale_inv")
        found[name] = tensor.float()
        if scale is not None:
            rows = (torch.arange(tensor.shape[0]) + shift).clamp(max=tensor.shape[0] - 1) // 128
            columns = torch.arange(tensor.shape[1]) // 128
            found[name] *= scale[rows[:, None], columns[None, :]]
    return found


def oracle(folder: Path) -> Any:
    """transformers' model in float32 with the weights of a checkpoint, dequantised here."""
    raw = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "dtype", "use_mtp"):
        raw.pop(key, None)
    # Spelt out: transformers 5.17 rotates all dims when it is given `rotary_dim` alone.
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta"),
                              "partial_rotary_factor": 0.5}  # fmt: skip
    raw |= {"bos_token_id": None, "eos_token_id": None}
    raw |= {"attn_implementation": "eager"}
    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**raw))
    model.train(False)
    state = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(dequantised(stored_tensors(folder)).items()):
        if ".experts." not in name:
            state[name.replace("block_sparse_moe", "mlp")] = tensor
    flat = dequantised(stored_tensors(folder))
    for number in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{number}.block_sparse_moe.experts."
        for kind in ("w1", "w2", "w3"):
            experts[kind] = [flat[f"{prefix}{e}.{kind}.weight"] for e in range(raw["num_local_experts"])]
        target = f"model.layers.{number}.mlp.experts."
        state[target + "gate_up_proj"] = torch.cat((torch.stack(experts["w1"]), torch.stack(experts["w3"])), dim=1)
        state[target + "down_proj"] = torch.stack(experts["w2"])
    model.load_state_dict(state, strict=True)
    return model


class Sequences:
    """Rows over paged KV with scattered blocks, stepped by hand.

    Args:
        order: seed of the order in which blocks are given out.
    """

    def __init__(self, model: MiniMaxM2, num_blocks: int = 256, block_size: int = 16, order: int = 0) -> None:
        self.model, self.block_size = model, block_size
        self.kv = model.allocate_kv(num_blocks, block_size, model.dtype)
        self.kv.fill_(1e4)  # looking at what was never written shows
        self.free = list(range(num_blocks))
        random.Random(order).shuffle(self.free)
        self.blocks: dict[str, list[int]] = {}
        self.lens: dict[str, int] = {}

    @torch.inference_mode()
    def step(
        self,
        work: Mapping[str, Sequence[int]],
        exact: bool = True,
        all_logits: bool = False,
        logit_index: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Compute new tokens of some rows; logits of the last token of each, of all tokens, or of those asked for.

        Args:
            exact: the host knows the lengths (as on a CPU), else only their bounds.
        """
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, contexts, bounds = [0], [], []
        for name, new in work.items():
            begin = self.lens.get(name, 0)
            self.lens[name] = end = begin + len(new)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * self.block_size < end:
                blocks.append(self.free.pop())
            ids += new
            positions += range(begin, end)
            slots += [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(begin, end)]
            starts.append(len(ids))
            contexts.append(end)
            bounds.append((len(new), end))
        widest = max((len(self.blocks[name]) for name in work), default=0) + 3
        tables = [self.blocks[name] + [0] * (widest - len(self.blocks[name])) for name in work]
        if logit_index is None:
            logit_index = range(len(ids)) if all_logits else [stop - 1 for stop in starts[1:]]
        inputs = StepInputs(
            token_ids=torch.tensor(ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            slots=torch.tensor(slots, dtype=torch.int64),
            block_tables=torch.tensor(tables, dtype=torch.int64).view(len(work), widest),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            logit_index=torch.tensor(list(logit_index), dtype=torch.int64),
            max_query_len=max((length for length, _ in bounds), default=0),
            max_context_len=max(contexts, default=0) + (0 if exact else 3),
            row_bounds=bounds if exact else None,
        )
        return self.model.forward(inputs, self.kv)

    def greedy(self, name: str, prompt: Sequence[int], num_tokens: int, chunk: int | None = None) -> list[int]:
        """Generate from a prompt that is computed `chunk` tokens at a time."""
        size = chunk or len(prompt)
        for begin in range(0, len(prompt), size):
            logits = self.step({name: prompt[begin : begin + size]})
        found = [int(logits[0].argmax())]
        while len(found) < num_tokens:
            found.append(int(self.step({name: found[-1:]})[0].argmax()))
        return found


def prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two sets of logits over the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())

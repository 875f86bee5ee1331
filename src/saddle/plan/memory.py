"""How many KV blocks fit, which context that allows, how wide steps are. Pure arithmetic, no torch.

    GPU   share of the memory, less the weights and the work space that a step needs
    CPU   a quarter of the memory that is free, at most 4 GiB
    both  what `--kv-cache-memory-bytes` says instead; never more than all rows at the full context could use
"""

from __future__ import annotations

from dataclasses import dataclass

from saddle.config import Decision, EngineConfig
from saddle.errors import StartupError
from saddle.protocol import DeviceInfo, DeviceMemory

GIB = 1 << 30
CPU_SHARE, CPU_MOST = 0.25, 4 * GIB
FLAGS = {"block_size": "--block-size", "max_num_seqs": "--max-num-seqs", "plans_in_flight": "--async-scheduling",
         "max_num_batched_tokens": "--max-num-batched-tokens"}  # fmt: skip


# What readers of streams beside a long prompt should not wait longer than, on a GPU: a step of 16 layers with 32 rows
# takes 15 ms, one of 8,192 prompt tokens about 100.
GPU_MAX_STEP_MS = 60.0


@dataclass(frozen=True, slots=True)
class KVBudget:
    """KV memory of one rank in bytes, and why."""

    num_bytes: int
    reason: str

    @property
    def decision(self) -> Decision:
        return Decision("kv_cache_memory_bytes", self.num_bytes, self.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCapacity:
    """Blocks, the context they were checked for, and how both came about."""

    num_blocks: int
    max_model_len: int
    decisions: tuple[Decision, ...]


def gib(num_bytes: int) -> str:
    """Bytes as a person reads them: GiB, MiB where that would be 0."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / (1 << 20):.2f} MiB"


def cpu_kv_bytes(available_bytes: int, asked_bytes: int | None) -> KVBudget:
    """KV memory on a CPU.

    Args:
        available_bytes: memory that is free, the weights being there already.

    Raises:
        StartupError: more is asked for than is free.
    """
    if asked_bytes is not None:
        if asked_bytes > available_bytes:
            raise StartupError(f"--kv-cache-memory-bytes must be at most {available_bytes}, the memory that is free "
                               f"beside the weights, got {asked_bytes}.")  # fmt: skip
        return KVBudget(asked_bytes, "--kv-cache-memory-bytes")
    share = int(available_bytes * CPU_SHARE)
    if share <= CPU_MOST:
        return KVBudget(share, f"{CPU_SHARE:.0%} of the {gib(available_bytes)} that are free")
    return KVBudget(CPU_MOST, f"the most by default on a CPU, {gib(available_bytes)} are free")


def gpu_kv_bytes(
    total_bytes: int, share: float, weight_bytes: int, step_bytes: int, asked_bytes: int | None
) -> KVBudget:
    """KV memory on one GPU.

    Args:
        total_bytes: memory of the card.
        share: `--gpu-memory-utilization`.
        weight_bytes, step_bytes: what the weights and one step's work space take.

    Raises:
        StartupError: weights and work space leave nothing, or less than is asked for.
    """
    held = weight_bytes + step_bytes
    if asked_bytes is not None:
        if asked_bytes > total_bytes - held:
            raise StartupError(f"--kv-cache-memory-bytes must be at most {max(total_bytes - held, 0)}, what weights "
                               f"and work space leave of {gib(total_bytes)}, got {asked_bytes}.")  # fmt: skip
        return KVBudget(asked_bytes, "--kv-cache-memory-bytes")
    left = int(total_bytes * share) - held
    if left <= 0:
        raise StartupError(
            f"The weights ({gib(weight_bytes)}) and a step's work space ({gib(step_bytes)}) leave nothing for KV "
            f"memory of {share:.0%} of {gib(total_bytes)}. Raise --gpu-memory-utilization or use more or larger GPUs."
        )
    return KVBudget(left, f"{share:.0%} of {gib(total_bytes)}, less {gib(held)} for weights and work space")


def kv_capacity(
    *,
    kv_bytes: int,
    bytes_per_token: int,
    block_size: int,
    max_num_seqs: int,
    asked_len: int | None,
    checkpoint_len: int,
) -> KVCapacity:
    """Blocks for `kv_bytes` of KV memory, and the context that the server offers.

    Args:
        bytes_per_token: of keys and values in all layers of this rank.
        asked_len: `--max-model-len`; None is the checkpoint's, 0 the largest that fits.
        checkpoint_len: `max_position_embeddings`.

    Raises:
        StartupError: the context is too short or does not fit; names the largest that would.
    """
    block_bytes = bytes_per_token * block_size
    fits = kv_bytes // block_bytes * block_size
    if asked_len is not None and asked_len > checkpoint_len:
        raise StartupError(f"--max-model-len must be at most {checkpoint_len}, the checkpoint's, got {asked_len}.")
    if asked_len == 1:
        raise StartupError("--max-model-len must be at least 2, a token of prompt and one of output, got 1.")
    if asked_len == 0:
        length, why = min(fits, checkpoint_len), "the largest that fits"
    elif asked_len is None:
        length, why = checkpoint_len, "the checkpoint's max_position_embeddings"
    else:
        length, why = asked_len, "--max-model-len"
    if fits == 0:
        raise StartupError(
            f"One block of {block_size} tokens needs {gib(block_bytes)} of KV memory, there are {gib(kv_bytes)}. Give "
            "more with --kv-cache-memory-bytes or --gpu-memory-utilization."
        )
    blocks_a_row = -(-length // block_size)
    if length > fits:
        raise StartupError(
            f"A context of {length} tokens needs {gib(blocks_a_row * block_bytes)} of KV memory, there are "
            f"{gib(kv_bytes)}. The largest that fits is --max-model-len {fits}; or give more with "
            "--kv-cache-memory-bytes or --gpu-memory-utilization."
        )
    useful = max_num_seqs * blocks_a_row
    num_blocks = min(fits // block_size, useful)
    reason = f"{max_num_seqs} rows of {length} tokens use no more" if num_blocks == useful else "what fits"
    decisions = (
        Decision("max_model_len", length, why),
        Decision("num_blocks", num_blocks, f"{reason}; {block_size} tokens each, {num_blocks * block_size} in all"),
    )
    return KVCapacity(num_blocks=num_blocks, max_model_len=length, decisions=decisions)


def plan_device(config: EngineConfig, memory: DeviceMemory) -> DeviceInfo:
    """All sizes of a device, from what was asked for and what it has.

    Raises:
        StartupError: the configuration cannot start on it; the message says what would.
    """
    cache, scheduler = config.cache, config.scheduler
    sizes = config.sizes(memory.kind)
    asked = {"block_size": cache.block_size, "max_num_seqs": scheduler.max_num_seqs,
             "max_num_batched_tokens": scheduler.max_num_batched_tokens,
             "plans_in_flight": scheduler.plans_in_flight}  # fmt: skip
    by_default = f"the default on a {memory.kind.upper()}"
    decisions = [Decision(name, getattr(sizes, name), by_default if value is None else FLAGS[name])
                 for name, value in asked.items()]  # fmt: skip
    max_step_ms = scheduler.max_step_ms
    if max_step_ms is not None:
        decisions.append(Decision("max_step_ms", max_step_ms, "--max-step-ms"))
    elif memory.kind == "cuda":
        max_step_ms = GPU_MAX_STEP_MS
        why = "the default on a GPU; longer where it would leave prompts little"
        decisions.append(Decision("max_step_ms", max_step_ms, why))
    if memory.kind == "cpu":
        budget = cpu_kv_bytes(memory.free_bytes, cache.kv_cache_memory_bytes)
    else:
        budget = gpu_kv_bytes(memory.total_bytes, cache.gpu_memory_utilization, memory.weight_bytes,
                              memory.step_bytes, cache.kv_cache_memory_bytes)  # fmt: skip
    capacity = kv_capacity(
        kv_bytes=budget.num_bytes,
        bytes_per_token=memory.bytes_per_token,
        block_size=sizes.block_size,
        max_num_seqs=sizes.max_num_seqs,
        asked_len=scheduler.max_model_len,
        checkpoint_len=memory.max_position_embeddings,
    )
    return DeviceInfo(
        num_blocks=capacity.num_blocks,
        block_size=sizes.block_size,
        max_model_len=capacity.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        vocab_size=memory.vocab_size,
        plans_in_flight=sizes.plans_in_flight,
        max_step_ms=max_step_ms,
        yields_half=scheduler.max_step_ms is None,
        lines=[*memory.lines, *map(str, (*decisions, budget.decision, *capacity.decisions))],
    )

"""How many KV blocks fit, and which context that allows. Pure arithmetic, no torch.

    GPU   share of the memory, less the weights and the work space that a step needs
    CPU   a quarter of the memory that is free, at most 4 GiB
    both  what `--kv-cache-memory-bytes` says instead; never more than all rows at the full context could use
"""

from __future__ import annotations

from dataclasses import dataclass

from saddle.config import Decision
from saddle.errors import StartupError

GIB = 1 << 30
CPU_SHARE, CPU_MOST = 0.25, 4 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCapacity:
    """Blocks, the context they were checked for, and how both came about."""

    num_blocks: int
    max_model_len: int
    decisions: tuple[Decision, ...]


def cpu_kv_bytes(available_bytes: int, asked_bytes: int | None) -> Decision:
    """KV memory on a CPU."""
    if asked_bytes is not None:
        return Decision("kv_cache_memory_bytes", asked_bytes, "--kv-cache-memory-bytes")
    share = int(available_bytes * CPU_SHARE)
    if share <= CPU_MOST:
        return Decision("kv_cache_memory_bytes", share, f"{CPU_SHARE:.0%} of {available_bytes / GIB:.1f} GiB free")
    reason = f"the most by default on a CPU, {available_bytes / GIB:.1f} GiB are free"
    return Decision("kv_cache_memory_bytes", CPU_MOST, reason)


def gpu_kv_bytes(
    total_bytes: int, share: float, weight_bytes: int, step_bytes: int, asked_bytes: int | None
) -> Decision:
    """KV memory on one GPU.

    Args:
        total_bytes: memory of the card.
        share: `--gpu-memory-utilization`.
        weight_bytes, step_bytes: what the weights and one step's work space take.

    Raises:
        StartupError: the weights alone take more than the share.
    """
    if asked_bytes is not None:
        return Decision("kv_cache_memory_bytes", asked_bytes, "--kv-cache-memory-bytes")
    left = int(total_bytes * share) - weight_bytes - step_bytes
    if left <= 0:
        raise StartupError(
            f"The weights ({weight_bytes / GIB:.1f} GiB) and a step's work space ({step_bytes / GIB:.1f} GiB) leave "
            f"nothing for KV memory of {share:.0%} of {total_bytes / GIB:.1f} GiB. Raise --gpu-memory-utilization or "
            "use more or larger GPUs."
        )
    rest = (weight_bytes + step_bytes) / GIB
    reason = f"{share:.0%} of {total_bytes / GIB:.1f} GiB, less {rest:.1f} GiB for weights and work space"
    return Decision("kv_cache_memory_bytes", left, reason)


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
        StartupError: the context does not fit; names the largest that would, and the memory that this one needs.
    """
    fits = kv_bytes // (bytes_per_token * block_size) * block_size
    if asked_len is not None and asked_len > checkpoint_len:
        raise StartupError(f"--max-model-len must be at most {checkpoint_len}, the checkpoint's, got {asked_len}.")
    if asked_len == 0:
        length = Decision("max_model_len", min(fits, checkpoint_len), "the largest that fits")
    elif asked_len is None:
        length = Decision("max_model_len", checkpoint_len, "the checkpoint's max_position_embeddings")
    else:
        length = Decision("max_model_len", asked_len, "--max-model-len")
    wanted = int(str(length.value))
    if wanted > fits or wanted == 0:
        needed = -(-max(wanted, block_size) // block_size) * block_size * bytes_per_token
        raise StartupError(
            f"A context of {max(wanted, block_size)} tokens needs {needed / GIB:.2f} GiB of KV memory, there are "
            f"{kv_bytes / GIB:.2f} GiB. The largest that fits is --max-model-len {fits}; or give more with "
            "--kv-cache-memory-bytes or --gpu-memory-utilization."
        )
    useful = max_num_seqs * -(-wanted // block_size)
    num_blocks = min(fits // block_size, useful)
    reason = f"{max_num_seqs} rows of {wanted} tokens use no more" if num_blocks == useful else "what fits"
    blocks = Decision("num_blocks", num_blocks, f"{reason}; {block_size} tokens each, {num_blocks * block_size} in all")
    return KVCapacity(num_blocks=num_blocks, max_model_len=wanted, decisions=(length, blocks))

"""What a scheduler may use: decided at start, from what the devices have."""

from __future__ import annotations

from dataclasses import dataclass

from saddle.config import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler may use.

    max_model_len   most tokens of prompt and output together
    max_num_seqs    rows of the device
    max_num_batched_tokens   tokens a step
    max_num_queued_reqs      waiting requests beyond which new ones are refused; None: no bound
    max_step_s               see `pacing.Pacer`
    yields_half              likewise
    """

    num_blocks: int
    block_size: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    policy: Policy = "fcfs"
    enable_prefix_caching: bool = True
    max_num_queued_reqs: int | None = None
    max_step_s: float | None = None
    yields_half: bool = False

"""What single requests want of their logits on a GPU, as the lists that `kernels.logit_edits.edit_rows` reads.

Bias, bans, least lengths and bad words all are "add this to that id, as long as", so that one launch serves every row
of a step whatever each asks for. The reference is `runner.logits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saddle.kernels.logit_edits import ALWAYS
from saddle.protocol import RowAdmit, SamplingParams
from saddle.runner.device_rows import float_bits

NEVER = float_bits(float("-inf"))


@dataclass(frozen=True, slots=True)
class DeviceEdits:
    """One row's lists, on the device.

    entries    [n, 5] int32, see `edit_rows`
    heads      [m] int32
    longest    most ids that an entry wants to have come just before
    permitted  [ceil(V / 32)] int32, one bit an id; None: all are
    """

    entries: torch.Tensor
    heads: torch.Tensor
    longest: int
    permitted: torch.Tensor | None

    def numbers(self, slot: int, row: int) -> tuple[int, ...]:
        """A row of the table that `edit_rows` takes."""
        permitted = 0 if self.permitted is None else self.permitted.data_ptr()
        counts = len(self.entries) | self.longest << 32
        return slot, row, self.entries.data_ptr(), counts, self.heads.data_ptr(), permitted


def device_edits_of(
    admit: RowAdmit, vocab_size: int, eos_ids: frozenset[int], device: torch.device
) -> DeviceEdits | None:
    """The edits that a request asks for, None for most. Penalties are not among them."""
    params = admit.params
    entries = [(token_id, float_bits(bias), ALWAYS, 0, 0) for token_id, bias in params.logit_bias.items()]
    heads: list[int] = []
    for word in params.bad_words_ids:
        entries.append((word[-1], NEVER, ALWAYS, len(heads), len(word) - 1))
        heads += word[:-1]
    if params.min_tokens:
        # Ids that cannot come need no ban, and EOS does not stop a request that ignores it.
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
        until = admit.num_prompt + params.min_tokens
        entries += [(token_id, NEVER, until, 0, 0) for token_id in sorted(stops) if 0 <= token_id < vocab_size]
    if not entries and params.allowed_token_ids is None:
        return None
    return DeviceEdits(
        entries=_upload([number for entry in entries for number in entry], device).view(len(entries), 5),
        heads=_upload(heads, device),
        longest=max((entry[4] for entry in entries), default=0),
        permitted=_permitted(params, vocab_size, device),
    )


def _permitted(params: SamplingParams, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    if params.allowed_token_ids is None:
        return None
    flags = np.zeros(32 * -(-vocab_size // 32), dtype=np.uint8)
    flags[list(params.allowed_token_ids)] = 1
    return _upload(np.packbits(flags, bitorder="little").view(np.int32), device)


def _upload(numbers: Sequence[int] | np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """int32 numbers on the device, without waiting for it."""
    pinned = torch.as_tensor(numbers, dtype=torch.int32)
    if device.type == "cuda":
        pinned = pinned.pin_memory()
    return pinned.to(device, non_blocking=True)

"""The engine's view of its devices: start, two launches a step, results in order, stop.

The engine never learns how many devices there are or where they run. Implementations: `inproc` (one device, a
thread of the engine process), `fake` (answers from a script, one step late), later `multiproc` and `ray`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from saddle.protocol import StepMask, StepPlan, StepResult

ProgressFn = Callable[[str, float, str], None]  # phase, share from 0 to 1, note


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What an executor found and decided while starting; the scheduler is built from it.

    lines   what was loaded, measured and chosen, one sentence each with its reason, printed once
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    lines: list[str] = field(default_factory=list)


class Executor(Protocol):
    """Runs plans in the order given.

    A step is `forward(plan)` followed by one `sample(step_id, mask)`. Both return at once; `collect` yields the
    results in the same order. A failed step is a `StepResult` with `error`; a device that cannot go on raises
    `EngineError` from any method.
    """

    def start(self, on_progress: ProgressFn) -> DeviceInfo:
        """Load, allocate and warm up. Raises StartupError with what would work."""

    def forward(self, plan: StepPlan) -> None:
        """Enqueue the forward pass of a plan."""

    def sample(self, step_id: int, mask: StepMask | None) -> None:
        """Enqueue the sampling of a plan whose forward pass was enqueued."""

    def collect(self, timeout_s: float | None) -> StepResult | None:
        """The oldest result not collected yet; None if it did not arrive within `timeout_s`."""

    def stop(self) -> None:
        """Free everything. Safe to call twice and after a failure."""

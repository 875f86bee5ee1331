"""The engine's view of its devices: start, two launches a step, results in order, stop.

The engine never learns how many devices there are or where they run. Implementations: `inproc` (one device, a
thread of the engine process), `fake` (answers from a script, one step late), later `multiproc` and `ray`.
"""

from __future__ import annotations

from typing import Protocol

from saddle.protocol import DeviceInfo, ProgressFn, StepMask, StepPlan, StepResult

__all__ = ["DeviceInfo", "Executor", "ProgressFn"]


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
        """The oldest result not collected yet; None if its step was not sampled within `timeout_s`.

        A step that a GPU still computes is waited for, however long that takes.
        """

    def stop(self) -> None:
        """Free everything. Safe to call twice and after a failure."""

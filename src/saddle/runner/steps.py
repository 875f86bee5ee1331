"""What a runner drives: a path computes steps, and hands out what the host reads of them later.

A path is everything between a plan's work and the ids of its rows: rows, model, memory and sampler of one kind of
device. `torch_path` computes in plain torch and is done when it returns; `fused_path` enqueues on a GPU and returns at
once, so that the host learns the ids when it needs them, a step later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from saddle.protocol import (
    DeviceInfo,
    ProgressFn,
    RowAdmit,
    RowPromptLogprobs,
    RowSample,
    RowWork,
    StepMask,
    StepResult,
)
from saddle.runner.rows import RowMirror


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step found, on the host; `device_s` is None where the caller has to measure it."""

    samples: list[RowSample]
    prompt_logprobs: list[RowPromptLogprobs]
    device_s: float | None = None


class StepPath(Protocol):
    """One way of computing steps.

    weight_bytes, step_bytes   taken by weights and by work space, known when the path is made
    bytes_per_token   of KV memory
    waits      whether `forward` and `sample` wait for the device: then another thread should call them
    lines      what was loaded and chosen, one sentence each
    """

    weight_bytes: int
    step_bytes: int
    bytes_per_token: int
    waits: bool
    lines: list[str]

    @property
    def rows(self) -> RowMirror:
        """What the host knows of the rows."""

    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None:
        """Allocate rows and KV memory as planned."""

    def warm_up(self, num_tokens: int, on_progress: ProgressFn) -> None:
        """Run every kind of step once, none longer than `num_tokens`; rows are as new afterwards."""

    def admit(self, admit: RowAdmit) -> None:
        """Give a row to a request."""

    def forward(self, work: list[RowWork]) -> Any:
        """Compute the logits of a step; what is returned goes to `sample`."""

    def sample(self, launched: Any, mask: StepMask | None) -> Callable[[], Outcome]:
        """Draw the ids of a step. The result reads them, and may wait for the device."""


class StepHandle:
    """A step that was sampled; `wait` is called once."""

    def __init__(self, step_id: int, finish: Callable[[], StepResult]) -> None:
        self.step_id = step_id
        self._finish = finish

    def wait(self) -> StepResult:
        """The result, as soon as the device has it.

        Raises:
            EngineError: the device itself failed.
        """
        return self._finish()

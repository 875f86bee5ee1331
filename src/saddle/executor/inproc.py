"""One device in the engine's own process.

With plans in flight the runner works in a thread, so that the next plan is built while this one computes (torch
releases the interpreter's lock inside its operations). Without, it runs in the caller.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from saddle.config import EngineConfig
from saddle.errors import EngineError
from saddle.executor.base import DeviceInfo, ProgressFn
from saddle.plan.memory import plan_device
from saddle.protocol import DeviceMemory, StepMask, StepPlan, StepResult


class Device(Protocol):
    """What runs here: `runner.Runner`."""

    @property
    def config(self) -> EngineConfig: ...
    def load(self, on_progress: ProgressFn) -> DeviceMemory: ...
    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None: ...
    def forward(self, plan: StepPlan) -> None: ...
    def sample(self, step_id: int, mask: StepMask | None) -> StepResult: ...


class InprocExecutor:
    """An `Executor` over one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Callable[[], StepResult | None] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_progress: ProgressFn) -> DeviceInfo:
        info = plan_device(self._device.config, self._device.load(on_progress))
        self._device.allocate(info, on_progress)
        if info.plans_in_flight:
            self._thread = threading.Thread(target=self._work, name="device", daemon=True)
            self._thread.start()
        return info

    def forward(self, plan: StepPlan) -> None:
        self._do(lambda: self._device.forward(plan))

    def sample(self, step_id: int, mask: StepMask | None) -> None:
        self._do(lambda: self._device.sample(step_id, mask))

    def collect(self, timeout_s: float | None) -> StepResult | None:
        try:
            result = self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(result, EngineError):
            raise result
        if isinstance(result, BaseException):
            raise EngineError(f"{type(result).__name__}: {result}") from result
        return result

    def stop(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _do(self, job: Callable[[], StepResult | None]) -> None:
        if self._thread is None:
            self._run(job)
        else:
            self._jobs.put(job)

    def _run(self, job: Callable[[], StepResult | None]) -> None:
        try:
            result = job()
        except BaseException as error:
            self._results.put(error)
            return
        if result is not None:
            self._results.put(result)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(job)

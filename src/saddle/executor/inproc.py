"""One device in the engine's own process.

A device that only enqueues (a GPU) is driven by the caller: its two calls return while it computes, and `collect`
waits for the oldest result. One that computes in those calls works in a thread if plans are in flight, so that the
next plan is built meanwhile (torch releases the interpreter's lock inside its operations). A GPU gets no thread: it
would fight the engine for that lock, which changes hands every 5 ms, three steps' time.
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


class Handle(Protocol):
    """A step that was sampled."""

    def wait(self) -> StepResult: ...


class Device(Protocol):
    """What runs here: `runner.Runner`. `waits`: whether its calls return only when the device is done."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def waits(self) -> bool: ...
    def load(self, on_progress: ProgressFn) -> DeviceMemory: ...
    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None: ...
    def forward(self, plan: StepPlan) -> None: ...
    def sample(self, step_id: int, mask: StepMask | None) -> Handle: ...


class InprocExecutor:
    """An `Executor` over one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Callable[[], Handle | None] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Handle | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_progress: ProgressFn) -> DeviceInfo:
        info = plan_device(self._device.config, self._device.load(on_progress))
        self._device.allocate(info, on_progress)
        if info.plans_in_flight and self._device.waits:
            self._thread = threading.Thread(target=self._work, name="device", daemon=True)
            self._thread.start()
        return info

    def forward(self, plan: StepPlan) -> None:
        self._do(lambda: self._device.forward(plan))

    def sample(self, step_id: int, mask: StepMask | None) -> None:
        self._do(lambda: self._device.sample(step_id, mask))

    def collect(self, timeout_s: float | None) -> StepResult | None:
        try:
            found = self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        try:
            if isinstance(found, BaseException):
                raise found
            return found.wait()
        except EngineError:
            raise
        except BaseException as error:
            raise EngineError(f"{type(error).__name__}: {error}") from error

    def stop(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _do(self, job: Callable[[], Handle | None]) -> None:
        if self._thread is None:
            self._run(job)
        else:
            self._jobs.put(job)

    def _run(self, job: Callable[[], Handle | None]) -> None:
        try:
            handle = job()
        except BaseException as error:
            self._results.put(error)
            return
        if handle is not None:
            self._results.put(handle)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(job)

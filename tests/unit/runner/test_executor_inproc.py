"""One device in this process, in a thread of its own or in the caller's: order, errors, end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from saddle.config import EngineConfig, LoadConfig, SchedulerConfig
from saddle.errors import EngineError, StartupError
from saddle.executor.inproc import InprocExecutor
from saddle.plan.memory import plan_device
from saddle.protocol import DeviceInfo, DeviceMemory, ProgressFn, StepMask, StepPlan, StepResult

MEMORY = DeviceMemory(kind="cpu", total_bytes=1 << 30, free_bytes=1 << 28, weight_bytes=5, step_bytes=0,
                      bytes_per_token=64, vocab_size=8, max_position_embeddings=64, lines=["found"])  # fmt: skip


class Handle:
    """A step; calls the hook when somebody waits for it."""

    def __init__(self, device: Device, result: StepResult) -> None:
        self._device, self._result = device, result

    def wait(self) -> StepResult:
        self._device._note("wait", self._result.step_id)
        return self._result


class Device:
    """Answers each step; calls a hook before whatever it does."""

    def __init__(self, plans_in_flight: int, waits: bool = True) -> None:
        self.waits = waits
        scheduler = SchedulerConfig(max_num_seqs=3, plans_in_flight=plans_in_flight)
        self.config = EngineConfig(load=LoadConfig(model=""), scheduler=scheduler)
        self.calls: list[tuple[str, int]] = []
        self.threads: set[str] = set()
        self.hook: Callable[[str, int], None] = lambda name, step: None

    def _note(self, name: str, step: int) -> None:
        self.calls.append((name, step))
        self.threads.add(threading.current_thread().name)
        self.hook(name, step)

    def load(self, on_progress: ProgressFn) -> DeviceMemory:
        on_progress("loading", 1.0, "")
        self._note("load", 0)
        return MEMORY

    def allocate(self, info: DeviceInfo, on_progress: ProgressFn) -> None:
        on_progress("allocating", 1.0, "")
        self.allocated = info
        self._note("allocate", 0)

    def forward(self, plan: StepPlan) -> None:
        self._note("forward", plan.step_id)

    def sample(self, step_id: int, mask: StepMask | None) -> Handle:
        self._note("sample", step_id)
        return Handle(self, StepResult(step_id, [], [], error=None if mask is None else str(mask.rows)))


@pytest.fixture(params=[0, 1])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[Device, InprocExecutor]]:
    device = Device(request.param)
    executor = InprocExecutor(device)
    yield device, executor
    executor.stop()


def plan(step: int) -> StepPlan:
    return StepPlan(step, [], [], [])


def test_steps_in_order(made: tuple[Device, InprocExecutor]) -> None:
    device, executor = made
    seen: list[str] = []
    info = executor.start(lambda phase, share, note: seen.append(phase))
    assert seen == ["loading", "allocating"]
    assert device.allocated == info == plan_device(device.config, MEMORY)
    assert (info.max_num_seqs, info.num_blocks, info.lines[0]) == (3, 12, "found")
    for step in range(5):
        executor.forward(plan(step))
        executor.sample(step, StepMask(step, [step], [b""]) if step == 3 else None)
    found = [executor.collect(5.0) for _ in range(5)]
    assert [result.step_id for result in found if result is not None] == [0, 1, 2, 3, 4]
    assert [result.error for result in found if result is not None] == [None, None, None, "[3]", None]
    calls = [call for call in device.calls[2:] if call[0] != "wait"]
    assert calls == [(name, step) for step in range(5) for name in ("forward", "sample")]
    assert [step for name, step in device.calls if name == "wait"] == [0, 1, 2, 3, 4]
    assert executor.collect(0.01) is None


def test_with_plans_in_flight_the_caller_does_not_wait() -> None:
    device, gate = Device(1), threading.Event()
    device.hook = lambda name, step: _wait(gate) if name in ("forward", "sample") else None
    executor = InprocExecutor(device)
    executor.start(lambda phase, share, note: None)
    for step in range(2):
        executor.forward(plan(step))
        executor.sample(step, None)
    assert executor.collect(0.05) is None  # the device is still at the first
    gate.set()
    assert [executor.collect(5.0), executor.collect(5.0)] == [StepResult(0, [], []), StepResult(1, [], [])]
    executor.stop()
    assert device.threads == {threading.current_thread().name, "device"}


def _wait(gate: threading.Event) -> None:
    assert gate.wait(5.0)


def test_without_plans_in_flight_there_is_no_thread() -> None:
    device = Device(0)
    executor = InprocExecutor(device)
    executor.start(lambda phase, share, note: None)
    executor.forward(plan(1))
    executor.sample(1, None)
    assert executor.collect(0) == StepResult(1, [], [])
    executor.stop()
    assert device.threads == {threading.current_thread().name}


def test_a_device_that_only_enqueues_is_driven_by_the_caller_and_waited_for_last() -> None:
    device = Device(1, waits=False)
    executor = InprocExecutor(device)
    executor.start(lambda phase, share, note: None)
    for step in range(2):
        executor.forward(plan(step))
        executor.sample(step, None)
    assert executor.collect(0) == StepResult(0, [], [])
    executor.stop()
    wanted = [("forward", 0), ("sample", 0), ("forward", 1), ("sample", 1), ("wait", 0)]
    assert device.calls[2:] == wanted and device.threads == {threading.current_thread().name}


@pytest.mark.parametrize("where", ["forward", "sample", "wait"])
def test_a_device_that_cannot_go_on(made: tuple[Device, InprocExecutor], where: str) -> None:
    device, executor = made

    def hook(name: str, step: int) -> None:
        if name == where:
            raise EngineError("The GPU failed: lost")

    device.hook = hook
    executor.start(lambda phase, share, note: None)
    executor.forward(plan(0))
    executor.sample(0, None)
    with pytest.raises(EngineError, match=r"^The GPU failed: lost$"):
        executor.collect(5.0)


def test_any_other_exception_is_an_engine_error_that_says_which(made: tuple[Device, InprocExecutor]) -> None:
    device, executor = made
    executor.start(lambda phase, share, note: None)

    def hook(name: str, step: int) -> None:
        raise KeyError(step)

    device.hook = hook
    executor.forward(plan(77))
    with pytest.raises(EngineError, match="KeyError: 77") as caught:
        executor.collect(5.0)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_start_that_fails_reaches_the_caller_as_it_is(made: tuple[Device, InprocExecutor]) -> None:
    device, executor = made

    def hook(name: str, step: int) -> None:
        raise StartupError("too small")

    device.hook = hook
    with pytest.raises(StartupError, match="too small"):
        executor.start(lambda phase, share, note: None)
    executor.stop()


def test_stop_ends_the_thread_and_may_come_twice() -> None:
    executor = InprocExecutor(Device(1))
    executor.start(lambda phase, share, note: None)
    executor.forward(plan(0))
    executor.stop()
    executor.stop()
    assert "device" not in {thread.name for thread in threading.enumerate()}

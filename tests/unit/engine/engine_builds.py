"""What engine processes of the tests run; a module of its own, because the processes import it.

Run as a program it is an API process: `python engine_builds.py BUILD [--leave]` starts an engine, prints its pid, opens
endless streams, and stays until it is killed, or leaves without a word.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from functools import partial

from engine_support import VOCAB, request, token_at

from saddle.engine.client import EngineClient
from saddle.engine.core import EngineCore
from saddle.engine.scheduler import Limits, Scheduler
from saddle.errors import EngineError, StartupError
from saddle.executor.base import DeviceInfo, ProgressFn
from saddle.executor.fake import FakeExecutor, from_function
from saddle.protocol import StepPlan, StepResult

LENGTH = 100_000


class BrokenExecutor(FakeExecutor):
    """Its third step is its last."""

    def collect(self, timeout_s: float | None) -> StepResult | None:
        if self.num_steps == 2:
            raise EngineError("the device fell over")
        return super().collect(timeout_s)


class CountingExecutor(FakeExecutor):
    """Its first step ends in an error that says how many objects the collector passes over."""

    def collect(self, timeout_s: float | None) -> StepResult | None:
        raise EngineError(f"{gc.get_freeze_count()} objects")


def build(
    on_progress: ProgressFn, step_s: float = 0.001, make: type[FakeExecutor] = FakeExecutor
) -> tuple[EngineCore, DeviceInfo]:
    def duration(plan: StepPlan) -> float:
        return step_s

    device = make(from_function(token_at), num_blocks=20_000, block_size=16, max_model_len=LENGTH, vocab_size=VOCAB,
                  step_s=duration, verify=False)  # fmt: skip
    info = device.start(on_progress)
    limits = Limits(num_blocks=info.num_blocks, block_size=info.block_size, vocab_size=VOCAB, max_model_len=LENGTH,
                    max_num_seqs=32, max_num_batched_tokens=512)  # fmt: skip
    return EngineCore(device, Scheduler(limits, frozenset({1}))), info


def build_slowly(on_progress: ProgressFn) -> tuple[EngineCore, DeviceInfo]:
    on_progress("loading", 0.25, "weights")
    time.sleep(30)
    return build(on_progress)


def build_in_two_phases(on_progress: ProgressFn) -> tuple[EngineCore, DeviceInfo]:
    on_progress("loading", 0.5, "weights")
    time.sleep(0.3)
    return build(on_progress)


def build_wrongly(on_progress: ProgressFn) -> tuple[EngineCore, DeviceInfo]:
    raise StartupError("The context does not fit; 1024 would.")


def build_and_crash(on_progress: ProgressFn) -> tuple[EngineCore, DeviceInfo]:
    raise ValueError("a bug")


build_broken = partial(build, make=BrokenExecutor)
build_counting = partial(build, make=CountingExecutor)
build_hanging = partial(build, step_s=60.0)


async def main(name: str, leave: bool) -> None:
    client = await EngineClient.start(globals()[name])
    print(client._child.process.pid, flush=True)
    if name == "build":
        await client.wait_ready()
        streams = [await client.submit(request(f"r{n}", [2 + n, 3], LENGTH - 2)) for n in range(4)]
        for stream in streams:
            await stream.__anext__()
    print("running", flush=True)
    if not leave:
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], "--leave" in sys.argv))

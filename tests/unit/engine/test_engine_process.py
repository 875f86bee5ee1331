"""The two processes: how they talk, and how each of them ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import engine_builds
import psutil
import pytest
from engine_builds import LENGTH
from engine_support import VOCAB, expected, request

from saddle.engine.client import EngineClient, TokenStream, describe_exit, merge
from saddle.engine.process import BuildCore
from saddle.errors import EngineDead, InvalidRequest, StartupError, Unavailable
from saddle.protocol import FinishReason, TokenDelta, TokenLogprobs

PROMPT = list(range(2, 12))


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are made; short, as the paths of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


@asynccontextmanager
async def running(build: BuildCore = engine_builds.build) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(build)
    try:
        await client.wait_ready()
        yield client
    finally:
        await client.stop(5.0)


async def read(stream: TokenStream) -> tuple[list[int], TokenDelta]:
    ids, last = [], None
    async for delta in stream:
        assert last is None
        ids += delta.token_ids
        last = delta if delta.finish_reason else None
    assert last is not None
    return ids, last


async def eventually(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


def pid_of(client: EngineClient) -> int:
    pid = client._child.process.pid
    assert pid is not None
    return pid


async def hung(client: EngineClient) -> None:
    """Wait until the engine of `build_hanging` waits for its device: after the first step, before its result."""
    await eventually(lambda: client.stats.num_steps == 1)
    await asyncio.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------------


async def test_tokens_come_back_and_nothing_is_left_behind(folder: Path) -> None:
    async with running() as client:
        ready = await client.wait_ready()
        assert (ready.num_blocks, ready.block_size) == (20_000, 16)
        assert (ready.vocab_size, ready.max_model_len) == (VOCAB, LENGTH)
        assert client.state.phase == "ready"
        assert ready.lines == ["The device answers from a script, with 20000 blocks of 16 tokens."]
        assert is_empty(folder), "the socket's file is gone as soon as both are connected"
        streams = [await client.submit(request(f"r{n}", [2 + n, *PROMPT], 40)) for n in range(40)]
        for n, (ids, last) in enumerate(await asyncio.gather(*map(read, streams))):
            assert (ids, last.finish_reason) == (expected([2 + n, *PROMPT], 40), FinishReason.LENGTH)
        assert client._streams == {} and client._answers == {}
        await eventually(lambda: client.stats.num_running == 0)
        assert client.stats.num_generated_tokens == 1600
        pid = pid_of(client)
    assert not psutil.pid_exists(pid)
    assert client._child.process.exitcode == 0
    assert await client.wait_dead() == "The engine was stopped."
    assert is_empty(folder)


async def test_progress_is_seen_and_requests_wait_for_ready() -> None:
    client = await EngineClient.start(engine_builds.build_in_two_phases)
    with pytest.raises(Unavailable, match="The model is loading"):
        await client.submit(request("a", PROMPT))
    await eventually(lambda: client.state.phase == "loading")
    assert (client.state.share, client.state.note, client.state.ready) == (0.5, "weights", None)
    await client.wait_ready()
    await client.stop()
    with pytest.raises(Unavailable, match="The engine was stopped"):
        await client.submit(request("a", PROMPT))


async def test_a_start_that_cannot_work_says_why(folder: Path) -> None:
    client = await EngineClient.start(engine_builds.build_wrongly)
    with pytest.raises(StartupError, match=r"The context does not fit; 1024 would\."):
        await client.wait_ready()
    assert await client.wait_dead() == "The context does not fit; 1024 would."
    assert client._child.process.exitcode == 1
    assert is_empty(folder)


async def test_a_crash_at_start_is_no_startup_error(capfd: pytest.CaptureFixture[str]) -> None:
    client = await EngineClient.start(engine_builds.build_and_crash)
    with pytest.raises(EngineDead, match="The engine failed \\(ValueError\\)"):
        await client.wait_ready()
    await client.wait_dead()
    assert "a bug" in capfd.readouterr().err


async def test_kill_9_of_the_engine_ends_every_stream_within_a_second(folder: Path) -> None:
    async with running() as client:
        streams = [await client.submit(request(f"r{n}", PROMPT, LENGTH - 20)) for n in range(20)]
        readers = [asyncio.ensure_future(read(stream)) for stream in streams]
        await eventually(lambda: client.stats.num_generated_tokens > 100)
        killed = time.monotonic()
        os.kill(pid_of(client), signal.SIGKILL)
        for _, last in await asyncio.gather(*readers):
            assert last.finish_reason is FinishReason.ERROR
            assert last.error == "The engine process was ended by SIGKILL."
        assert time.monotonic() - killed < 1.0
        assert await client.wait_dead() == "The engine process was ended by SIGKILL."
        with pytest.raises(Unavailable):
            await client.submit(request("late", PROMPT))
        with pytest.raises(EngineDead):
            await client.wait_ready()
        client.abort("r0")
        client.reset_cache()
    assert is_empty(folder)


async def test_a_submit_under_way_fails_when_the_engine_dies() -> None:
    async with running(engine_builds.build_hanging) as client:
        await client.submit(request("a", PROMPT))
        await hung(client)
        waiting = [asyncio.ensure_future(client.submit(request(f"r{n}", PROMPT))) for n in range(3)]
        await asyncio.sleep(0.1)
        os.kill(pid_of(client), signal.SIGKILL)
        for each in waiting:
            with pytest.raises(Unavailable, match="SIGKILL"):
                await each
        assert client._streams == {} and client._answers == {}


async def test_a_device_that_breaks_ends_the_process_with_its_error() -> None:
    async with running(engine_builds.build_broken) as client:
        _, last = await read(await client.submit(request("a", PROMPT, 50)))
        assert (last.finish_reason, last.error) == (FinishReason.ERROR, "The engine failed: the device fell over")
        assert await client.wait_dead() == "The engine failed: the device fell over"
        assert client._child.process.exitcode == 1


async def test_what_the_start_made_is_not_walked_in_steps() -> None:
    """A full collection of what torch brings along takes as long as many steps."""
    async with running(engine_builds.build_counting) as client:
        await client.submit(request("a", PROMPT, 50))
        message = await client.wait_dead()
        assert int(message.split()[-2]) > 10_000, message


def start_parent(build: str, *args: str) -> tuple[subprocess.Popen[str], int]:
    """An API process of its own; returns it and the pid of its engine."""
    program = [sys.executable, engine_builds.__file__, build, *args]
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "running\n"
    parent.stdout.close()
    return parent, pid


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_unnoticed(pid: int) -> None:
    """The sockets learn of it, the event loop does not."""
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)


def assert_gone_soon(pids: list[int]) -> None:
    end = time.monotonic() + 2.0
    while not all(map(is_gone, pids)):
        assert time.monotonic() < end, "an orphan"
        time.sleep(0.005)


@pytest.mark.parametrize(("build", "after_s"), [("build", 0.0), ("build_slowly", 0.0), ("build_slowly", 0.8)])
def test_kill_9_of_the_parent_ends_the_engine(folder: Path, build: str, after_s: float) -> None:
    """Under load; before it said anything; and in the middle of `build`, when nothing reads its socket."""
    parent, pid = start_parent(build)
    children = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    assert pid in children
    time.sleep(after_s)
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    assert_gone_soon(children)
    assert is_empty(folder)


@pytest.mark.parametrize("build", ["build", "build_slowly"])
def test_a_parent_that_leaves_without_a_word_takes_the_engine_along(folder: Path, build: str) -> None:
    parent, pid = start_parent(build, "--leave")
    assert parent.wait(5) == 0
    assert_gone_soon([pid])
    assert is_empty(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_for_the_whole_group_do_not_end_the_engine(number: signal.Signals) -> None:
    async with running() as client:
        stream = await client.submit(request("a", PROMPT, 100))
        os.kill(pid_of(client), number)
        assert (await read(stream))[0] == expected(PROMPT, 100)


async def test_stop_ends_open_streams_and_kills_an_engine_that_hangs() -> None:
    client = await EngineClient.start(engine_builds.build_hanging)
    await client.wait_ready()
    stream = await client.submit(request("a", PROMPT))
    await hung(client)
    began = time.monotonic()
    await client.stop(0.2)
    assert time.monotonic() - began < 2.0
    assert (await read(stream))[1].error == "The engine was stopped."
    assert client._child.process.exitcode == -signal.SIGKILL


async def test_stop_does_not_wait_for_an_engine_that_loads(folder: Path) -> None:
    client = await EngineClient.start(engine_builds.build_slowly)
    await eventually(lambda: client.state.phase == "loading")
    began = time.monotonic()
    await client.stop()
    assert time.monotonic() - began < 1.0
    with pytest.raises(EngineDead, match="The engine was stopped"):
        await client.wait_ready()
    assert is_empty(folder)


async def test_a_submit_before_the_death_is_noticed() -> None:
    async with running() as client:
        kill_unnoticed(pid_of(client))
        assert client.state.dead is None
        client.reset_cache()
        with pytest.raises(Unavailable, match="SIGKILL"):
            await asyncio.wait_for(client.submit(request("a", PROMPT)), 1.0)


async def test_an_idle_engine_does_not_spin() -> None:
    async with running() as client:
        await read(await client.submit(request("a", PROMPT, 20)))
        process = psutil.Process(pid_of(client))
        await asyncio.sleep(0.1)
        before = process.num_ctx_switches().voluntary
        await asyncio.sleep(0.5)
        assert process.num_ctx_switches().voluntary - before < 10


# ---------------------------------------------------------------------------------------------------------------


async def test_refusals_are_exceptions_by_their_status() -> None:
    async with running() as client:
        with pytest.raises(InvalidRequest, match="between 0 and 63") as raised:
            await client.submit(request("a", [VOCAB]))
        assert raised.value.param == "prompt"
        stream = await client.submit(request("a", PROMPT, 400))
        with pytest.raises(InvalidRequest, match="is running already"):
            await client.submit(request("a", PROMPT))
        assert (await read(stream))[0] == expected(PROMPT, 400)
        assert client._streams == {}


async def test_abort_and_finish_end_the_stream_and_free_the_request() -> None:
    async with running() as client:
        aborted = await client.submit(request("aborted", PROMPT, LENGTH - 20))
        finished = await client.submit(request("finished", [9] * 40, LENGTH - 50))
        await aborted.__anext__()
        await finished.__anext__()
        client.abort("aborted")
        client.finish("finished", FinishReason.STOP, 1)
        assert (await read(aborted))[1].finish_reason is FinishReason.ABORT
        assert (await read(finished))[1].finish_reason is FinishReason.STOP
        await eventually(lambda: client.stats.num_running == 0)
        stats = client.stats
        assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
        assert stats.num_cached_blocks > 0
        client.reset_cache()
        await eventually(lambda: client.stats.num_cached_blocks == 0)


async def test_a_cancelled_submit_is_aborted() -> None:
    async with running() as client:
        task = asyncio.ensure_future(client.submit(request("a", PROMPT, LENGTH - 20)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client._streams == {} and client._answers == {}
        ids, _ = await read(await client.submit(request("b", PROMPT, 5)))
        assert ids == expected(PROMPT, 5)
        await eventually(lambda: client.stats.num_running == 0)


async def test_a_slow_reader_gets_merged_deltas() -> None:
    async with running() as client:
        stream = await client.submit(request("a", PROMPT, 50, logprobs=1))
        await eventually(lambda: client.stats.num_generated_tokens == 50)
        deltas = [delta async for delta in stream]
        assert len(deltas) == 1
        assert deltas[0].token_ids == expected(PROMPT, 50)
        assert [entry.token_id for entry in deltas[0].logprobs or ()] == expected(PROMPT, 50)
        assert deltas[0].finish_reason is FinishReason.LENGTH
        assert deltas[0].queued_s is not None


def test_merging_keeps_what_only_one_of_the_two_has() -> None:
    logprob = TokenLogprobs(3, -1.0, 1, [])
    first = TokenDelta(request_id="a", token_ids=[1], num_cached_tokens=8, queued_s=0.5, prompt_logprobs=[None])
    then = TokenDelta(request_id="a", token_ids=[3], logprobs=[logprob], finish_reason=FinishReason.STOP,
                      stop_token_id=3)  # fmt: skip
    assert merge(first, then) == TokenDelta(
        request_id="a", token_ids=[1, 3], logprobs=[logprob], finish_reason=FinishReason.STOP, stop_token_id=3,
        num_cached_tokens=8, queued_s=0.5, prompt_logprobs=[None],
    )  # fmt: skip


def test_exit_codes_are_told_apart() -> None:
    assert describe_exit(-11) == "The engine process was ended by SIGSEGV."
    assert describe_exit(3) == "The engine process ended with exit code 3."

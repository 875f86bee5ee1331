"""The engine process: how it is spawned, what it runs, how it ends.

One zmq PAIR over a unix socket in a private folder joins the two processes; the folder vanishes as soon as both are
connected, so that no way of dying leaves anything behind. Each side learns of the other's end through a pipe that
the kernel closes: the client watches `Child.process.sentinel`, the engine its parent's.

The engine ignores SIGINT and SIGTERM: a terminal or a service manager sends them to all processes at once, and it is
the API process that decides when a drain is over. It ends on `Shutdown`, and when the API process is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util  # its exit handler must be registered before ours, to run after it
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import msgspec
import zmq

from saddle.engine.core import EngineCore
from saddle.errors import EngineError, StartupError
from saddle.executor.base import DeviceInfo, ProgressFn
from saddle.protocol import (
    Abort,
    Deltas,
    EngineFailed,
    EngineReady,
    Finish,
    FromEngine,
    Progress,
    ResetCache,
    Shutdown,
    Submit,
    ToEngine,
)

logger = logging.getLogger(__name__)

# Called in the engine process: starts the executor and returns the core and what the executor found.
BuildCore = Callable[[ProgressFn], "tuple[EngineCore, DeviceInfo]"]

MAX_ADDRESS_BYTES = 100  # a unix socket's path holds 107
COMPILE_POLL_MS = 2
LINGER_MS = 1000


def open_socket(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """A socket that never makes its sender wait."""
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    return socket


# ---------------------------------------------------------------------------------------------------------------
# in the API process


@dataclass(slots=True)
class Child:
    """An engine process and the socket to it."""

    process: SpawnProcess
    context: zmq.Context[zmq.Socket[bytes]]
    socket: zmq.Socket[bytes]
    folder: Path

    def hide_socket(self) -> None:
        """Remove the socket's file; connections that exist stay."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self) -> None:
        """For an interpreter that exits without `stop`: it would wait for the engine, for ever."""
        self.process.kill()
        self.hide_socket()

    def close(self) -> int | None:
        """Give everything back after the process ended. Returns its exit code."""
        self.process.join()
        atexit.unregister(self.abandon)
        self.socket.close()
        self.context.term()
        self.hide_socket()
        return self.process.exitcode


def make_folder() -> Path:
    """A new private folder whose path leaves room for a socket's name."""
    folder = Path(tempfile.mkdtemp(prefix="saddle-"))
    if len(os.fsencode(folder / "engine")) > MAX_ADDRESS_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="saddle-", dir="/tmp"))
    return folder


def spawn(build: BuildCore, name: str) -> Child:
    """Start the engine process; it may take long until it says anything."""
    folder = make_folder()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = open_socket(context)
    try:
        address = f"ipc://{folder / 'engine'}"
        socket.bind(address)
        process = multiprocessing.get_context("spawn").Process(
            target=run_engine, args=(build, address, folder), name=name, daemon=False
        )
        process.start()
    except BaseException:
        socket.close()
        context.term()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    child = Child(process, context, socket, folder)
    atexit.register(child.abandon)
    return child


# ---------------------------------------------------------------------------------------------------------------
# in the engine process


class Link:
    """The engine's end of the socket: whole messages in and out."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = open_socket(self._context)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self, timeout_ms: int | None) -> list[ToEngine]:
        """All messages that are there; waits for the first one, for ever with None."""
        messages: list[ToEngine] = []
        if timeout_ms != 0 and not self._socket.poll(timeout_ms):
            return messages
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
        return messages

    def close(self) -> None:
        """Send what is queued, then close."""
        self._socket.close()
        self._context.term()


def watch_parent(folder: Path) -> None:
    """End this process when its parent does, whatever it is doing then."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def run_engine(build: BuildCore, address: str, folder: Path) -> None:
    """Main function of the engine process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch_parent(folder)
    link = Link(address)
    ended_well = _run(build, link)
    link.close()
    if not ended_well:
        # Threads of a broken device may never end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _run(build: BuildCore, link: Link) -> bool:
    """Build and serve until Shutdown; what goes wrong is the last message sent. Returns whether all went well."""
    core: EngineCore | None = None
    try:
        link.send(Progress("starting", 0.0))
        core, info = build(lambda phase, share, note: link.send(Progress(phase, share, note)))
        gc.collect()
        gc.freeze()  # what the libraries made lives for ever; walking it would hold up steps for their own time
        link.send(EngineReady(info.max_model_len, info.block_size, info.num_blocks, info.vocab_size, info.lines))
        serve(core, link)
        return True
    except StartupError as error:
        link.send(EngineFailed(str(error), startup=True))
    except EngineError as error:
        logger.exception("The engine failed.")
        link.send(EngineFailed(f"The engine failed: {error}"))
    except Exception as error:
        logger.exception("The engine failed.")
        link.send(EngineFailed(f"The engine failed ({type(error).__name__}); its log says where."))
    finally:
        if core is not None:
            core.stop()
    return False


def serve(core: EngineCore, link: Link) -> None:
    """Step while there is work, wait on the socket while there is none; until `Shutdown`."""
    while True:
        messages = link.receive(0 if core.has_work else COMPILE_POLL_MS if core.is_compiling else None)
        for message in messages:
            if isinstance(message, Shutdown):
                return
            apply(core, message)
        for answer in core.answers():
            link.send(answer)
        if core.has_work:
            link.send(Deltas(core.step(), core.stats))
        elif messages:
            link.send(Deltas([], core.stats))


def apply(core: EngineCore, message: Submit | Abort | Finish | ResetCache) -> None:
    if isinstance(message, Submit):
        core.submit(message.request)
    elif isinstance(message, Abort):
        core.abort(message.request_ids)
    elif isinstance(message, Finish):
        core.finish(message.request_id, message.reason, message.num_tokens)
    else:
        core.reset_cache()

"""Compiling where it can be killed: a process that tries grammars before the engine compiles them.

A grammar may take minutes or gigabytes, or bring the compiler down, and a thread cannot be stopped. So each one is
compiled here first, under limits; what passes is compiled again by the engine, which takes as long and cannot fail in
another way. Sending the compiled grammar over costs several times more than to compile it twice.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from saddle.errors import EngineError, InvalidRequest
from saddle.grammar.compiler import load_xgrammar

START_S = 120.0
NUM_THREADS = min(8, os.cpu_count() or 1)


class Vocabulary(msgspec.Struct, frozen=True):
    """The bytes of each id, empty for those that no text contains; ids of `stops` end an output."""

    tokens: list[bytes]
    stops: list[int]


class Trier:
    """One process that compiles; started on first use and again after it was killed. For one thread at a time, but
    for `kill`.

    Args:
        max_compile_s: seconds after which a compilation is given up.
        max_memory_bytes: what a compilation may add to the process.
    """

    def __init__(self, vocabulary: Vocabulary, max_compile_s: float, max_memory_bytes: int) -> None:
        self._vocabulary = vocabulary
        self._max_compile_s, self._max_memory_bytes = max_compile_s, max_memory_bytes
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """Start the process if it does not run, and wait until it can compile.

        Raises:
            EngineError: it does not come up.
        """
        if self._process is not None and self._process.is_alive():
            return
        self.stop()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._vocabulary, self._max_memory_bytes)
        process = context.Process(target=run, args=arguments, name="saddle-grammar", daemon=True)
        process.start()
        self._process = process  # not before it runs: another thread may kill it at any time
        theirs.close()
        try:
            answer = self._receive(START_S)
        except TimeoutError:
            answer = None
        if answer != "":
            self.stop()
            raise EngineError("The process that compiles grammars did not start.")

    def try_out(self, source: str, param: str | None) -> None:
        """Compile a structural tag and forget the result.

        Raises:
            InvalidRequest: it is wrong, or takes more time or memory than is allowed.
        """
        self.start()
        assert self._pipe is not None
        why = "takes too much memory"
        try:
            self._pipe.send(source)
            error = self._receive(self._max_compile_s)
        except TimeoutError:
            error, why = None, f"takes longer than {self._max_compile_s:g} s"
        except OSError:
            error = None
        if error is None:
            self.stop()
            raise InvalidRequest(f"The grammar is too complex: compiling it {why}. Make it smaller, with fewer"
                                 " alternatives and smaller repetition counts.", param)  # fmt: skip
        if error:
            raise InvalidRequest(f"The grammar cannot be compiled: {error}", param)

    def kill(self) -> None:
        """End the process from any thread: the one that waits for it sees that. Only that one may close the pipe, or it
        is closed twice, the second time perhaps when its number is another file's."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """End the process and forget it. Safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _receive(self, timeout_s: float) -> str | None:
        """What the process answers; None if it ended. Raises TimeoutError if it does not answer in time."""
        assert self._pipe is not None
        try:
            if not self._pipe.poll(timeout_s):
                raise TimeoutError
            return str(self._pipe.recv())
        except (EOFError, ConnectionError):
            return None


def message_of(error: BaseException) -> str:
    """The compiler's words without its place in the compiler's source."""
    text = str(error).strip().splitlines()
    last = text[-1] if text else type(error).__name__
    return last.split(": ", 1)[-1] if last.startswith("[") else last


# ---------------------------------------------------------------------------------------------------------------
# in the process


def run(pipe: Connection, vocabulary: Vocabulary, max_memory_bytes: int) -> None:
    """Main function of the process: an empty answer for a grammar that compiles, else why it does not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
    xgrammar = load_xgrammar(alone=True)
    info = xgrammar.TokenizerInfo(
        vocabulary.tokens, xgrammar.VocabType.RAW, vocab_size=len(vocabulary.tokens), stop_token_ids=vocabulary.stops
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=NUM_THREADS, cache_enabled=False)
    limit_memory(max_memory_bytes)
    pipe.send("")
    with contextlib.suppress(EOFError):
        while True:
            source = pipe.recv()
            try:
                compiler.compile_structural_tag(source)
                pipe.send("")
            except MemoryError:
                return
            except Exception as error:
                if "bad_alloc" in str(error):
                    return
                pipe.send(message_of(error) or type(error).__name__)


def limit_memory(num_bytes: int) -> None:
    """Let this process grow by so many bytes and no more."""
    with open("/proc/self/statm") as pages:
        size = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + num_bytes, size + num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

"""Structured output through xgrammar: compiles grammars beside the engine's loop and says which ids may come next.

Compiling never happens in the thread of the engine: `compile` returns a future. A grammar is first tried in a process
that can be killed (`worker.py`), then compiled in a thread with the interpreter's lock released. Compiled grammars are
kept, the least recently used go first; grammars that were refused are remembered too.

Ids and text: the four tags of M2 exist as tokens, and only as tokens do they mean something. In the vocabulary that
the compiler sees they carry a byte that no text contains, so a grammar for text never allows them, not even inside a
string that spells one; grammars for calls ask for them by id. All other control tokens, and ids that pad the
vocabulary, are never allowed.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from saddle.errors import EngineError, InvalidRequest, Overloaded
from saddle.grammar.compiler import load_xgrammar
from saddle.grammar.spec import to_compile
from saddle.grammar.worker import NUM_THREADS, Trier, Vocabulary, message_of
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import GrammarSpec

Bits = npt.NDArray[np.int32]
xgrammar: Any = load_xgrammar()
NO_TEXT = b"\xff"  # begins no UTF-8 character
NUM_TRIERS = 2  # so that one slow grammar leaves a way for the others
MAX_QUEUED = 64
MAX_KEPT = 1024  # grammars, refused ones included
FREE_S, FREE_S_PER_TOKEN = 1.0, 0.01  # what a request may take of the engine's time for its masks


class Compiled:
    """A compiled grammar. `may_call`: whether it can begin with a tool call."""

    __slots__ = ("grammar", "may_call", "num_bytes")

    def __init__(self, grammar: Any, may_call: bool) -> None:
        self.grammar, self.may_call = grammar, may_call
        self.num_bytes = int(grammar.memory_size_bytes)


class State:
    """Where one request stands in its grammar; begins before its first generated token."""

    __slots__ = ("after_token_id", "ended", "matcher", "may_call", "num_fills", "num_thought", "room", "spent_s")

    def __init__(self, compiled: Compiled, spec: GrammarSpec) -> None:
        self.matcher = xgrammar.GrammarMatcher(compiled.grammar)
        self.may_call = compiled.may_call
        self.after_token_id = spec.after_token_id  # None once the grammar binds
        self.room = spec.max_thinking_tokens
        self.num_thought = 0
        self.ended = False
        self.num_fills, self.spent_s = 0, 0.0


class XGrammarBackend:
    """Grammars for one vocabulary. `fill` and `accept` belong to one thread, `compile` to any.

    Args:
        vocab_size: ids of the model, padding included.
        eos_ids: ids that end an output; allowed where the grammar is complete.
        max_compile_s: a grammar that takes longer is refused.
        max_schema_bytes: a longer source is refused.
        max_cached_bytes: of compiled grammars kept; one alone that needs more is refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Iterable[int],
        *,
        max_compile_s: float = 10.0,
        max_schema_bytes: int = 1 << 20,
        max_cached_bytes: int = 256 << 20,
        max_memory_bytes: int = 2 << 30,
    ) -> None:
        self.vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._calls_id = tokenizer.calls_id
        self._max_schema_bytes, self._max_cached_bytes = max_schema_bytes, max_cached_bytes
        vocabulary = Vocabulary(token_bytes(tokenizer, vocab_size), sorted(self._eos_ids))
        self._limits = (vocabulary, max_compile_s, max_memory_bytes)
        self._lock = threading.Lock()
        self._triers: list[Trier] = []
        self._of_thread = threading.local()
        self._pool = ThreadPoolExecutor(NUM_TRIERS, "grammar")
        self._pool.submit(self._trier)  # a process takes its time to start: before the first request, not in it
        self._info = xgrammar.TokenizerInfo(
            vocabulary.tokens, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=vocabulary.stops
        )
        self._compiler = xgrammar.GrammarCompiler(self._info, max_threads=NUM_THREADS, cache_enabled=False)
        self._make_masks(vocabulary)
        self._kept: OrderedDict[str, Future[Compiled]] = OrderedDict()
        self._num_queued = 0

    def _make_masks(self, vocabulary: Vocabulary) -> None:
        """Fixed masks, and the row that `fill` writes to."""
        self._row: Bits = np.empty((self.vocab_size + 31) // 32, dtype=np.int32)
        real = {i for i, token in enumerate(vocabulary.tokens) if token} | self._eos_ids
        self._real = self._bits(real)
        # While the model thinks all is free, but not to end without an answer, nor to slip into a call that the
        # grammar does not provide for: readers of the output end the thinking there.
        self._thinking = self._bits(real - self._eos_ids - {self._calls_id}).tobytes()
        self._thinking_may_call = self._bits(real - self._eos_ids).tobytes()
        self._only_end = self._bits(self._eos_ids).tobytes()

    def _bits(self, ids: Iterable[int]) -> Bits:
        flags = np.zeros(len(self._row) * 32, dtype=np.uint8)
        flags[list(ids)] = 1
        return np.packbits(flags, bitorder="little").view(np.int32)

    # compiling ---------------------------------------------------------------------------------------------------

    def compile(self, spec: GrammarSpec) -> Future[State]:
        """Start compiling, without blocking; the result is a fresh state.

        The future fails with InvalidRequest for a grammar that is wrong, too large or too slow to compile.

        Raises:
            InvalidRequest: the spec is of no known kind, or its source is too long.
            Overloaded: too many others are being compiled.
        """
        param = spec.param or "grammar"
        size = len(spec.source.encode())
        if size > self._max_schema_bytes:
            raise InvalidRequest(f"{param} must be at most {self._max_schema_bytes} bytes, got {size}.", param)
        if spec.after_token_id is not None and not 0 <= spec.after_token_id < self.vocab_size:
            raise InvalidRequest(f"There is no token {spec.after_token_id}.", param)
        state: Future[State] = Future()

        def hand_over(compiled: Future[Compiled]) -> None:
            # The request may have been given up meanwhile.
            with suppress(InvalidStateError):
                error = compiled.exception()
                if error is None:
                    state.set_result(State(compiled.result(), spec))
                else:
                    state.set_exception(_fresh(error, param))

        self._compiled(to_compile(spec)).add_done_callback(hand_over)
        return state

    def _compiled(self, source: str) -> Future[Compiled]:
        with self._lock:
            found = self._kept.get(source)
            if found is not None:
                self._kept.move_to_end(source)
                return found
            if self._num_queued >= MAX_QUEUED:
                raise Overloaded("Too many grammars are being compiled; try again.", retry_after=1)
            self._num_queued += 1
            found = self._kept[source] = self._pool.submit(self._compile, source)
        found.add_done_callback(lambda future: self._settle(source, future))
        return found

    def _settle(self, source: str, future: Future[Compiled]) -> None:
        """Forget what failed for reasons of our own, and the oldest where all is too much."""
        with self._lock:
            self._num_queued -= 1
            if future.exception() is not None and not isinstance(future.exception(), InvalidRequest):
                self._kept.pop(source, None)
            sizes = {key: kept.result().num_bytes for key, kept in self._kept.items()
                     if kept.done() and kept.exception() is None}  # fmt: skip
            total = sum(sizes.values())
            for key in list(self._kept):
                if total <= self._max_cached_bytes and len(self._kept) <= MAX_KEPT:
                    break
                if self._kept[key].done():
                    del self._kept[key]
                    total -= sizes.get(key, 0)

    @property
    def num_cached_bytes(self) -> int:
        """Bytes of the compiled grammars that are kept."""
        with self._lock:
            done = [kept for kept in self._kept.values() if kept.done() and kept.exception() is None]
        return sum(kept.result().num_bytes for kept in done)

    def _compile(self, source: str) -> Compiled:
        """Runs in a thread of the pool."""
        self._trier().try_out(source, None)
        try:
            grammar = self._compiler.compile_structural_tag(source)
        except Exception as error:  # the compiler raises many kinds; the same passed a moment ago
            raise InvalidRequest(f"The grammar cannot be compiled: {message_of(error)}") from None
        row = np.full_like(self._row, -1)
        xgrammar.GrammarMatcher(grammar).fill_next_token_bitmask(row)
        row &= self._real
        if not row.any():
            raise InvalidRequest("The grammar matches nothing.")
        may_call = bool(row[self._calls_id // 32] >> (self._calls_id % 32) & 1)
        compiled = Compiled(grammar, may_call)
        if compiled.num_bytes > self._max_cached_bytes:
            raise InvalidRequest(f"The grammar needs {compiled.num_bytes >> 20} MiB compiled; at most"
                                 f" {self._max_cached_bytes >> 20} are allowed.")  # fmt: skip
        return compiled

    def _trier(self) -> Trier:
        """The trier of this thread, running."""
        trier: Trier | None = getattr(self._of_thread, "trier", None)
        if trier is None:
            trier = self._of_thread.trier = Trier(*self._limits)
            with self._lock:
                self._triers.append(trier)
        trier.start()
        return trier

    def close(self) -> None:
        """End threads and processes; what is being compiled fails."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            triers = list(self._triers)
        for trier in triers:
            trier.kill()  # so that no thread waits for one
        self._pool.shutdown(wait=True)
        for trier in self._triers:  # their threads are gone
            trier.stop()
        self._triers.clear()

    # masks -------------------------------------------------------------------------------------------------------

    def fill(self, state: State) -> bytes:
        """The ids that may come next: little-endian bits, 4 * ceil(vocab_size / 32) bytes.

        While the model thinks all ids are allowed but those that would end the thinking without passing the grammar:
        EOS, and the begin of a call where the grammar does not begin with one. Once it has thought as much as it may,
        only the end of thinking is allowed.

        Raises:
            EngineError: the masks of this request take too long.
        """
        if state.after_token_id is not None:
            if state.room is not None and state.num_thought >= state.room:
                return self._bits([state.after_token_id]).tobytes()
            return self._thinking_may_call if state.may_call else self._thinking
        if state.ended:
            return self._only_end
        began = time.perf_counter()
        self._row.fill(-1)
        state.matcher.fill_next_token_bitmask(self._row)
        self._row &= self._real
        state.num_fills += 1
        self._spend(state, began)
        return self._row.tobytes()

    def accept(self, state: State, token_id: int) -> None:
        """Advance by one generated id. Raises ValueError if the grammar does not allow it."""
        if state.after_token_id is not None:
            if token_id == state.after_token_id:
                state.after_token_id = None
                return
            if token_id != self._calls_id or not state.may_call:
                state.num_thought += 1
                return
            state.after_token_id = None
        if state.ended:
            if token_id not in self._eos_ids:
                raise ValueError(f"token {token_id} follows the end of the output")
            return
        began = time.perf_counter()
        if not state.matcher.accept_token(token_id):
            raise ValueError(f"the grammar does not allow token {token_id}")
        state.ended = state.matcher.is_terminated()
        self._spend(state, began)

    def _spend(self, state: State, began: float) -> None:
        """An ambiguous grammar may get slower with each token: it must not hold up the other requests."""
        state.spent_s += time.perf_counter() - began
        if state.spent_s > FREE_S + FREE_S_PER_TOKEN * state.num_fills:
            raise EngineError(f"Its masks took {state.spent_s:.1f} s for {state.num_fills} tokens.")


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that the compiler takes each id for; empty for ids that no text contains."""
    tokens = [tokenizer.raw(token_id) for token_id in range(vocab_size)]
    for token_id in (tokenizer.think_id, tokenizer.end_think_id, tokenizer.calls_id, tokenizer.end_calls_id):
        tokens[token_id] = NO_TEXT + tokens[token_id]
    for token_id in tokenizer.special_ids:
        if token_id < vocab_size:
            tokens[token_id] = b""
    return tokens


def _fresh(error: BaseException, param: str) -> BaseException:
    """The refusal of a kept grammar for another request: with its own field, without the first one's traceback.

    The field is in the message too: not every API has another place for it.
    """
    return InvalidRequest(f"{param}: {error.message}", param) if isinstance(error, InvalidRequest) else error

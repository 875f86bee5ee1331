"""Messages to token ids: the chat template, piece by piece.

The rendered text is cut in front of every begin-of-message token. Control tokens stop BPE, so the ids of the pieces
are the ids of the whole, and a piece that was encoded before is looked up: of a long conversation only the new turns
cost anything. A turn that we generated ourselves enters with the ids that were sampled (`replay.py`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from saddle.errors import InvalidRequest, StartupError
from saddle.parsing.conversation import Conversation
from saddle.parsing.replay import BYTES_PER_ID, ReplayStore
from saddle.parsing.tokenizer import END, MESSAGE, Tokenizer

OWN_TEMPLATE = Path(__file__).with_name("template.jinja")
DEFAULT_IDENTITY = "You are a helpful assistant."
ASSISTANT = MESSAGE + "ai\n"
TURN_END = END + "\n"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt. `pieces` concatenate to `text`, but for turns that were replayed with their own spelling."""

    text: str
    token_ids: list[int]
    pieces: list[str]
    num_replayed: int = 0


class Renderer:
    """Renders conversations with one template and one tokenizer. Thread-safe.

    Args:
        template: jinja2 source; None is Saddle's own.
        identity: system text where a conversation has none; None is the template's own.
        replay: turns that were generated here.
        cache_bytes: memory for encoded pieces.

    Raises:
        StartupError: the template is no valid jinja2.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str | None, identity: str | None, replay: ReplayStore, cache_bytes: int
    ) -> None:
        self._tokenizer = tokenizer
        self._replay = replay
        # A template that came with a checkpoint knows its model's name; the variable would override that.
        if template is None and identity is None:
            identity = DEFAULT_IDENTITY
        self._variables = {} if identity is None else {"model_identity": identity}
        self._pieces = PieceCache(tokenizer, cache_bytes)
        source = OWN_TEMPLATE.read_text(encoding="utf-8") if template is None else template
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise StartupError(f"The chat template is not valid: {error}") from None
        self._generation_prompt = self._find_generation_prompt()

    def _find_generation_prompt(self) -> str:
        """What the template adds with `add_generation_prompt`; empty when it cannot be told."""
        probe = Conversation([{"role": "user", "content": "x"}], None)
        try:
            without, whole = (self._text(probe, asked, {}) for asked in (False, True))
        except InvalidRequest:
            return ""
        return whole[len(without) :] if whole.startswith(without) else ""

    @property
    def generation_prompt(self) -> str:
        """What a prompt ends with before the model takes over."""
        return self._generation_prompt

    def render(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        check: Callable[[str], None] | None = None,
    ) -> Rendered:
        """Text and ids of a conversation.

        Args:
            continue_final_message: leave the last turn open, so that the model goes on with it.
            template_kwargs: further variables of the template.
            check: looks at the text before it is encoded, which may take long, and may raise.

        Raises:
            InvalidRequest: the template refuses the conversation; carries its message.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest("continue_final_message and add_generation_prompt exclude each other.",
                                 "continue_final_message")  # fmt: skip
        text = self._text(conversation, add_generation_prompt, template_kwargs or {})
        if continue_final_message:
            text = text.removesuffix(TURN_END)
        if check is not None:
            check(text)
        pieces = split(text)
        replayed = self._replayed(conversation, pieces, continue_final_message)
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += replayed[number] if number in replayed else self._pieces.encode(piece)
        return Rendered(text, ids, pieces, len(replayed))

    def _text(self, conversation: Conversation, add_generation_prompt: bool, more: Mapping[str, Any]) -> str:
        variables = {**self._variables, **more}
        try:
            return self._template.render(
                messages=conversation.messages,
                tools=conversation.tools,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template is a program, and its input comes from outside
            raise InvalidRequest(f"The chat template refuses the conversation: {error}", "messages") from None

    def _replayed(self, conversation: Conversation, pieces: list[str], last_is_open: bool) -> dict[int, list[int]]:
        """Ids of the pieces that are turns generated here, by number of the piece.

        A turn is replayed where the template shows its thinking, and, when the client dropped the thinking, where the
        template would have shown it: behind the last user message. Where a template drops thinking, what was sampled
        is not what it renders.
        """
        if not self._generation_prompt.startswith(ASSISTANT) or not len(self._replay):
            return {}
        places = [n for n, piece in enumerate(pieces) if piece.startswith(ASSISTANT) and piece.endswith(TURN_END)]
        turns = [(n, m) for n, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if last_is_open and turns and turns[-1][0] == len(conversation.messages) - 1:
            turns = turns[:-1]
        if len(places) != len(turns):
            return {}  # a text holds a control token: which piece is which turn is not certain
        last_user = max((n for n, m in enumerate(conversation.messages) if m["role"] == "user"), default=-1)
        found = {}
        for place, (number, message) in zip(places, turns, strict=True):
            reasoning = message.get("reasoning_content", "")
            if not (pieces[place].startswith(self._generation_prompt) if reasoning.strip() else number > last_user):
                continue
            calls = [
                (call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in message.get("tool_calls", ())
            ]
            turn = self._replay.find(reasoning, message["content"], calls)
            if turn is not None:
                head, tail = self._pieces.encode(self._generation_prompt), self._pieces.encode("\n")
                found[place] = [*head, *turn.token_ids, *tail]
        return found


def split(text: str) -> list[str]:
    """Cut a text in front of every begin-of-message token."""
    head, *tail = text.split(MESSAGE)
    pieces = [MESSAGE + part for part in tail]
    if not pieces:
        return [head]
    pieces[0] = head + pieces[0]
    return pieces


class PieceCache:
    """Ids of encoded texts, the least recently used forgotten first."""

    def __init__(self, tokenizer: Tokenizer, max_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._known: OrderedDict[str, list[int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def encode(self, piece: str) -> list[int]:
        """Ids of a piece; the caller does not change the list.

        Raises:
            InvalidRequest: the text cannot be written in UTF-8.
        """
        with self._lock:
            ids = self._known.get(piece)
            if ids is not None:
                self._known.move_to_end(piece)
                return ids
        ids = self._tokenizer.encode(piece)
        with self._lock:
            size = self._size(piece, ids)
            if piece not in self._known and size <= self._max_bytes:
                self._known[piece] = ids
                self._num_bytes += size
                while self._num_bytes > self._max_bytes:
                    self._num_bytes -= self._size(*self._known.popitem(last=False))
        return ids

    @staticmethod
    def _size(piece: str, ids: list[int]) -> int:
        return 4 * len(piece) + BYTES_PER_ID * len(ids)


# ---------------------------------------------------------------------------------------------------------------
# jinja2 as chat templates expect it


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """Plain JSON: jinja2's own filter escapes for HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=1)
def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox that templates run in: no attribute that starts with an underscore, no change of its input."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made

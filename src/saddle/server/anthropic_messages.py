"""Anthropic's messages -> the turns that the chat template renders, and its tools -> functions.

A message of Anthropic's holds blocks of several kinds; M2's template knows system text in front, user text, the
model's turn (thinking, answer, calls) and runs of tool results. What has no place of its own:

    system messages inside the conversation stay where they are, so that the cache holds up to them: behind the user
    text or the tool results before them, marked as reminders. As a user turn of its own inside a tool loop, one would
    make the template drop the thinking of that loop
    reminders of a client beside tool results belong to these, for the same reason; other text is a user turn
    results come before the text of their message, whatever the order
    messages of one role in a row are one turn
    the billing header of Claude Code, which changes from session to session, is dropped
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saddle.errors import InvalidRequest
from saddle.server.anthropic_parts import Signer

logger = logging.getLogger(__name__)

BILLING = "x-anthropic-billing-header"
REMINDER, END_REMINDER = "<system-reminder>", "</system-reminder>"
PARAGRAPH = "\n\n"
ROLES = ("user", "assistant", "system")
# What Anthropic's own servers did for a model: this one has nothing like it, so these say nothing to it.
FOREIGN_BLOCKS = ("server_tool_use", "mcp_tool_use", "mcp_tool_result", "container_upload", "compaction")


@dataclass(slots=True)
class Turns:
    """A conversation as `parsing.conversation.normalise` takes it.

    ignored   kinds of blocks and tools that were left out, for the log
    num_foreign   thinking blocks that this server did not sign: they count as thinking all the same
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    num_foreign: int = 0

    @property
    def ends_with_answer(self) -> bool:
        """Whether the last turn is the beginning of the answer that is asked for."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"


def to_turns(system: Any, messages: Sequence[Mapping[str, Any]], signer: Signer) -> Turns:
    """Check and convert a conversation.

    Raises:
        InvalidRequest: naming the field, such as `messages.2.content.0.tool_use_id`.
    """
    reader = _Reader(signer)
    lead = [text for text in (_unbilled(text) for text in texts_of(system, "system", reader.turns)) if text]
    for number, message in enumerate(messages):
        reader.read(message, f"messages.{number}", lead)
    reader.place_waiting()
    turns = reader.turns
    for turn in turns.messages:
        _join(turn)
    if turns.ends_with_answer:
        _check_open(turns, f"messages.{len(messages) - 1}")
    if lead:
        turns.messages.insert(0, {"role": "system", "content": PARAGRAPH.join(lead)})
    return turns


def _check_open(turns: Turns, where: str) -> None:
    """An answer to be continued is text, perhaps with its thinking; an empty one is no answer yet."""
    last = turns.messages[-1]
    if last.get("tool_calls"):
        raise InvalidRequest(f"{where} ends in tool_use: the next message must bring its tool_result.", where)
    if not last["content"] and not last.get("reasoning_content"):
        turns.messages.pop()


def _join(turn: dict[str, Any]) -> None:
    """While turns are read their texts are lists of parts: a turn may be made of very many messages."""
    turn["content"] = "".join(turn["content"])
    if "reasoning_content" in turn:
        turn["reasoning_content"] = "\n".join(turn["reasoning_content"])


class _Reader:
    """Reads one message after the other into turns, whose texts `_join` puts together."""

    def __init__(self, signer: Signer) -> None:
        self.turns = Turns()
        self._signer = signer
        self._waiting: list[str] = []  # system texts behind a turn of the model: their place comes with what follows
        self._has_called = False

    def read(self, message: Mapping[str, Any], where: str, lead: list[str]) -> None:
        role = message.get("role")
        if role == "user":
            self._user(message.get("content"), f"{where}.content")
            self.place_waiting()
        elif role == "assistant":
            self.place_waiting()
            self._assistant(message.get("content"), f"{where}.content")
        elif role == "system":
            texts = texts_of(message.get("content"), f"{where}.content", self.turns)
            texts = [text for text in map(_unbilled, texts) if text]
            if not self.turns.messages:
                lead += texts
            else:
                self._waiting += map(_reminder, texts)
                if not self.turns.ends_with_answer:
                    self.place_waiting()
        else:
            require(False, f"{where}.role", f"one of {', '.join(ROLES)}", role)

    def place_waiting(self) -> None:
        """Put system texts behind the user text or the tool results that end the conversation so far."""
        texts, self._waiting = self._waiting, []
        if texts:
            self._append(PARAGRAPH.join(texts), PARAGRAPH)

    def _append(self, text: str, joint: str) -> None:
        """Text behind the user's turn or the last result; a user turn of its own behind a turn of the model."""
        if not self.turns.messages or self.turns.ends_with_answer:
            self.turns.messages.append({"role": "user", "content": [text]})
            return
        content = self.turns.messages[-1]["content"]
        content += [joint, text] if content else [text]

    def _user(self, content: Any, where: str) -> None:
        results: list[dict[str, Any]] = []
        texts: list[str] = []
        for inside, block in blocks_of(content, where):
            if block.get("type") == "tool_result":
                results.append(self._result(block, inside))
            else:
                texts += text_of(block, inside, self.turns)
        self.turns.messages += results
        if results:
            reminders = [text for text in texts if _is_reminder(text)]
            texts = [text for text in texts if not _is_reminder(text)]
            if reminders:
                self._append(PARAGRAPH.join(reminders), PARAGRAPH)
        last = self.turns.messages[-1]["role"] if self.turns.messages else None
        if last == "user" and texts:
            self._append("\n".join(texts), "\n")
        elif texts or (not results and last != "user"):
            self.turns.messages.append({"role": "user", "content": ["\n".join(texts)] if texts else []})

    def _result(self, block: Mapping[str, Any], where: str) -> dict[str, Any]:
        call_id = block.get("tool_use_id")
        require(isinstance(call_id, str) and call_id != "", f"{where}.tool_use_id", "the id of a tool_use", call_id)
        if not self._has_called:
            raise InvalidRequest(f"{where}.tool_use_id is {call_id!r}, but no message before it has a tool_use.",
                                 f"{where}.tool_use_id")  # fmt: skip
        text = "\n".join(texts_of(block.get("content"), f"{where}.content", self.turns))
        if block.get("is_error") is True and "error" not in text[:200].lower():
            text = f"Error: {text}"  # M2's tool turn has no other place for it
        return {"role": "tool", "tool_call_id": call_id, "content": [text] if text else []}

    def _assistant(self, content: Any, where: str) -> None:
        if not self.turns.ends_with_answer:
            self.turns.messages.append({"role": "assistant", "content": []})
        turn = self.turns.messages[-1]
        for inside, block in blocks_of(content, where):
            kind = block.get("type")
            if kind == "thinking":
                self._thinking(turn, block, inside)
            elif kind == "tool_use":
                turn.setdefault("tool_calls", []).append(_call(block, inside))
                self._has_called = True
            elif kind == "redacted_thinking":
                self.turns.ignored.add(kind)
            else:
                turn["content"] += text_of(block, inside, self.turns)

    def _thinking(self, turn: dict[str, Any], block: Mapping[str, Any], where: str) -> None:
        text, signature = block.get("thinking", ""), block.get("signature", "")
        require(isinstance(text, str), f"{where}.thinking", "a string", text)
        require(signature is None or isinstance(signature, str), f"{where}.signature", "a string", signature)
        sealed = self._signer.unseal(signature or "")
        if sealed is not None and not text:
            text = sealed
        elif text and sealed != text and not self._signer.is_own(text, signature or ""):
            self.turns.num_foreign += 1
        if text:
            turn.setdefault("reasoning_content", []).append(text)


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    call_id, name, arguments = (block.get(key) for key in ("id", "name", "input"))
    require(isinstance(call_id, str) and call_id != "", f"{where}.id", "a non-empty string", call_id)
    require(isinstance(name, str) and name != "", f"{where}.name", "a non-empty string", name)
    require(isinstance(arguments, dict), f"{where}.input", "an object", arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# ---------------------------------------------------------------------------------------------------------------
# blocks


def blocks_of(content: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(path, block) of each block; a string is one block of text, null is none."""
    if content is None:
        return []
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})] if content else []
    require(isinstance(content, list), where, "a string or a list of blocks", content)
    for number, block in enumerate(content):
        require(isinstance(block, dict), f"{where}.{number}", "an object with a type", block)
    return [(f"{where}.{number}", block) for number, block in enumerate(content)]


def texts_of(content: Any, where: str, turns: Turns) -> list[str]:
    """The texts of blocks that may hold nothing but text."""
    return [text for inside, block in blocks_of(content, where) for text in text_of(block, inside, turns)]


def text_of(block: Mapping[str, Any], where: str, turns: Turns) -> list[str]:
    """The text of a block, none where it is a kind that says nothing to this model.

    Raises:
        InvalidRequest: it holds an image or a binary file, or its kind has no place here.
    """
    kind = block.get("type")
    if kind == "text":
        text = block.get("text")
        require(isinstance(text, str), f"{where}.text", "a string", text)
        return [str(text)] if text else []
    if kind == "document":
        return [_document(block, where, turns)]
    if kind == "search_result":
        found = "\n".join(texts_of(block.get("content"), f"{where}.content", turns))
        title, source = block.get("title", ""), block.get("source", "")
        return [f"<search_result>\n{title}\n{source}\n{found}\n</search_result>"]
    if kind == "tool_reference":
        return [f"The tool {block.get('tool_name')} is available."]
    if kind == "image":
        raise InvalidRequest(f"{where} is an image: this model reads text only.", where)
    if isinstance(kind, str) and (kind in FOREIGN_BLOCKS or kind.endswith("_tool_result")):
        turns.ignored.add(kind)
        return []
    raise InvalidRequest(f"{where}.type is {str(kind)[:50]!r}, which has no place here: use text, and in messages also "
                         "thinking, tool_use (assistant) and tool_result (user).", f"{where}.type")  # fmt: skip


def _document(block: Mapping[str, Any], where: str, turns: Turns) -> str:
    source = block.get("source")
    require(isinstance(source, dict), f"{where}.source", "an object", source)
    assert isinstance(source, dict)
    if source.get("type") == "text":
        text = source.get("data")
        require(isinstance(text, str), f"{where}.source.data", "a string", text)
    elif source.get("type") == "content":
        text = "\n".join(texts_of(source.get("content"), f"{where}.source.content", turns))
    else:
        raise InvalidRequest(f"{where}.source is of type {str(source.get('type'))[:50]!r}: this model reads text only, "
                             'sources of type "text" or "content".', f"{where}.source")  # fmt: skip
    lines = [str(block[key]) for key in ("title", "context") if block.get(key)]
    return "\n".join(["<document>", *lines, str(text), "</document>"])


def _unbilled(text: str) -> str:
    """System text without Claude Code's billing header: a line in front that is another one in every session."""
    if not text.startswith(BILLING):
        return text
    return text.partition("\n")[2].lstrip("\n")


def _is_reminder(text: str) -> bool:
    text = text.strip()
    return text.startswith(REMINDER) and text.endswith(END_REMINDER)


def _reminder(text: str) -> str:
    return text if _is_reminder(text) else f"{REMINDER}\n{text}\n{END_REMINDER}"


def require(holds: bool, where: str, right: str, got: object) -> None:
    """Raise InvalidRequest that names the field and what would be right."""
    if not holds:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise InvalidRequest(f"{where} must be {right}, got {shown}.", where)


# ---------------------------------------------------------------------------------------------------------------
# tools


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """Tools as functions in OpenAI's form, `places[i]` the number of function i in the request.

    ignored   names of tools that need another server, by name: their kind
    """

    functions: list[dict[str, Any]]
    places: list[int]
    ignored: dict[str, str]


def to_functions(tools: Sequence[Mapping[str, Any]]) -> OfferedTools:
    """The tools that the client runs itself; those of another kind are left out.

    Raises:
        InvalidRequest: naming the field, such as `tools.0.input_schema`.
    """
    found = OfferedTools([], [], {})
    names: set[str] = set()
    for number, tool in enumerate(tools):
        where, kind, name = f"tools.{number}", tool.get("type"), tool.get("name")
        if kind not in (None, "custom"):
            found.ignored[str(name)] = str(kind)[:100]
            continue
        require(isinstance(name, str) and name != "", f"{where}.name", "a non-empty string", name)
        assert isinstance(name, str)
        if name in names:
            raise InvalidRequest(f"{where}.name is {name!r} again: names of tools must be unique.", f"{where}.name")
        names.add(name)
        description, schema = tool.get("description"), tool.get("input_schema")
        require(description is None or isinstance(description, str), f"{where}.description", "a string", description)
        require(isinstance(schema, dict), f"{where}.input_schema", "a JSON schema (an object)", schema)
        function = {"name": name, **({"description": description} if description else {}), "parameters": schema}
        if tool.get("strict") is True:
            function["strict"] = True
        found.functions.append(function)
        found.places.append(number)
    return found

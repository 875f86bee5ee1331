"""Items of the responses API: what a client sends in as messages of a conversation, and what we send out.

A turn of the model is several items: its thinking, its text, its calls. `Reader` puts them together again, so that
the turn renders to the tokens that were generated. Items of one turn are told by their ids (`ids`), and where a
client dropped the ids by their order: a turn begins with thinking, or behind what is not the model's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import reprlib
import secrets
import zlib
from collections.abc import Sequence
from typing import Any

from saddle.errors import InvalidRequest
from saddle.parsing.conversation import text_of
from saddle.server.wire_responses import MAX_INPUT_ITEMS

ROLES = ("user", "assistant", "system", "developer")
# Traces of tools that ran elsewhere. M2 has no words for them; they are left out, and the answer says so.
FOREIGN_ITEMS = frozenset(
    (
        "web_search_call", "file_search_call", "computer_call", "computer_call_output", "image_generation_call",
        "code_interpreter_call", "shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output",
        "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "mcp_call", "tool_search_call",
        "tool_search_output", "additional_tools",
    )
)  # fmt: skip
READ_ITEMS = (
    "message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output",
    "local_shell_call", "local_shell_call_output",
)  # fmt: skip
OUR_ID = re.compile(r"(?:rs|msg|fc)_([0-9a-f]{16,64})_\d+\Z")
Item = dict[str, Any]


class Seal:
    """Thinking as an opaque text that is told from any other's: signed and packed, not encrypted.

    The key lives as long as the process. What another process sealed does not open; the thinking is then read from
    the plain fields of its item.
    """

    PREFIX = "saddle1."
    MAC_BYTES = 16

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)

    def close(self, text: str) -> str:
        packed = zlib.compress(text.encode("utf-8", "surrogatepass"), 1)
        return self.PREFIX + base64.urlsafe_b64encode(self._mac(packed) + packed).decode()

    def open(self, sealed: str) -> str | None:
        """The text, None when it is not ours."""
        if not sealed.startswith(self.PREFIX):
            return None
        try:
            raw = base64.urlsafe_b64decode(sealed[len(self.PREFIX) :].encode())
        except (binascii.Error, UnicodeEncodeError):
            return None
        mac, packed = raw[: self.MAC_BYTES], raw[self.MAC_BYTES :]
        if not hmac.compare_digest(mac, self._mac(packed)):
            return None
        return zlib.decompress(packed).decode("utf-8", "surrogatepass")

    def _mac(self, packed: bytes) -> bytes:
        return hashlib.blake2b(packed, key=self._key, digest_size=self.MAC_BYTES).digest()


# ---------------------------------------------------------------------------------------------------------------
# out


def reasoning_item(item_id: str, text: str, status: str, *, summary: bool, sealed: str | None) -> Item:
    """Thinking: under `summary` for those who asked for one, else under `content`."""
    part = {"type": "summary_text" if summary else "reasoning_text", "text": text}
    parts = [part] if text else []
    return {"id": item_id, "type": "reasoning", "summary": parts if summary else [],
            "content": [] if summary else parts, "encrypted_content": sealed, "status": status}  # fmt: skip


def text_part(text: str, logprobs: list[Any] | None = None) -> Item:
    return {"type": "output_text", "annotations": [], "logprobs": logprobs or [], "text": text}


def message_item(item_id: str, parts: list[Item], status: str) -> Item:
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": parts}


def call_item(item_id: str, call_id: str, name: str, arguments: str, status: str, space: str | None = None) -> Item:
    item = {"id": item_id, "type": "function_call", "status": status, "arguments": arguments, "call_id": call_id,
            "name": name}  # fmt: skip
    return item if space is None else {**item, "namespace": space}


def in_namespace(space: str, name: str) -> str:
    """The name that the model knows a tool of a namespace by: it knows no namespaces."""
    return f"{space}__{name}"


# ---------------------------------------------------------------------------------------------------------------
# in


def as_items(given: Any, key: str) -> list[Item]:
    """`input` as items that all have a type and an id.

    Args:
        key: makes the ids of items that have none.

    Raises:
        InvalidRequest: it is neither text nor a list of objects.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        what = "missing" if given is None else f"a {type(given).__name__}"
        raise InvalidRequest(f"input must be a string or a list of items, it is {what}.", "input")
    if len(given) > MAX_INPUT_ITEMS:
        raise InvalidRequest(f"input may have at most {MAX_INPUT_ITEMS} items, got {len(given)}.", "input")
    return [_item(item, key, number) for number, item in enumerate(given)]


def _item(item: Any, key: str, number: int) -> Item:
    where = f"input.{number}"
    if not isinstance(item, dict):
        raise InvalidRequest(f"{where} must be an object, got {_shown(item)}.", where)
    kind = item.get("type", "message" if "role" in item else None)
    if kind is None and "id" in item and len(item) == 1:
        kind = "item_reference"
    if kind == "item_reference":
        raise InvalidRequest(f"{where}: item_reference is not supported; send the item itself, or use "
                             "previous_response_id.", f"{where}.type")  # fmt: skip
    if not isinstance(kind, str) or (kind not in READ_ITEMS and kind not in FOREIGN_ITEMS):
        raise InvalidRequest(f"{where}.type must be one of {', '.join(READ_ITEMS)}, got {_shown(kind)}.",
                             f"{where}.type")  # fmt: skip
    made = {**item, "type": kind}
    if not isinstance(made.get("id"), str):
        made["id"] = f"in_{key}_{number}"
    if kind == "message" and isinstance(made.get("content"), str):
        text = made["content"]
        made["content"] = [text_part(text) if made.get("role") == "assistant" else {"type": "input_text", "text": text}]
    return made


class Reader:
    """Puts items together to the messages of a conversation; `add` as often as there are lists of items.

    Attributes:
        ignored: types of items that were left out, each once.
    """

    def __init__(self, seal: Seal) -> None:
        self._messages: list[dict[str, Any]] = []  # with lists of parts as texts: a turn may have very many items
        self.ignored: list[str] = []
        self._seal = seal
        self._turn: dict[str, Any] | None = None  # the model's turn under way
        self._is_open = False  # whether nothing came behind it
        self._key: str | None = None  # the response that it is of
        self._calls: set[str] = set()

    def add(self, items: Sequence[Item], where: str = "input") -> None:
        """Raises InvalidRequest, naming the field such as `input.3.arguments`."""
        for number, item in enumerate(items):
            kind, inside = item["type"], f"{where}.{number}"
            if kind == "message":
                self._message(item, inside)
            elif kind == "reasoning":
                self._reasoning(item, inside)
            elif kind in ("function_call", "custom_tool_call", "local_shell_call"):
                self._call(item, inside)
            elif kind in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
                self._output(item, inside)
            else:
                self._ignore(kind)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What `parsing.conversation.normalise` takes."""
        return [_joined(message) for message in self._messages]

    def system(self, text: str) -> None:
        self._messages.append({"role": "system", "content": [text]})

    def _message(self, item: Item, where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}, got {_shown(role)}.",
                                 f"{where}.role")  # fmt: skip
        text = text_of(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._is_open = False
            self._messages.append({"role": role, "content": [text]})
            return
        key = _key(item)
        turn = self._turn if self._is_open else None
        if turn is None or (turn["content"] and not turn["tool_calls"] and (key is None or key != self._key)):
            turn = self._begin(key)
        if text:
            turn["content"].append(text)

    def _reasoning(self, item: Item, where: str) -> None:
        text = self._thinking(item, where)
        turn = self._turn if self._is_open else None
        if turn is None or turn["content"] or turn["tool_calls"]:
            turn = self._begin(_key(item))
        thoughts = turn.setdefault("reasoning_content", [])
        if text:
            thoughts.append(text)

    def _thinking(self, item: Item, where: str) -> str:
        sealed = item.get("encrypted_content")
        if sealed is not None and not isinstance(sealed, str):
            raise InvalidRequest(f"{where}.encrypted_content must be a string.", f"{where}.encrypted_content")
        text = self._seal.open(sealed) if sealed else None
        if text is not None:
            return text
        for field in ("content", "summary"):
            parts = item.get(field)
            if not parts:
                continue
            if not isinstance(parts, list) or not all(
                isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
            ):
                raise InvalidRequest(f"{where}.{field} must be a list of parts with text.", f"{where}.{field}")
            return "\n\n".join(part["text"] for part in parts)
        if sealed:
            self._ignore("reasoning.encrypted_content")
        return ""

    def _call(self, item: Item, where: str) -> None:
        if item.get("status") == "incomplete":
            return  # cut off in its middle: it was never made
        kind = item["type"]
        call_id = _text(item, "call_id", where)
        if kind == "function_call":
            name, arguments = _text(item, "name", where), _arguments(item.get("arguments"), f"{where}.arguments")
            name = in_namespace(_text(item, "namespace", where), name) if item.get("namespace") else name
        elif kind == "custom_tool_call":
            name, arguments = _text(item, "name", where), {"input": str(item.get("input", ""))}
        else:
            action = item.get("action")
            name, arguments = "local_shell", dict(action) if isinstance(action, dict) else {}
        key = _key(item)
        turn = self._turn if self._is_open or (key is not None and key == self._key) else None
        if turn is None:
            turn = self._begin(key)
        turn["tool_calls"].append({"id": call_id, "function": {"name": name, "arguments": arguments}})
        self._calls.add(call_id)

    def _output(self, item: Item, where: str) -> None:
        call_id = _text(item, "call_id" if "call_id" in item else "id", where)
        if call_id not in self._calls:
            raise InvalidRequest(f"{where}: there is no call with call_id {_shown(call_id)} before this output.",
                                 f"{where}.call_id")  # fmt: skip
        self._is_open = False
        text = text_of(item.get("output"), f"{where}.output")
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": [text]})

    def _begin(self, key: str | None) -> dict[str, Any]:
        self._turn = {"role": "assistant", "content": [], "tool_calls": []}
        self._is_open, self._key = True, key
        self._messages.append(self._turn)
        return self._turn

    def _ignore(self, kind: str) -> None:
        if kind not in self.ignored:
            self.ignored.append(kind)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    made = {**message, "content": "".join(message["content"])}
    if "reasoning_content" in made:
        made["reasoning_content"] = "\n\n".join(made["reasoning_content"])
    return made


def _key(item: Item) -> str | None:
    """What the ids of all items of one response share."""
    found = OUR_ID.match(str(item.get("id", "")))
    return None if found is None else found[1]


def _text(item: Item, field: str, where: str) -> str:
    value = item.get(field)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{where}.{field} must be a non-empty string, got {_shown(value)}.", f"{where}.{field}")
    return value


def _arguments(given: Any, where: str) -> dict[str, Any]:
    if given is None or given == "":
        return {}
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where} must be a JSON object: {error}.", where) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be a JSON object, got {_shown(value)}.", where)
    return value


def _shown(value: Any) -> str:
    return reprlib.repr(value)[:80]

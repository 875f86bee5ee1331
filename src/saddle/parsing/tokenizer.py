"""The tokenizer of a checkpoint: ids of its control tokens, encoding, and decoding that streams."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import tokenizers

from saddle.errors import ContextTooLong, InvalidRequest, StartupError

CONVERSATION, MESSAGE, END = "]~!b[", "]~b]", "[e~["
THINK, END_THINK = "<think>", "</think>"
FAR_CHARS, FAR_CHARS_PER_TOKEN = 1_000_000, 8  # a second's work, and twice as many as a token usually has
CALLS, END_CALLS = "<minimax:tool_call>", "</minimax:tool_call>"


class Tokenizer:
    """Text to ids and back. Thread-safe: the tokenizer underneath is never changed after loading.

    Attributes:
        vocab_size: ids that mean something, added tokens included.
        bos_id, message_id, eos_id: `]~!b[`, `]~b]` and `[e~[`.
        think_id, end_think_id, calls_id, end_calls_id: the four tags.
        special_ids: ids that `skip_special_tokens` drops; the four tags are not among them.
        chat_template, model_identity: of the checkpoint, None where it has none.
    """

    def __init__(self, inner: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self._inner = inner
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.message_id, self.eos_id = map(self._control, (CONVERSATION, MESSAGE, END))
        self.think_id, self.end_think_id = self._control(THINK), self._control(END_THINK)
        self.calls_id, self.end_calls_id = self._control(CALLS), self._control(END_CALLS)
        tags = {self.think_id, self.end_think_id, self.calls_id, self.end_calls_id}
        added = inner.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._raw: dict[int, bytes] = {}
        self.special_ids = frozenset(i for i, token in added.items() if token.special) - tags
        self.model_max_length: int | None = config.get("model_max_length")
        self.chat_template: str | None = config.get("chat_template")
        self.model_identity: str | None = config.get("model_identity")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` where they exist.

        Raises:
            StartupError: a file is missing or cannot be read, or a control token of M2 is no token.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise StartupError(f"{folder} has no tokenizer.json; --tokenizer names another folder.")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise StartupError(f"{path} cannot be read: {error}") from None
        config: dict[str, Any] = {}
        try:
            if (folder / "tokenizer_config.json").is_file():
                config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise StartupError(f"{folder / 'tokenizer_config.json'} cannot be read: {error}") from None
        if (folder / "chat_template.jinja").is_file():
            config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        named = config.get("chat_template")
        if isinstance(named, list):  # several, by name
            config["chat_template"] = {one["name"]: one["template"] for one in named}.get("default")
        return cls(inner, config)

    def _control(self, text: str) -> int:
        token_id = self._inner.token_to_id(text)
        if token_id is None:
            raise StartupError(f"The tokenizer has no token {text!r}; this is no MiniMax-M2 tokenizer.")
        return int(token_id)

    # ids and text ------------------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Ids of a text; nothing is put in front.

        Args:
            allow_special: strings of added tokens become those tokens. Otherwise they are spelt with ordinary ones.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair, as JSON can.
        """
        try:
            if allow_special:
                # A batch of one: `encode` holds the interpreter's lock, a second for 600 kB, and a batch does not.
                ids: list[int] = self._inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
                return ids
            return self._encode_plain(text)
        except TypeError:  # what the library makes of such a string
            raise InvalidRequest("The text holds half of a surrogate pair, which is no character.") from None

    def refuse_far_too_long(self, text: str, limit: int) -> None:
        """Look at the beginning of a very long text, so that one that cannot fit does not take a minute to encode.

        Raises:
            ContextTooLong: the beginning alone has more than `limit` tokens, by a good part: where it is cut, and there
                alone, its tokens may be others than those of the whole.
        """
        size = max(FAR_CHARS, FAR_CHARS_PER_TOKEN * limit)
        if len(text) > size:
            num_tokens = len(self.encode(text[:size]))
            if 4 * num_tokens > 5 * limit:
                raise ContextTooLong.of(num_tokens, limit, at_least=True)

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for token_id, (start, stop) in self._pieces(text):
            if token_id in self._added:
                # Spelt in two halves, the string is no longer seen as the token.
                middle = start + 1
                ids += self._inner.encode(text[start:middle], add_special_tokens=False).ids
                ids += self._inner.encode(text[middle:stop], add_special_tokens=False).ids
            else:
                ids.append(token_id)
        return ids

    def _pieces(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        encoding = self._inner.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids, decoded as a whole; bytes that are no UTF-8 become U+FFFD."""
        if skip_special_tokens:
            ids = [i for i in ids if i not in self.special_ids]
        return str(self._inner.decode_batch([ids], skip_special_tokens=False)[0])  # without the lock, as `encode`

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, empty for an id that is none."""
        return str(self._inner.decode([token_id], skip_special_tokens=False))

    def token_texts(self, ids: list[int]) -> list[str]:
        """Text of each token alone."""
        return [self.token_text(token_id) for token_id in ids]

    def token_bytes(self, token_id: int) -> list[int]:
        """The bytes that a token stands for; a character may be spread over several tokens."""
        return list(self.raw(token_id))

    def raw(self, token_id: int) -> bytes:
        """The bytes of a token, none for an id that is no token."""
        found = self._raw.get(token_id)
        if found is None:
            token = self._inner.id_to_token(token_id) or ""
            spelt = token_id in self._added or any(char not in BYTE_OF for char in token)
            found = token.encode() if spelt else bytes(BYTE_OF[char] for char in token)
            self._raw[token_id] = found
        return found

    def is_thinking(self, ids: list[int]) -> bool:
        """Whether what follows continues a thinking block: the last turn opened one and did not end it."""
        for token_id in reversed(ids):
            if token_id == self.think_id:
                return True
            if token_id in (self.end_think_id, self.message_id, self.eos_id):
                return False
        return False

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A decoder for one stream of ids."""
        return Detokenizer(self, self.special_ids if skip_special_tokens else frozenset())


class Detokenizer:
    """Ids in, text out, as soon as it is certain.

    Only the bytes of an unfinished character are held back, at most three; bytes that are no UTF-8 become U+FFFD at
    once, so a stream of garbage neither stalls nor grows.
    """

    __slots__ = ("_decode", "_skipped", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def step(self, token_id: int) -> str:
        """The text that this id makes certain."""
        if token_id in self._skipped:
            return ""
        return self._decode(self._tokenizer.raw(token_id))

    def finish(self) -> str:
        """What was held back, as U+FFFD; the decoder can be used again."""
        return self._decode(b"", True)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself, or the next one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()

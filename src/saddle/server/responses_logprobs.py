"""Which of the generated tokens are answer text: a response reports log-probabilities of those alone."""

from __future__ import annotations

from typing import Any

from saddle.parsing.events import Tokens
from saddle.parsing.tokenizer import Tokenizer
from saddle.server.openai_parts import TokenNames


class AnswerLogprobs:
    """Follows M2's tags from token to token.

    Args:
        num_top: most likely tokens to list beside each.
        is_thinking: whether the prompt ends inside a thinking block.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, is_thinking: bool) -> None:
        self._tokenizer, self._names, self._num_top = tokenizer, TokenNames(tokenizer), num_top
        self._is_thinking, self._in_calls, self._begins = is_thinking, False, True

    def of(self, tokens: Tokens) -> list[dict[str, Any]]:
        """Entries of the answer's tokens among these."""
        found = []
        for token_id, entry in zip(tokens.token_ids, tokens.logprobs or (), strict=False):
            if self._is_answer(token_id):
                found.append(self._names.chat(entry, self._num_top))
        return found

    def _is_answer(self, token_id: int) -> bool:
        tokenizer = self._tokenizer
        if token_id in tokenizer.special_ids or token_id in (tokenizer.calls_id, tokenizer.end_calls_id,
                                                             tokenizer.think_id, tokenizer.end_think_id):  # fmt: skip
            self._is_thinking = token_id == tokenizer.think_id or (
                self._is_thinking and token_id not in (tokenizer.end_think_id, tokenizer.calls_id)
            )
            self._in_calls = token_id == tokenizer.calls_id or (self._in_calls and token_id != tokenizer.end_calls_id)
            self._begins = True
            return False
        if self._is_thinking or self._in_calls:
            return False
        if self._begins and not tokenizer.token_text(token_id).strip("\n"):
            return False  # frames the answer and is none of it
        self._begins = False
        return True

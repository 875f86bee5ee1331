"""Training batches: conversations encoded and packed into rows, made by many processes while the GPU works."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from demo.chat import a_conversation

ROW_TOKENS = 1536
ROWS_PER_PART = 20
CHATS_AT_ONCE = 256
PROMPT_WEIGHT, OWN_WEIGHT = 26, 255  # of 255: what the model writes counts fully, the rest a tenth


def parts(seed: int, tokenizer_file: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of token ids and of loss weights, without end: uint16 and uint8 [ROWS_PER_PART, ROW_TOKENS + 1].

    Conversations follow each other; the one that a row's end cuts is dropped from the next row, so that every row
    begins with a whole conversation.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    r = random.Random(seed)
    width = ROW_TOKENS + 1
    ids, weights = np.zeros((ROWS_PER_PART, width), np.uint16), np.zeros((ROWS_PER_PART, width), np.uint8)
    row = filled = 0
    while True:
        segments = [a_conversation(r).segments for _ in range(CHATS_AT_ONCE)]
        texts = [text for chat in segments for text, _ in chat]
        encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for chat in segments:
            for _, own in chat:
                piece = next(encoded).ids
                room = min(len(piece), width - filled)
                ids[row, filled : filled + room] = piece[:room]
                weights[row, filled : filled + room] = OWN_WEIGHT if own else PROMPT_WEIGHT
                filled += room
            if filled == width:
                row, filled = row + 1, 0
                if row == ROWS_PER_PART:
                    yield ids.copy(), weights.copy()
                    row = 0


def work(seed: int, tokenizer_file: Path, out: Any) -> None:
    """A process of the data pool."""
    for part in parts(seed, tokenizer_file):
        out.put(part)


def main() -> None:
    """Say how fast one process is, and how long conversations are: `python -m demo.data`."""
    path = Path(sys.argv[1])
    made = parts(1, path)
    next(made)
    began = time.perf_counter()
    count = 20
    for _ in range(count):
        next(made)
    rate = count * ROWS_PER_PART * ROW_TOKENS / (time.perf_counter() - began)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    r = random.Random(2)
    lengths = sorted(len(tokenizer.encode("".join(t for t, _ in a_conversation(r).segments)).ids) for _ in range(2000))
    print(f"{rate:,.0f} tokens/s a process; conversation tokens median {lengths[1000]}, 99 % {lengths[1980]}, most {lengths[-1]}")


if __name__ == "__main__":
    main()

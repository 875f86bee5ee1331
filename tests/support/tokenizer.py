"""A small tokenizer with M2's control tokens, made in a test instead of taken from the model."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

# Name and whether it is special, in the order of M2's own added tokens.
CONTROL = [
    ("]!p~[", True), ("]~b]", True), ("[e~[", True), ("]!d~[", True), ("]~!b[", True),
    ("<think>", False), ("</think>", False), ("<minimax:tool_call>", False), ("</minimax:tool_call>", False),
]  # fmt: skip
# A few merges, so that texts have several spellings in ids.
MERGES = ["t h", "h e", "i n", "e r", "th e", "o r", "a n", "\u0120 the", "< /", "in v", "\u010a \u010a", "n a", "m e",
          "na me", "p a", "r a", "pa ra", "\u0120 a"]  # fmt: skip


def build_tokenizer(folder: Path, identity: str | None = None) -> Path:
    """Write tokenizer.json and tokenizer_config.json: 256 bytes, some merges, then the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: number for number, char in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for line in MERGES:
        left, right = line.split(" ")
        if left in vocab and right in vocab and left + right not in vocab:
            merges.append((left, right))
            vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name, _ in CONTROL])
    raw = json.loads(tokenizer.to_str())
    special = dict(CONTROL)
    for token in raw["added_tokens"]:
        token["special"] = special[token["content"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {"bos_token": "]~!b[", "eos_token": "[e~[", "tokenizer_class": "GPT2Tokenizer"}
    if identity is not None:
        config["model_identity"] = identity
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

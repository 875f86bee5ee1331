"""Train the demo's tokenizer: `python -m demo.tokenizer FOLDER`.

Byte-level BPE of 1,024 ids: 256 bytes, merges learned from generated conversations, and M2's 54 added tokens last.
Digits stand alone, so that arithmetic sees columns; names split at case, underscores, dots and hyphens.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo.chat import a_conversation
from demo.talk import IDENTITY

VOCABULARY = 1024
ADDED = """]!p~[ <fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <reponame> <filename> <gh_stars> <issue_start> <issue_comment>
<issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after>
]~b] [e~[ ]!d~[ <function_call> <code_interpreter> ]<]speech[>[ ]<]image[>[ ]<]video[>[ ]<]start+of+speech[>[ ]<]end+of+speech[>[
]<]start+of+image[>[ ]<]end+of+image[>[ ]<]start+of+video[>[ ]<]end+of+video[>[ ]<]vision+pad[>[ ]~!b[ <jupyter_error> <add_file>
<delete_file> <rename_file> <edit_file> <commit_message> <empty_source_file> <repo_struct> <code_context> <file_content> <source_files>
<pr_start> <review_comment> <filepath> <file_sep> <think> </think> <minimax:tool_call> </minimax:tool_call>""".split()
NOT_SPECIAL = 4  # the last four survive skip_special_tokens
# Syntax of calls and results stays whole; else letters by case, single digits, runs of signs, blanks.
SPLIT = (
    r'<invoke name="|<parameter name="|</parameter>\n|</invoke>\n|">\n|">|<response>|</response>'
    r"| ?[A-Z]?[a-z]+| ?[A-Z]+(?![a-z])|\p{N}| ?[^\s\p{L}\p{N}]{1,4}|\s*\n+| +|\p{L}+|\s+"
)
NUM_CHATS = 12_000


def texts(seed: int = 99) -> Iterator[str]:
    """Conversations to learn merges from, without the control tokens."""
    r = random.Random(seed)
    added = [name.replace("+", " ") for name in ADDED]
    for _ in range(NUM_CHATS):
        text = "".join(part for part, _ in a_conversation(r).segments)
        for name in added:
            text = text.replace(name, "\n")
        yield text


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY - len(ADDED):
        raise SystemExit(f"only {tokenizer.get_vocab_size()} tokens were learned; use more conversations")
    for number, name in enumerate(ADDED):
        special = number < len(ADDED) - NOT_SPECIAL
        token = AddedToken(name.replace("+", " "), normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    return tokenizer


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    train().save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False, "bos_token": "]~!b[", "clean_up_tokenization_spaces": False, "eos_token": "[e~[",
        "model_identity": IDENTITY, "model_max_length": 4096, "tokenizer_class": "GPT2Tokenizer", "unk_token": "]!d~[",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()

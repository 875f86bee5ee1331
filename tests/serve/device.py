"""A server with a scripted device: everything is real but the model, which does what the conversation tells it to.

    python -m tests.serve.device FOLDER --host H --port P [--step-s S] [--blocks N] [--max-model-len N]
                                        [--shutdown-timeout S] [--rows N] [--fast]

The last turn of the prompt decides what is "generated", in ids that are not those of BPE:

    user   count N             thinks, then writes the numbers from 1 to N
    user   call NAME {json}    thinks, then calls the tool with these arguments
    tool   ...                 thinks, then says what the tool said; `again NAME {json}` makes it call once more
    user   anything else       says it in upper case
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from saddle import launch, log
from saddle.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig, ServerConfig
from saddle.engine.core import EngineCore
from saddle.engine.scheduler import Limits, Scheduler
from saddle.executor.base import DeviceInfo, ProgressFn
from saddle.executor.fake import FakeExecutor, from_function
from saddle.parsing.tokenizer import Tokenizer

BLOCK_SIZE = 16
HOUR_S = 3600.0


def turn_of(prompt: str) -> tuple[str, str]:
    """(role, text) of the last turn before the generation prompt; a plain completion is one turn."""
    turns = prompt.split("]~b]")
    if len(turns) < 2:
        return "user", prompt  # a plain completion
    role, _, text = turns[-2].partition("\n")
    return role, text.split("[e~[")[0]


def markup(name: str, arguments: dict[str, object]) -> str:
    lines = "".join(
        f'<parameter name="{key}">{value if isinstance(value, str) else json.dumps(value)}</parameter>\n'
        for key, value in arguments.items()
    )
    return f'<minimax:tool_call>\n<invoke name="{name}">\n{lines}</invoke>\n</minimax:tool_call>'


def answer(prompt: str) -> str:
    """What the device writes after a prompt, thinking first."""
    role, text = turn_of(prompt)
    count = re.search(r"count (\d+)", text)
    call = re.search(r"(?:call|again) (\w+) (\{.*\})", text)
    if role == "user" and count:
        return "I count.\n</think>\n\n" + " ".join(map(str, range(1, int(count[1]) + 1)))
    if call and ((role == "user" and "call " in text) or (role == "tool" and "again " in text)):
        return f"A tool helps with {len(prompt)}.\n</think>\n\n\n{markup(call[1], json.loads(call[2]))}"
    if role == "tool":
        said = text.replace("<response>", "").replace("</response>", "").strip()
        return f"It answered.\n</think>\n\nThe tool said: {said}"
    return f"Easy.\n</think>\n\n{text.upper()}"


def spelt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as a model may sample them: tags are tokens, the rest is cut where BPE would not cut it."""
    ids: list[int] = []
    for part in re.split(r"(</?(?:think|minimax:tool_call)>)", text):
        size = len(part) if part.startswith(("<think", "</think", "<minimax", "</minimax")) else 3
        for start in range(0, len(part), max(size, 1)):
            ids += tokenizer.encode(part[start : start + size])
    return ids


def build(folder: Path, num_blocks: int, max_model_len: int, step_s: float, rows: int, verify: bool,
          on_progress: ProgressFn, write: Callable[[str], str] = answer) -> tuple[EngineCore, DeviceInfo]:  # fmt: skip
    """What the engine process runs; `write` makes the answer to a prompt."""
    tokenizer = Tokenizer.load(folder)

    @functools.lru_cache(maxsize=4096)
    def ids_of(prompt: tuple[int, ...]) -> list[int]:
        return spelt(tokenizer, write(tokenizer.decode(list(prompt), skip_special_tokens=False)))

    def token_at(prompt: Sequence[int], index: int) -> int:
        ids = ids_of(tuple(prompt))
        return ids[index] if index < len(ids) else tokenizer.eos_id

    executor = FakeExecutor(
        from_function(token_at), num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=max_model_len,
        vocab_size=tokenizer.vocab_size, step_s=step_s, verify=verify,
    )  # fmt: skip
    info = executor.start(on_progress)
    limits = Limits(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, vocab_size=tokenizer.vocab_size, max_model_len=max_model_len,
        max_num_seqs=rows, max_num_batched_tokens=2048,
    )  # fmt: skip
    eos_ids = frozenset([tokenizer.eos_id])
    # Loaded by the first request that wants it: most tests are about something else.
    grammar = launch.build_grammar(tokenizer, tokenizer.vocab_size, eos_ids, after_s=HOUR_S)
    return EngineCore(executor, Scheduler(limits, eos_ids), plans_in_flight=1, grammar=grammar), info


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, default=16_384)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--fast", action="store_true", help="a device that does not check what it is told")
    parser.add_argument("--shutdown-timeout", type=float, default=30.0)
    parser.add_argument("--kept-mib", type=int, default=64, help="bound of kept responses, and of kept turns")
    args = parser.parse_args(argv)
    log.setup()
    engine = EngineConfig(load=LoadConfig(model=str(args.folder)), cache=CacheConfig(), scheduler=SchedulerConfig())
    server = ServerConfig(host=args.host, port=args.port, served_model_names=("scripted",), access_log=False,
                          shutdown_timeout_s=args.shutdown_timeout, response_store_bytes=args.kept_mib << 20,
                          replay_bytes=args.kept_mib << 20)  # fmt: skip
    make = functools.partial(build, args.folder, args.blocks, args.max_model_len, args.step_s,
                             args.rows, not args.fast)  # fmt: skip
    return launch.serve(engine, server, make)


if __name__ == "__main__":
    # The engine process looks `build` up by its module's name, which must not be __main__.
    from tests.serve import device

    sys.exit(device.main())

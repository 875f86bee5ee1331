"""`saddle parse`: what the server's parsers make of recorded output; for bug reports and for tests.

Reads JSON lines and writes one JSON line for each, in order. Only the tokenizer of the checkpoint is loaded. Output is
taken to begin inside the thinking block, as it does after M2's prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saddle.cli.flags import Flag, FlagParser
from saddle.cli.serve_flags import REASONING_PARSERS, TOOL_PARSERS, reasoning_parser, tool_parser
from saddle.errors import InvalidRequest, SaddleError

if TYPE_CHECKING:
    from saddle.parsing.tokenizer import Tokenizer

LONGEST_RANDOM_DELTA = 8
FINISH_REASONS = ("stop", "length")
DESCRIPTION = f"""\
Run the output parsers on recorded output. Standard input holds one JSON object a line:

  text or token_ids   what the model wrote, after the prompt
  tools               tools that were offered, in the OpenAI form
  reasoning_parser    instead of --reasoning-parser
  tool_call_parser    instead of --tool-call-parser
  split               lengths of the deltas in tokens, the rest being one more; or a seed for random lengths of
                      1 to {LONGEST_RANDOM_DELTA}; default: one token a delta
  finish_reason       why generation ended, stop (default) or length

Standard output gets one JSON object a line: reasoning, content, tool_calls (name, arguments as JSON text),
finish_reason and events; or error, and then the exit code is 1."""

FLAGS: tuple[Flag, ...] = (
    Flag(names="--model", metavar="FOLDER", help="checkpoint, of which the tokenizer is read; default: the demo's"),
    Flag(names="--reasoning-parser", parse=reasoning_parser, help='as for serve; default minimax_m2, "" for none'),
    Flag(names="--tool-call-parser", parse=tool_parser, help='as for serve; default minimax_m2, "" for none'),
)


def add_parser(subparsers: Any) -> None:
    """Register the command with the main parser's subparsers."""
    parser: FlagParser = subparsers.add_parser(
        "parse", help="run the output parsers on recorded text or token ids", description=DESCRIPTION,
        usage="saddle parse --model FOLDER < lines", positional="MODEL_TAG",
    )  # fmt: skip
    parser.add_flags(FLAGS)


def run(args: argparse.Namespace) -> int:
    """Parse standard input; 0 when every line could be parsed.

    Raises:
        StartupError: the checkpoint's tokenizer cannot be read.
    """
    from saddle.parsing.tokenizer import Tokenizer

    given = vars(args)
    tokenizer = Tokenizer.load(_folder(given))
    parsers = tuple(given.get(name, "minimax_m2") for name in ("reasoning_parser", "tool_call_parser"))
    code = 0
    for number, line in enumerate(sys.stdin, start=1):
        if not line.strip():
            continue
        try:
            found = parse(_object(line), tokenizer, *parsers)
        except SaddleError as error:
            found, code = {"error": f"line {number}: {error}"}, 1
        print(json.dumps(found, ensure_ascii=False), flush=True)
    return code


def parse(
    line: dict[str, Any], tokenizer: Tokenizer, reasoning: str | None = "minimax_m2", tools: str | None = "minimax_m2"
) -> dict[str, Any]:
    """Feed one record to the parsers as the server would.

    Args:
        line: a record as in the description of the command.
        reasoning, tools: parsers unless the record names others.

    Raises:
        InvalidRequest: the record is wrong; names the field.
    """
    import msgspec

    from saddle.parsing.conversation import normalise
    from saddle.parsing.fold import fold
    from saddle.parsing.stream import StreamParser
    from saddle.protocol import FinishReason, SamplingParams, TokenDelta

    token_ids = _token_ids(line, tokenizer)
    reason = line.get("finish_reason", "stop")
    if reason not in FINISH_REASONS:
        raise InvalidRequest(f"finish_reason must be stop or length, got {reason!r}.", "finish_reason")
    offered = line.get("tools")
    if offered is not None:
        normalise([{"role": "user", "content": ""}], offered)  # refuses what the server would refuse
    parser = StreamParser(
        tokenizer, tools=offered,
        reasoning_parser=_parser(line, "reasoning_parser", REASONING_PARSERS, reasoning),
        tool_parser=_parser(line, "tool_call_parser", TOOL_PARSERS, tools),
        params=SamplingParams(), num_prompt_tokens=0, starts_in_reasoning=True, want_tokens=False,
    )  # fmt: skip
    events = []
    deltas = list(split(token_ids, line.get("split")))
    for index, delta in enumerate(deltas):
        last = FinishReason(reason) if index == len(deltas) - 1 else None
        events += parser.feed(TokenDelta(request_id="", token_ids=delta, finish_reason=last))
    whole = fold(events)
    called = bool(whole.tool_calls) and reason == "stop"
    return {
        "reasoning": whole.reasoning, "content": whole.content,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in whole.tool_calls],
        "finish_reason": "tool_calls" if called else whole.finish_reason,
        "events": [{"type": type(event).__name__, **msgspec.to_builtins(event)} for event in events],
    }  # fmt: skip


def split(token_ids: Sequence[int], how: Any) -> Iterator[list[int]]:
    """Cut token ids into the deltas that `how` asks for; at least one, which may be empty.

    Raises:
        InvalidRequest: `how` is neither a list of lengths nor a seed.
    """
    if how is None:
        lengths: Iterator[int] = iter([1] * max(len(token_ids) - 1, 0))
    elif isinstance(how, int) and not isinstance(how, bool):
        seeded = random.Random(how)
        lengths = iter(lambda: seeded.randint(1, LONGEST_RANDOM_DELTA), 0)
    elif isinstance(how, list) and all(type(length) is int and length >= 0 for length in how):
        lengths = iter(how)
    else:
        raise InvalidRequest(f"split must be a list of lengths in tokens, or an integer seed, got {how!r}.", "split")
    at = 0
    for length in lengths:
        if at + length >= len(token_ids):
            break
        yield list(token_ids[at : at + length])
        at += length
    yield list(token_ids[at:])


def _folder(given: dict[str, Any]) -> Path:
    name = given.get("model", given.get("model_tag"))
    if name is None:
        from saddle.launch import demo_model_path

        return demo_model_path()
    return Path(name).expanduser()


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"must be JSON: {error}.") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"must be a JSON object, is {type(found).__name__}.")
    return found


def _token_ids(line: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    if ("text" in line) == ("token_ids" in line):
        raise InvalidRequest("needs either text or token_ids.", "text")
    if "text" in line:
        if not isinstance(line["text"], str):
            raise InvalidRequest(f"text must be a string, got {line['text']!r}.", "text")
        if not line["text"].isascii() and any("\ud800" <= char <= "\udfff" for char in line["text"]):
            raise InvalidRequest("text must not hold half of a surrogate pair.", "text")
        return tokenizer.encode(line["text"])
    token_ids = line["token_ids"]
    if not isinstance(token_ids, list) or not all(
        type(token_id) is int and 0 <= token_id < tokenizer.vocab_size for token_id in token_ids
    ):
        raise InvalidRequest(f"token_ids must be a list of ids from 0 to {tokenizer.vocab_size - 1}.", "token_ids")
    return token_ids


def _parser(line: dict[str, Any], field: str, known: dict[str, str | None], default: str | None) -> Any:
    name = line.get(field, default)
    if name is None:
        return None
    if not isinstance(name, str) or name not in known:
        raise InvalidRequest(f"{field} must be one of {', '.join(map(repr, known))}, got {name!r}.", field)
    return known[name]

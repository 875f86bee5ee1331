"""Coverage-guided fuzzing of the stream parser: `python -m tests.fuzz.fuzz_stream --minutes 10` (needs atheris).

The bytes choose token ids, how they are cut into deltas, and how the generation ends. Every input must be read to
exactly one end, the same in any cut, without the parser falling back to plain text.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["saddle.parsing"]):
    from saddle.parsing.fold import Completion, fold
    from saddle.parsing.stream import StreamParser
    from saddle.parsing.tokenizer import Tokenizer

from saddle.protocol import FinishReason, SamplingParams
from tests.support.tokenizer import build_tokenizer
from tests.unit.parsing.parsing_support import cut, feed, tool

PIECES = (
    "<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="f">', "<invoke name=g>",
    "</invoke>", '<parameter name="a">', '<parameter name="n">', "</parameter>", "<invoke", "<parameter", "</", ">",
    '"', "\n", "null", "5", "[e~[", "]~b]", "text", "é", "日本", "🎉", "\\", '{"k": [1]}', " ",
)  # fmt: skip
TOOLS = [tool("f", a={"type": "string"}, n={"type": ["integer", "null"]}), tool("g", x={"type": "object"})]


class Fault(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(build_tokenizer(Path(tempfile.mkdtemp())))
    pieces = [tokenizer.encode(piece) for piece in PIECES]
    logging.getLogger("saddle.parsing.stream").addHandler(Fault())

    def read(ids: list[int], how: object, options: int, reason: FinishReason) -> tuple[object, ...]:
        stops = (("\n",), ("</in",), ("é日", "x"), ())[options & 3]
        stream = StreamParser(
            tokenizer, params=SamplingParams(stop=stops), num_prompt_tokens=1, tools=TOOLS if options & 4 else None,
            reasoning_parser=("minimax_m2", "minimax_m2_append_think", None, "minimax_m2")[options >> 3 & 3],
            starts_in_reasoning=bool(options & 32),
        )  # fmt: skip
        found: Completion = fold(feed(stream, cut(ids, how), reason))  # type: ignore[arg-type]
        assert found.finish_reason is not None
        calls = [(call.name, call.arguments, call.is_complete) for call in found.tool_calls]
        return found.reasoning, found.content, calls, found.usage, found.stop, stream.generated_text

    def one(raw: bytes) -> None:
        if len(raw) < 3:
            return
        ids: list[int] = []
        for byte in raw[2:]:
            ids += pieces[byte] if byte < len(pieces) else [byte % tokenizer.vocab_size]
        reason = FinishReason.STOP if raw[1] & 1 else FinishReason.LENGTH
        assert read(ids, None, raw[0], reason) == read(ids, raw[1], raw[0], reason)

    seconds = int(args.minutes * 60)
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=512", "-print_final_stats=1"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

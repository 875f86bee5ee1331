"""The command `saddle`: finds the subcommand and loads nothing else.

A `SaddleError` ends in one message on standard error and exit code 1, a wrong command line in exit code 2, an
interrupt in 130. Anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from saddle.cli.flags import FlagParser
from saddle.errors import SaddleError
from saddle.version import VERSION

# Each module has `add_parser(subparsers)` and `run(args) -> int`; only the one that is asked for is imported.
COMMANDS = {
    "serve": ("saddle.cli.serve", "serve a model over HTTP"),
    "chat": ("saddle.cli.chat", "talk to a server from the terminal"),
    "parse": ("saddle.cli.parse", "run the output parsers on recorded text or token ids"),
    "bench": ("saddle.cli.bench", "measure a server, or the engine in this process"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = FlagParser(prog="saddle", description="The serving engine for the MiniMax-M2 family.")
    parser.add_argument("--version", action="version", version=f"saddle {VERSION}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    modules = {}
    for name, (module, summary) in COMMANDS.items():
        if arguments[:1] == [name]:
            modules[name] = import_module(module)
            modules[name].add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(modules[args.command].run(args))
    except SaddleError as error:
        print(f"saddle {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())

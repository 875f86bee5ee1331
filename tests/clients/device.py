"""A server for coding agents: everything is real but the model, which runs one shell command and reports.

    python -m tests.clients.device FOLDER --host H --port P

    user turn that says "run echo", tools at hand   thinks, then calls the shell tool of the client with `COMMAND`
    tool turn                                       thinks, then repeats what the tool printed
    anything else (a title, a summary)              a short sentence
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saddle import launch, log
from saddle.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig, ServerConfig
from tests.serve.device import build, markup, turn_of

WORD = "saddle-was-here"
COMMAND = f"echo {WORD}"
SHELLS = ("bash", "exec_command", "shell", "shell_command", "run_shell_command", "local_shell")
MODEL = "MiniMax-M2"


def shell_tool(prompt: str) -> dict[str, Any] | None:
    """The schema of the client's shell tool, if it offers one."""
    tools = [json.loads(text) for text in re.findall(r"<tool>(\{.*?\})</tool>\n", prompt)]
    named = {tool["name"].lower(): tool for tool in tools}
    return next((named[name] for name in SHELLS if name in named), None)


def arguments(tool: dict[str, Any]) -> dict[str, Any]:
    """Every required argument, and the command wherever the tool wants it."""
    schema = tool.get("parameters") or {}
    properties = schema.get("properties", {})
    command = next(name for name in ("command", "cmd", "script") if name in properties)
    is_list = properties[command].get("type") == "array"
    found: dict[str, Any] = {command: ["bash", "-lc", COMMAND] if is_list else COMMAND}
    defaults = {"string": "Print a word.", "integer": 10_000, "number": 10_000, "boolean": False}
    for name in schema.get("required", ()):
        found.setdefault(name, defaults.get(properties[name].get("type"), ""))
    return found


def answer(prompt: str) -> str:
    """What the device writes after a prompt, thinking first."""
    role, text = turn_of(prompt)
    tool = shell_tool(prompt)
    if role == "user" and "run echo" in text and tool is not None:
        return f"The user wants a command to run.\n</think>\n\n\n{markup(tool['name'], arguments(tool))}"
    if role == "tool":
        word = WORD if WORD in text else "something else"
        return f"It printed {word}.\n</think>\n\nThe command printed {word}."
    return "Easy.\n</think>\n\nA command that prints a word."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args(argv)
    log.setup()
    engine = EngineConfig(load=LoadConfig(model=str(args.folder)), cache=CacheConfig(), scheduler=SchedulerConfig())
    server = ServerConfig(host=args.host, port=args.port, served_model_names=(MODEL,))
    make = functools.partial(build, args.folder, 32_768, 200_000, 0.0, 64, False, write=answer)
    return launch.serve(engine, server, make)


if __name__ == "__main__":
    # The engine process looks `answer` up by its module's name, which must not be __main__.
    from tests.clients import device

    sys.exit(device.main())

"""`saddle serve`: the command line as a configuration.

`configs()` is the whole of it: a namespace of given flags in, an EngineConfig, a ServerConfig and log lines out.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from typing import Any

from saddle import env, log
from saddle.cli import serve_flags, vllm_flags
from saddle.cli.flags import Flag, FlagParser
from saddle.config import CacheConfig, CompileConfig, EngineConfig, LoadConfig, SchedulerConfig, ServerConfig
from saddle.errors import StartupError

logger = logging.getLogger(__name__)

FLAGS: tuple[Flag, ...] = (*serve_flags.FLAGS, *vllm_flags.FLAGS)
DESCRIPTION = """\
Serve a MiniMax-M2 checkpoint over HTTP; without MODEL, the bundled demo checkpoint.

Flags are those of `vllm serve`. `--help=WORD` shows the flags that mention WORD, `--help=vllm` those that are
accepted without an effect or not yet possible, each with the reason, and `--help=all` every flag."""


def add_parser(subparsers: Any) -> None:
    """Register the command with the main parser's subparsers."""
    parser: FlagParser = subparsers.add_parser(
        "serve", help="serve a model over HTTP", description=DESCRIPTION, positional="MODEL_TAG",
        usage="saddle serve [MODEL] [flags]",
    )  # fmt: skip
    parser.add_flags(FLAGS)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        StartupError: the configuration cannot start.
    """
    log.setup(env.log_level())
    engine, server, notes = configs(vars(args), env.api_keys())
    for note in notes:
        logger.info(note)
    from saddle.launch import serve  # here, not above: `saddle --help` must not pay for it

    return serve(engine, server)


def configs(
    given: Mapping[str, Any], api_keys: tuple[str, ...] = ()
) -> tuple[EngineConfig, ServerConfig, list[str]]:
    """Turn the flags that were given into configurations.

    Args:
        given: value by destination of the flag, such as {"max_num_seqs": 8}; absent means not given.
        api_keys: keys of the environment, used when no `--api-key` was given.

    Returns:
        The configurations, and a line for each flag that has no effect.

    Raises:
        StartupError: a value is wrong, or asks for what this version cannot do.
    """
    names = ("load", "cache", "scheduler", "compile", "server", "cli")
    sections: dict[str, dict[str, Any]] = {name: {} for name in names}
    notes: list[str] = []
    for flag in FLAGS:
        if flag.dest not in given:
            continue
        value = given[flag.dest]
        if flag.missing and value not in flag.fine:
            raise StartupError(f"{_spelled(flag, value)} is not possible: {flag.missing}.")
        if flag.reason:
            notes.append(f"{_spelled(flag, value)} has no effect: {flag.reason}.")
        if flag.kind == "json" and flag.to and not isinstance(value, Mapping):
            raise StartupError(f"{flag.long} must be a JSON object, got {value!r}.")
        for target in flag.to:
            section, field = target.split(".")
            sections[section][field] = flag.value(value) if flag.value else value
    sections["load"]["model"] = _model(given)
    sections["server"].setdefault("api_keys", api_keys)
    engine = EngineConfig(
        load=LoadConfig(**sections["load"]),
        cache=CacheConfig(**sections["cache"]),
        scheduler=SchedulerConfig(**sections["scheduler"]),
        compile=CompileConfig(**sections["compile"]),
    )
    return engine, ServerConfig(**sections["server"]), notes


def _spelled(flag: Flag, value: Any) -> str:
    if isinstance(value, bool):
        return flag.long if value else f"--no-{flag.long[2:]}"
    if flag.kind == "json":
        return f"{flag.long} '{json.dumps(value)}'"
    return f"{flag.long} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _model(given: Mapping[str, Any]) -> str:
    positional, flag = given.get("model_tag"), given.get("model")
    if positional and flag and positional != flag and "config" not in given:
        raise StartupError(f"The model is given twice: {positional!r} and --model {flag!r}.")
    if positional or flag:
        return str(positional or flag)
    from saddle.launch import demo_model_path

    return str(demo_model_path())

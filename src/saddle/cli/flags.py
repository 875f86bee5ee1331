"""Flags as data: one row of a table describes one flag, and one parser understands all tables.

The parser is argparse with the habits that users of `vllm serve` know: unique abbreviations, underscores for dashes,
`--no-x` for booleans, JSON flags also dotted (`--compilation-config.mode 3`), a YAML file under `--config` that the
command line overrides, and the nearest name in the error for an unknown flag. A flag that was not given leaves no
trace in the namespace, so defaults live in the configuration alone.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

Kind = Literal["str", "int", "size", "float", "bool", "words", "json"]

_DOTTED = re.compile(r"(--?[A-Za-z][\w-]*)\.([\w.-]+)(?:=(.*))?", re.DOTALL)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag of a command.

    names    "--long-name -short": the long name first, then other spellings
    kind     how its value is read; "size" takes 8192, 8k (8000), 8K (8192) and 25.6k; "words" takes one or more
    to       fields that it sets, "section.field"
    parse    reads the text instead of `kind`
    value    turns what was read into the field's value
    reason   why it has no effect here; a flag with a reason sets no field
    fine     values that change nothing although `missing` says that the capability is not there
    missing  what this version cannot do, completing "--flag VALUE is not possible: ..."
    """

    names: str
    kind: Kind = "str"
    group: str = "General"
    help: str = ""
    metavar: str | None = None
    to: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    parse: Callable[[str], Any] | None = None
    value: Callable[[Any], Any] | None = None
    reason: str = ""
    fine: tuple[Any, ...] = ()
    missing: str = ""

    @property
    def long(self) -> str:
        return self.names.split()[0]

    @property
    def dest(self) -> str:
        return self.long.lstrip("-").replace("-", "_")


def size(text: str) -> int:
    """A count, with k, m, g, t for powers of 1000 and K, M, G, T for powers of 1024.

    Raises:
        argparse.ArgumentTypeError: the text is no such count, or names a fraction of one.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a count such as 8192, 8k, 8K or 25.6k, got {text!r}")
    number, unit = match.groups()
    result = float(number) * _BINARY[unit] if unit in _BINARY else float(number) * _DECIMAL[unit]
    if abs(result - round(result)) > 1e-6:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r} = {result}")
    return int(number) if not unit else round(result)


def words(values: Sequence[str]) -> tuple[str, ...]:
    """A list given as words, or as one JSON list."""
    if len(values) == 1 and values[0].lstrip().startswith("["):
        try:
            return tuple(str(value) for value in json.loads(values[0]))
        except json.JSONDecodeError as error:
            raise ValueError(f"must be words or a JSON list, got {values[0]!r} ({error})") from None
    return tuple(values)


class FlagParser(argparse.ArgumentParser):
    """argparse for tables of flags; also the class of all subcommands.

    Args:
        positional: name of the one optional positional argument, stored under that name in lower case.
    """

    def __init__(self, prog: str | None = None, *, usage: str | None = None, description: str | None = None,
                 positional: str | None = None) -> None:  # fmt: skip
        super().__init__(prog, usage, description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=True, add_help=False)  # fmt: skip
        self.add_argument("-h", "--help", action=_Help, nargs="?", metavar="WORD", default=argparse.SUPPRESS,
                          help="show this page, or the flags that mention WORD")  # fmt: skip
        self.flags: dict[str, Flag] = {}
        self._positional = positional
        self._where = ""

    def add_flags(self, table: Iterable[Flag]) -> None:
        """Add every row of a table, in groups, those without an effect unlisted."""
        groups: dict[str, Any] = {}
        for flag in table:
            group = groups.get(flag.group) or groups.setdefault(flag.group, self.add_argument_group(flag.group))
            hidden = not flag.to and (flag.reason or flag.missing)
            keywords: dict[str, Any] = {
                "dest": flag.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS if hidden else flag.help,
            }  # fmt: skip
            if flag.kind == "bool":
                keywords["action"] = argparse.BooleanOptionalAction
            else:
                types: dict[Kind, Any] = {"int": int, "float": float, "size": size}
                keywords.update(type=flag.parse or types.get(flag.kind, str), choices=flag.choices)
                if flag.choices is None:
                    keywords["metavar"] = flag.metavar or ("JSON" if flag.kind == "json" else flag.kind.upper())
                if flag.kind == "words":
                    keywords["nargs"] = "+"
            group.add_argument(*flag.names.split(), **keywords)
            self.flags.update(dict.fromkeys(flag.names.split(), flag))

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse everything: what is left over is an error, so the returned list is empty."""
        given, dotted = self._normalise(sys.argv[1:] if args is None else args)
        result, rest = super().parse_known_args(given, namespace)
        if getattr(result, "config", None) is not None and "--config" in self.flags:
            result, rest = super().parse_known_args(given, self._parse_config(result.config))
        self._place(result, rest)
        self._finish(result, dotted)
        return result, []

    def _parse_config(self, path: str) -> argparse.Namespace:
        """What a YAML file gives, for the command line to override."""
        self._where = f"in {path}: "
        given, dotted = self._normalise(self._config_tokens(path))
        result, rest = super().parse_known_args(given, None)
        if rest:
            self.error(f"cannot use {' '.join(rest)}")
        self._finish(result, dotted)
        self._where = ""
        return result

    def _config_tokens(self, path: str) -> list[str]:
        """The file's entries as command line tokens."""
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"cannot read it as YAML: {error}")
        if content is not None and not isinstance(content, Mapping):
            self.error(f"must hold `name: value` lines, holds a {type(content).__name__}")
        tokens: list[str] = []
        for key, value in (content or {}).items():
            name = "--" + str(key).lstrip("-").split(".")[0].replace("_", "-")
            name = "--model" if name == "--model-tag" else name
            flag = self.flags.get(name)
            if flag is None or name == "--config":
                self.error(f"unknown key {key!r}{self._nearest(name)}")
            if value is None:
                continue
            dots = str(key).partition(".")[2]
            tokens += self._config_entry(f"{name}.{dots}" if dots else name, flag, value)
        return tokens

    def _config_entry(self, name: str, flag: Flag, value: Any) -> list[str]:
        if flag.kind == "bool":
            if not isinstance(value, bool):
                self.error(f"{name} must be true or false, got {value!r}")
            return [name if value else f"--no-{name[2:]}"]
        if flag.kind == "json":
            dotted_text = "." in name and isinstance(value, str)
            return [f"{name}={value if dotted_text or isinstance(value, str) else json.dumps(value)}"]
        if flag.kind == "words":
            return [name, *map(str, value if isinstance(value, list) else [value])]
        if isinstance(value, list | dict | bool):
            self.error(f"{name} takes one value, got {value!r}")
        return [f"{name}={value}"]

    def _normalise(self, tokens: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Underscores in names to dashes; dotted parts of JSON flags taken out, as nested dictionaries by dest."""
        rest: list[str] = []
        dotted: dict[str, Any] = {}
        stream = iter(tokens)
        for token in stream:
            name, equals, value = token.partition("=")
            if token.startswith("--") and "_" in name:
                head, dot, tail = name.partition(".")
                token = head.replace("_", "-") + dot + tail + equals + value
            match = _DOTTED.fullmatch(token)
            flag = self.flags.get(match[1]) if match else None
            if match is None or flag is None or flag.kind != "json":
                rest.append(token)
                continue
            text = match[3] if match[3] is not None else next(stream, None)
            if text is None:
                self.error(f"{token} needs a value")
            nested: Any = _json_or_text(text)
            for part in reversed(match[2].split(".")):
                nested = {part: nested}
            dotted = _merge(dotted, {flag.dest: nested})
        return rest, dotted

    def _place(self, result: argparse.Namespace, rest: list[str]) -> None:
        """Leftovers are the positional argument or an error."""
        for token in rest:
            if token.startswith("-") and token != "--":
                name = token.split("=")[0]
                self.error(f"unknown flag {name}{self._nearest(name)}")
        extra = [token for token in rest if token != "--"]
        if extra and (self._positional is None or len(extra) > 1):
            self.error(f"unexpected {' '.join(extra[self._positional is not None:])!r}")
        if self._positional is not None and extra:
            setattr(result, self._positional.lower(), extra[0])

    def _finish(self, result: argparse.Namespace, dotted: Mapping[str, Any]) -> None:
        """Texts of JSON flags to values, with their dotted parts merged in; lists to tuples."""
        for flag in {id(flag): flag for flag in self.flags.values()}.values():
            value = getattr(result, flag.dest, None)
            if flag.kind == "json" and isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    self.error(f"{flag.long} must be JSON, got {value!r} ({error})")
            if flag.kind == "json" and flag.dest in dotted:
                value = _merge(value if isinstance(value, dict) else {}, dotted[flag.dest])
            if flag.kind == "words" and isinstance(value, list):
                try:
                    value = words(value)
                except ValueError as error:
                    self.error(f"{flag.long} {error}")
            if value is not None:
                setattr(result, flag.dest, value)

    def _nearest(self, name: str) -> str:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        return f"; did you mean {close[0]}?" if close else ""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one message, without the page of usage."""
        self.exit(2, f"{self.prog}: error: {self._where}{message}\nSee {self.prog} --help.\n")


class _Help(argparse.Action):
    """`--help`, and `--help=WORD` for the flags whose name, group or text holds the word ("all" for every flag)."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:  # fmt: skip
        if values is None or not isinstance(parser, FlagParser) or not parser.flags:
            parser.print_help()
            parser.exit()
        word = str(values).lower()
        found = False
        for flag in {id(flag): flag for flag in parser.flags.values()}.values():
            about = flag.help or (f"no effect: {flag.reason}" if flag.reason else f"not yet possible: {flag.missing}")
            if word == "all" or word in f"{flag.names} {flag.group} {about}".lower():
                found = True
                print(f"  {', '.join(flag.names.split())}\n      {about}  [{flag.group}]")
        parser.exit(0 if found else 2, "" if found else f"No flag mentions {values!r}.\n")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

"""`saddle chat`: a conversation with a server, in the terminal or through a pipe.

Thinking is printed dimmed, tool calls as blocks whose results the user types. Ctrl-C cancels the answer under way (the
closed connection ends the request on the server) and, at the prompt, the program. The history keeps what the model
thought, because M2 expects its thinking back. The answer goes to standard output, everything else to standard error
when output is not a terminal, so that `saddle chat "question" > answer.txt` holds the answer alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saddle import env
from saddle.cli.flags import Flag, FlagParser
from saddle.errors import SaddleError, StartupError

if TYPE_CHECKING:
    import aiohttp

DEFAULT_URL = "http://127.0.0.1:8000/v1"
FLAGS: tuple[Flag, ...] = (
    Flag(names="--url", help=f"address of the API; default {DEFAULT_URL}"),
    Flag(names="--model --model-name", help="default: the first that the server names"),
    Flag(names="--api-key", help="default: SADDLE_API_KEY or VLLM_API_KEY of the environment"),
    Flag(names="--system --system-prompt", metavar="TEXT", help="system message"),
    Flag(names="--tools", metavar="FILE", help="JSON list of tools in the OpenAI form to offer"),
    Flag(names="--temperature", kind="float", help="default: the server's"),
    Flag(names="--max-tokens", kind="int", help="most tokens of an answer"),
)


class ChatError(SaddleError):
    """The server refused or broke off; the message is its own."""


@dataclass(slots=True)
class Call:
    """A tool call as it arrives."""

    call_id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Turn:
    """An answer as it arrives."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: dict[str, Any], on_text: Callable[[str, bool], None]) -> None:
        """Take one chunk; `on_text(text, is_thinking)` gets what is to be shown at once."""
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning") or delta.get("reasoning_content")
            if thought:
                self.reasoning += thought
                on_text(thought, True)
            if delta.get("content"):
                self.content += delta["content"]
                on_text(delta["content"], False)
            for part in delta.get("tool_calls") or ():
                while len(self.calls) <= part["index"]:
                    self.calls.append(Call())
                call, function = self.calls[part["index"]], part.get("function") or {}
                call.call_id = part.get("id") or call.call_id
                call.name += function.get("name") or ""
                call.arguments += function.get("arguments") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def message(self) -> dict[str, Any]:
        """The turn as the history keeps it."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found["tool_calls"] = [
                {"id": call.call_id, "type": "function",
                 "function": {"name": call.name, "arguments": call.arguments or "{}"}}
                for call in self.calls
            ]  # fmt: skip
        return found


class Screen:
    """Prints a turn: thinking dimmed, the answer plain, tool calls boxed."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(soft_wrap=True, emoji=False)
        self.aside = console if console.is_terminal else Console(stderr=True, soft_wrap=True, emoji=False)
        self._open: bool | None = None  # what the unfinished line holds: thinking, the answer, nothing

    def text(self, text: str, thinking: bool) -> None:
        """Show text as it arrives; the answer is written as it is, but for escape sequences on a terminal."""
        if self._open is not None and self._open != thinking:
            self._end_line()
        if self._open is None:
            text = text.lstrip("\n")
        if not text:
            return
        self._open = thinking
        if sys.stdout.isatty():
            text = text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")
        if thinking:
            self.aside.print(text, end="", style="dim italic", markup=False, highlight=False)
            self.aside.file.flush()
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    def finish(self, turn: Turn) -> None:
        """End the line and show what is not text."""
        from rich.json import JSON
        from rich.panel import Panel

        self._end_line()
        for call in turn.calls:
            try:
                body: Any = JSON(call.arguments or "{}")
            except ValueError:  # cut off by the token limit
                body = call.arguments
            self.aside.print(Panel(body, title=f"tool call: {call.name}", title_align="left", expand=False))
        if turn.finish_reason == "length":
            self.note("the answer was cut off by the token limit")

    def note(self, text: str) -> None:
        self._end_line()
        self.aside.print(f"[{text}]", style="yellow", markup=False, highlight=False)

    def _end_line(self) -> None:
        if self._open is not None:
            (self.aside.file if self._open else sys.stdout).write("\n")
        self._open = None


class Chat:
    """A conversation: its history, and the requests that extend it."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, screen: Screen,
                 options: dict[str, Any], system: str | None) -> None:  # fmt: skip
        self._session, self._url, self._model, self._screen = session, url, model, screen
        self._options, self._system = options, system
        self.history: list[dict[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        self.history = [{"role": "system", "content": self._system}] if self._system else []

    async def ask(self, text: str) -> Turn | None:
        """One user message and its answer; None when it was cancelled. A cancelled or failed answer without text
        takes its question out of the history again."""
        return await self._extend([{"role": "user", "content": text}])

    async def give_results(self, results: list[str]) -> Turn | None:
        """Results of the last turn's tool calls in their order, and the answer to them."""
        self.keep_results(results)
        return await self._extend([])

    def keep_results(self, results: list[str]) -> None:
        """Put results of the last turn's tool calls into the history; a call without one was not run."""
        calls = self.history[-1]["tool_calls"]
        texts = results + ["The user did not run this tool."] * (len(calls) - len(results))
        self.history += [
            {"role": "tool", "tool_call_id": call["id"], "content": text}
            for call, text in zip(calls, texts, strict=True)
        ]  # fmt: skip

    async def _extend(self, messages: list[dict[str, Any]]) -> Turn | None:
        turn, before = Turn(), len(self.history)
        self.history += messages
        try:
            await self._stream(turn)
        except (asyncio.CancelledError, ChatError) as error:
            self._keep_partial(turn, before)
            if isinstance(error, ChatError):
                self._screen.finish(Turn())
                raise
            self._screen.note("cancelled")
            return None
        self.history.append(turn.message())
        self._screen.finish(turn)
        return turn

    def _keep_partial(self, turn: Turn, before: int) -> None:
        if turn.content:
            turn.calls.clear()  # half a call cannot be answered
            self.history.append(turn.message())
        else:
            del self.history[before:]

    async def _stream(self, turn: Turn) -> None:
        import aiohttp

        from saddle.bench.sse import Splitter

        body = {"model": self._model, "messages": self.history, "stream": True, **self._options}
        splitter = Splitter()
        try:
            async with self._session.post(self._url + "/chat/completions", json=body) as response:
                if response.status != 200:
                    raise ChatError(error_text(await response.text(), f"HTTP {response.status}"))
                async for data in response.content.iter_any():
                    for payload in splitter.feed(data):
                        if payload == b"[DONE]":
                            return
                        chunk = json.loads(payload)
                        if chunk.get("error"):
                            raise ChatError(error_text(payload.decode(), "the stream failed"))
                        turn.add(chunk, self._screen.text)
        except (aiohttp.ClientError, OSError, json.JSONDecodeError) as error:
            raise ChatError(f"{self._url} broke off: {error}") from None
        raise ChatError(f"{self._url} broke off: the stream ended without [DONE]")


def error_text(body: str, otherwise: str) -> str:
    """The message of an error body of the OpenAI API."""
    try:
        error = json.loads(body)["error"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"{otherwise}: {body[:500]}"
    return f"{otherwise}: {error['message'] if isinstance(error, dict) else error}"


def add_parser(subparsers: Any) -> None:
    """Register the command with the main parser's subparsers."""
    parser: FlagParser = subparsers.add_parser(
        "chat", help="talk to a server from the terminal", positional="QUESTION",
        description='Talk to a server. With QUESTION, one answer and no conversation. In a conversation, /clear '
        "forgets it,\n/exit or Ctrl-D ends it, Ctrl-C cancels the answer under way.",
        usage="saddle chat [QUESTION] [flags]",
    )  # fmt: skip
    parser.add_flags(FLAGS)


def run(args: argparse.Namespace) -> int:
    """Hold the conversation; returns the exit code.

    Raises:
        StartupError: a flag is wrong, or the server does not answer.
    """
    given = vars(args)
    loop = asyncio.new_event_loop()
    try:
        return _converse(loop, given)
    finally:
        loop.close()


def _converse(loop: asyncio.AbstractEventLoop, given: dict[str, Any]) -> int:
    screen = Screen()
    options: dict[str, Any] = {name: given[name] for name in ("temperature", "max_tokens") if name in given}
    if "tools" in given:
        options["tools"] = _tools(given["tools"])
    url = str(given.get("url", DEFAULT_URL)).rstrip("/")
    keys = [given["api_key"]] if "api_key" in given else env.api_keys()
    session, model = loop.run_until_complete(_connect(url, keys[0] if keys else None, given.get("model")))
    chat = Chat(session, url, model, screen, options, given.get("system"))
    try:
        if "question" in given:
            return 0 if _turn(loop, chat.ask(given["question"])) is not None else 130
        screen.note(f"{model} at {url}; /clear forgets, /exit ends, Ctrl-C cancels an answer")
        return _repeat(loop, chat, screen)
    finally:
        loop.run_until_complete(session.close())


async def _connect(url: str, key: str | None, model: str | None) -> tuple[aiohttp.ClientSession, str]:
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10))
    try:
        async with session.get(url + "/models") as response:
            text = await response.text()
            if response.status != 200:
                raise StartupError(f"{url}/models: {error_text(text, f'HTTP {response.status}')}")
            return session, model or str(json.loads(text)["data"][0]["id"])
    except (aiohttp.ClientError, OSError, ValueError, KeyError, IndexError) as error:
        await session.close()
        raise StartupError(f"{url} does not answer as a server should ({error}). Is it running? Give its address "
                           "with --url.") from None  # fmt: skip
    except StartupError:
        await session.close()
        raise


def _tools(path: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise StartupError(f"--tools must be a JSON file: {error}") from None
    if not isinstance(found, list):
        raise StartupError(f"--tools must hold a JSON list of tools, {path} holds a {type(found).__name__}.")
    return found


def _turn(loop: asyncio.AbstractEventLoop, work: Any) -> Turn | None:
    """Run one request; an interrupt cancels it."""
    task = loop.create_task(work)
    previous = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        found: Turn | None = loop.run_until_complete(task)
        return found
    except asyncio.CancelledError:
        return None
    finally:
        signal.signal(signal.SIGINT, previous)


def _repeat(loop: asyncio.AbstractEventLoop, chat: Chat, screen: Screen) -> int:
    while True:
        try:
            line = _ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            screen.aside.print()
            return 0
        if line == "/exit":
            return 0
        if line == "/clear":
            chat.clear()
            screen.note("forgotten")
        elif line.startswith("/"):
            screen.note("commands are /clear and /exit")
        elif line:
            try:
                turn = _turn(loop, chat.ask(line))
                while turn is not None and turn.calls:
                    turn = _answer_calls(loop, chat, turn.calls)
            except ChatError as error:
                screen.note(str(error))


def _answer_calls(loop: asyncio.AbstractEventLoop, chat: Chat, calls: list[Call]) -> Turn | None:
    """Ask the user what the tools returned, and go on; None when the user does not say."""
    results: list[str] = []
    try:
        for call in calls:
            results.append(_ask(f"result of {call.name}> "))
    except (EOFError, KeyboardInterrupt):
        chat.keep_results(results)
        return None
    return _turn(loop, chat.give_results(results))


def _ask(prompt: str) -> str:
    """A line of standard input; the prompt is shown only to a person."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() history and editing)

        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")

"""What a start looks like at the terminal and in a log."""

from __future__ import annotations

import asyncio
import io
import re
import sys

import pytest

from saddle.engine.client import EngineState
from saddle.protocol import EngineReady
from saddle.server import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def load(state: EngineState) -> None:
    for share in (0.25, 0.5, 0.75):
        state.phase, state.share, state.note = "loading weights", share, f"{share:.2f} GB"
        await asyncio.sleep(0.02)
    state.ready = EngineReady(16, 16, 1, 1)


class Lines:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, form: str, *values: object) -> None:
        self.lines.append(form % values)


async def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.015)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log = Lines()
    monkeypatch.setattr(progress, "logger", log)
    state = EngineState()
    await asyncio.gather(progress.show_loading(state), load(state))
    lines = log.lines
    assert 1 <= len(lines) <= 5  # about one in 15 ms of 60, not one in each look
    assert all(re.fullmatch(r"loading weights \d\d% \(0\.\d\d GB\)", line) for line in lines)


async def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.001)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    state = EngineState()
    await asyncio.gather(progress.show_loading(state), load(state))
    assert "loading weights" in terminal.getvalue()
    assert "0.75 GB" in terminal.getvalue()


async def test_an_engine_that_dies_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    state = EngineState(dead="no memory")
    await asyncio.wait_for(progress.show_loading(state), 1)

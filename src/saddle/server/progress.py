"""Loading, as the person at the terminal sees it: a bar, or a line now and then where there is no terminal."""

from __future__ import annotations

import asyncio
import logging
import sys

from saddle.engine.client import EngineState

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
LINE_EVERY_S = 10.0


def describe(state: EngineState) -> str:
    """`loading weights 42 % (12.3 GB)`"""
    note = f" ({state.note})" if state.note else ""
    return f"{state.phase} {state.share:.0%}{note}"


async def show_loading(state: EngineState) -> None:
    """Show how far the engine is until it is ready or dead."""
    if sys.stderr.isatty():
        await _bar(state)
    else:
        await _lines(state)


def _is_over(state: EngineState) -> bool:
    return state.ready is not None or state.dead is not None


async def _bar(state: EngineState) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(state.phase, total=1.0, note="")
        while not _is_over(state):
            progress.update(task, description=state.phase, completed=state.share, note=state.note)
            await asyncio.sleep(LOOK_EVERY_S)


async def _lines(state: EngineState) -> None:
    loop = asyncio.get_running_loop()
    said_s = loop.time()
    while not _is_over(state):
        await asyncio.sleep(LOOK_EVERY_S)
        if loop.time() - said_s >= LINE_EVERY_S and not _is_over(state):
            said_s = loop.time()
            logger.info("%s", describe(state))

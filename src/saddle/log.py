"""Logging set-up: one short line a record on standard error, the same for Saddle and its HTTP server.

    07:41:03 INFO  engine: 1,024 blocks of 16 tokens

Modules take `logging.getLogger(__name__)`; the leading `saddle.` is not printed.
"""

from __future__ import annotations

import logging
import sys

WIDEST_LEVEL = 5
COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m"}


class ShortFormatter(logging.Formatter):
    """Time, level, room and message; warnings and errors coloured on a terminal."""

    def __init__(self, coloured: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        level = "WARN" if record.levelno == logging.WARNING else record.levelname
        room = record.name.removeprefix("saddle.").removeprefix("uvicorn.").split(".")[0]
        line = f"{self.formatTime(record, self.datefmt)} {level:{WIDEST_LEVEL}} {room}: {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        colour = COLOURS.get(record.levelno) if self._coloured else None
        return f"{colour}{line}\033[0m" if colour else line


def setup(level: str = "INFO") -> None:
    """Send the records of Saddle and uvicorn at `level` and above to standard error; safe to call twice."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShortFormatter(coloured=sys.stderr.isatty()))
    for name in ("saddle", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    # What uvicorn says about its own start and end, Saddle says better.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)

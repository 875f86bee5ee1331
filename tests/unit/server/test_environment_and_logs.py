"""The variables that are read, and the line that is logged."""

from __future__ import annotations

import logging

import pytest

from saddle import env, log
from saddle.errors import StartupError


def test_api_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SADDLE_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert env.api_keys() == ()
    monkeypatch.setenv("VLLM_API_KEY", "a")
    assert env.api_keys() == ("a",)
    monkeypatch.setenv("SADDLE_API_KEY", "b, c,,")
    assert env.api_keys() == ("b", "c")


def test_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SADDLE_LOG_LEVEL", raising=False)
    assert env.log_level() == "INFO"
    monkeypatch.setenv("SADDLE_LOG_LEVEL", "debug")
    assert env.log_level() == "DEBUG"
    monkeypatch.setenv("SADDLE_LOG_LEVEL", "loud")
    with pytest.raises(StartupError, match="one of DEBUG, INFO"):
        env.log_level()


def test_line() -> None:
    formatter = log.ShortFormatter(coloured=False)
    record = logging.LogRecord("saddle.engine.core", logging.WARNING, "f", 1, "%d blocks", (3,), None)
    assert formatter.format(record).split(" ", 1)[1] == "WARN  engine: 3 blocks"
    record = logging.LogRecord("uvicorn.access", logging.INFO, "f", 1, "GET /", (), None)
    assert formatter.format(record).endswith("INFO  access: GET /")
    assert log.ShortFormatter(coloured=True).format(record).count("\033") == 0


def test_setup_is_idempotent(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("saddle", "uvicorn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        log.setup()
        log.setup("WARNING")
        logging.getLogger("saddle.server.serve").warning("once")
        logging.getLogger("saddle.server.serve").info("never")
        log.setup()
        logging.getLogger("uvicorn.error").info("never")
        text = capsys.readouterr().err
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
    assert text.count("server: once") == 1
    assert "never" not in text

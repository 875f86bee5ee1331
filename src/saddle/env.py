"""The environment variables that Saddle reads; nothing else in the package looks at `os.environ`.

A flag on the command line wins over its variable: callers pass these values as defaults.
"""

from __future__ import annotations

import os
from pathlib import Path

from saddle.errors import StartupError

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def api_keys() -> tuple[str, ...]:
    """Keys that clients may present: SADDLE_API_KEY, else VLLM_API_KEY, several separated by commas."""
    text = os.environ.get("SADDLE_API_KEY") or os.environ.get("VLLM_API_KEY") or ""
    return tuple(key for key in (part.strip() for part in text.split(",")) if key)


def log_level() -> str:
    """SADDLE_LOG_LEVEL, INFO when unset.

    Raises:
        StartupError: the value is no level.
    """
    level = os.environ.get("SADDLE_LOG_LEVEL", "INFO").upper()
    if level not in LOG_LEVELS:
        raise StartupError(f"SADDLE_LOG_LEVEL must be one of {', '.join(LOG_LEVELS)}, got {level!r}.")
    return level


def cache_dir() -> Path:
    """Where compiled kernels are kept: SADDLE_CACHE_DIR, else `saddle` in the folder that the user's caches lie in."""
    own = os.environ.get("SADDLE_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saddle"

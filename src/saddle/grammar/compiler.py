"""Importing xgrammar without most of what it imports.

It takes transformers and torch for the types of arguments that nothing here passes: half a second of Python in an
engine that serves meanwhile, and 200 MiB in a process that only compiles. Stand-ins take their places while it is
imported, where the real ones are not loaded already. If a later xgrammar wants more of them, the real ones are loaded.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
BINDINGS = "tvm_ffi"  # of xgrammar; looks for torch itself


class StandIn(ModuleType):
    """A module in which every name is a class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, made)
        return made


def load_xgrammar(*, alone: bool = False) -> Any:
    """The module xgrammar.

    Args:
        alone: for a process that does nothing else: torch is not loaded either, and stays away.
    """
    absent = [name for name in ("transformers", *(["torch"] if alone else [])) if name not in sys.modules]
    before = set(sys.modules)
    try:
        if "torch" in absent:
            sys.modules["torch"] = None  # type: ignore[assignment]  # "not installed": then it does without
            importlib.import_module(BINDINGS)
        for name in absent:
            sys.modules[name] = StandIn(name)
        return importlib.import_module("xgrammar")
    except Exception as error:
        logger.info("xgrammar is imported with all that it asks for (%s).", error)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("xgrammar", BINDINGS):
                del sys.modules[name]
        _remove(absent)
        return importlib.import_module("xgrammar")
    finally:
        if not alone:
            _remove(absent)  # whoever wants the real one later gets it


def _remove(names: list[str]) -> None:
    for name in names:
        if name in sys.modules and (sys.modules[name] is None or isinstance(sys.modules[name], StandIn)):
            del sys.modules[name]

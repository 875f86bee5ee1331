"""Saddle: the serving engine for the MiniMax-M2 family.

    from saddle import LLM, SamplingParams

Both are loaded when they are first used, so that importing a submodule costs nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saddle.llm import LLM
    from saddle.protocol import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from saddle.llm import LLM

        return LLM
    if name == "SamplingParams":
        from saddle.protocol import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'saddle' has no attribute {name!r}")

from __future__ import annotations

from tests.unit.parsing.conftest import tokenizer  # noqa: F401  a fixture

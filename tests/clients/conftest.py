from __future__ import annotations

from tests.serve.conftest import tokenizer_folder  # noqa: F401  a fixture

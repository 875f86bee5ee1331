from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from saddle.parsing.tokenizer import Tokenizer
from tests.serve.processes import ServerProcess
from tests.support.tokenizer import build_tokenizer

SCRIPTED = ("-m", "tests.serve.device")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder without weights: enough for a scripted device."""
    folder = tmp_path_factory.mktemp("scripted")
    build_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    eos = Tokenizer.load(folder).eos_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[ServerProcess]:
    """The demo checkpoint's server; at the end it is idle, stops well, leaves no process and logged no traceback."""
    server = ServerProcess(arguments)
    yield server
    server.wait_idle()
    assert server.stop() == 0, server.log()
    assert server.leaves_no_process()
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """A client of the module's own `server`."""
    with openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:
        yield client

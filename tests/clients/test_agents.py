"""Coding agents, headless, against a real server process: each finishes a loop with a tool call.

`make test-clients` installs them from npm (about 0.9 GB in `.clients/`) and says what it skipped. The model is
scripted: no checkpoint that fits a test can drive a prompt of 78 kB. Everything above it is the server that users run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.agents import AGENTS, install
from tests.clients.device import WORD
from tests.serve.processes import ServerProcess


@pytest.fixture(scope="module")
def server(tokenizer_folder: Path) -> Iterator[ServerProcess]:
    process = ServerProcess([str(tokenizer_folder)], ("-m", "tests.clients.device"))
    yield process
    process.stop()


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_finishes_a_tool_loop(name: str, server: ServerProcess, tmp_path: Path) -> None:
    agent = AGENTS[name]
    missing = install(agent, lambda text: print(text, flush=True))
    if missing is not None:
        pytest.skip(missing)
    before = server.metrics()
    done = agent.run(tmp_path, server.base)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}\nserver:\n{server.log()[-2000:]}"
    assert done.returncode == 0, said
    assert f"The command printed {WORD}." in done.stdout, said
    after = server.metrics()
    asked = {key: after[key] - before.get(key, 0) for key in after if key.startswith("prefix_cache_hits")}
    assert sum(asked.values()) > 0, f"the second turn found nothing in the prefix cache: {asked}"
    server.wait_idle()

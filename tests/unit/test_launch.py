"""What the composition root decides and says by itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from saddle.errors import StartupError
from saddle.launch import build_renderer
from saddle.parsing.conversation import normalise
from saddle.parsing.replay import ReplayStore
from saddle.parsing.tokenizer import Tokenizer
from tests.support.tokenizer import build_tokenizer

# As an earlier model of the same makers has it: other tags around its calls.
FOREIGN = "{% for m in messages %}{{ m.content }}<tool_calls></tool_calls>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_template_of_another_model_is_named(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "other.jinja"
    path.write_text(FOREIGN)
    with caplog.at_level(logging.WARNING, "saddle.launch"):
        made = build_renderer(tokenizer, str(path), ReplayStore(0))
    [record] = caplog.records
    assert "--chat-template never writes <minimax:tool_call>" in record.getMessage()
    assert made.render(normalise([{"role": "user", "content": "x"}])).text.startswith("x<tool_calls>"), "it is used"


@pytest.mark.parametrize("template", [None, FOREIGN.replace("tool_calls", "minimax:tool_call")])
def test_a_template_with_the_tags_is_not(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, template: str | None
) -> None:
    with caplog.at_level(logging.WARNING, "saddle.launch"):
        build_renderer(tokenizer, template, ReplayStore(0))
    assert not caplog.records


def test_a_template_that_cannot_be_read(tokenizer: Tokenizer) -> None:
    with pytest.raises(StartupError, match=r"--chat-template /no/such\.jinja: No such file"):
        build_renderer(tokenizer, "/no/such.jinja", ReplayStore(0))

"""`saddle bench step` on a CPU: real steps through the runner, one line for each point."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from saddle.cli.main import main
from saddle.config import CompileConfig, EngineConfig, LoadConfig, SchedulerConfig
from saddle.perf import step
from saddle.runner.runner import Runner
from tests.support.checkpoint import SMALL, write_random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), SMALL)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_points(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    forward = Runner.forward
    monkeypatch.setattr(Runner, "forward", lambda self, plan: (seen.append(plan), forward(self, plan))[1])
    argv = ["bench", "step", "--model", str(folder), "--load-format", "dummy", "--hf-overrides",
            '{"num_hidden_layers": 2}', "--batch", "1,3", "--context", "100", "--prefill", "90", "--routing", "model",
            "--max-num-batched-tokens", "64", "--json"]  # fmt: skip
    assert main(argv) == 0
    found = lines(capsys)
    assert [(line["kind"], line["batch"]) for line in found] == [("decode", 1), ("decode", 3), ("prompt", 1)]
    for line in found:
        assert (line["layers"], line["card"], line["routing"]) == (2, "CPU", "model")
        assert line["step_ms"] > 0 and line["host_ms"] > 0
        assert line["floor_ms"] is None  # the floor of a CPU is not known
    assert found[0]["mean_context"] == pytest.approx(100, abs=5)
    assert found[2]["tokens_per_s"] == pytest.approx(1e3 * 90 / found[2]["step_ms"], rel=1e-3)
    steps = step.WARM_STEPS + step.STEPS
    decodes = [plan for plan in seen if plan.step_id > 0][: 2 * steps]
    assert [plan.num_tokens for plan in decodes] == [1] * steps + [3] * steps
    prompts = [plan for plan in seen if plan.step_id > 0][2 * steps :]
    assert [plan.num_tokens for plan in prompts] == [64, 26] * (step.PROMPT_RUNS + 1)
    assert [plan.work[0].samples for plan in prompts[:2]] == [False, True]


def test_a_card_is_warm_before_its_first_point(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    asked: list[tuple[int, ...]] = []

    def point(*what: int) -> None:
        now[0] += 0.4
        asked.append(what)

    monkeypatch.setattr(step.time, "monotonic", lambda: now[0])
    driver = cast(step.Driver, SimpleNamespace(decode=point, prompt=point, info=SimpleNamespace(max_num_seqs=4)))
    step.warm_up(driver, step.StepSpec(batches=(8, 1), contexts=(50, 60)))
    assert asked == [(4, 50)] * 3  # a batch that there is no room for is refused later, by name
    step.warm_up(driver, step.StepSpec(batches=(), prompts=(400,)))
    assert asked[3:] == [(400,)] * 3


def test_a_table_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", str(folder), "--batch", "2", "--context", "40"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["kind", "batch", "context"]
    assert row.split()[:3] == ["decode", "2", "40"]


def test_sizes_fit_the_points() -> None:
    spec = step.StepSpec(batches=(1, 6), contexts=(50,), prompts=(400,))
    found = step.fitting(EngineConfig(load=LoadConfig(model="m")), spec)
    assert found.scheduler.max_num_seqs == 6
    assert found.scheduler.max_model_len == 400 + step.WARM_STEPS + step.STEPS + 2
    assert found.compile.capture_sizes(6) == (1, 6)
    given = EngineConfig(load=LoadConfig(model="m"), scheduler=SchedulerConfig(max_num_seqs=9, max_model_len=77),
                         compile=CompileConfig(cudagraph_capture_sizes=(4,)))  # fmt: skip
    assert step.fitting(given, spec) == given


@pytest.mark.parametrize(("argv", "message"), [
    (["step", "--batch", "4", "--max-num-seqs", "2"], "--batch 4 needs as many rows"),
    (["kernels"], "saddle bench kernels needs a GPU"),
])  # fmt: skip
def test_what_cannot_work_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(["bench", argv[0], "--model", str(folder), *argv[1:], "--context", "40"]) == 1
    assert message in capsys.readouterr().err


def test_counts_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "step", "--batch", "0"])
    assert "must be counts of 1 or more" in capsys.readouterr().err

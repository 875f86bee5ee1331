"""`saddle serve` as a table: every configuration field has a flag, every flag of vLLM is known, none is silent."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from saddle.cli import main, serve, serve_flags
from saddle.cli.flags import Flag, FlagParser
from saddle.config import CacheConfig, CompileConfig, EngineConfig, LoadConfig, SchedulerConfig, ServerConfig
from saddle.errors import StartupError

SECTIONS = {"load": LoadConfig, "cache": CacheConfig, "scheduler": SchedulerConfig, "compile": CompileConfig,
            "server": ServerConfig}  # fmt: skip
# Every flag of `vllm serve` that users of M2 are known to give.
VLLM_FLAGS = """
--host --port --uds --api-key --served-model-name --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs
--ssl-ciphers --enable-ssl-refresh --allowed-origins --root-path --middleware --disable-uvicorn-access-log
--disable-access-log-for-endpoints --enable-request-id-headers --chat-template --chat-template-content-format
--trust-request-chat-template --default-chat-template-kwargs --tool-call-parser --enable-auto-tool-choice
--reasoning-parser --tool-strict-level --exclude-tools-when-tool-choice-none --tensor-parallel-size -tp
--pipeline-parallel-size -pp --data-parallel-size -dp --enable-expert-parallel -ep --all2all-backend --enable-eplb
--eplb-config --data-parallel-size-local --data-parallel-address --data-parallel-rpc-port --data-parallel-start-rank
--headless --data-parallel-external-lb --data-parallel-hybrid-lb --api-server-count -asc --distributed-executor-backend
--max-model-len --gpu-memory-utilization --kv-cache-memory-bytes --kv-cache-dtype --block-size --max-num-seqs
--max-num-batched-tokens --enable-prefix-caching --no-enable-prefix-caching --prefix-caching-hash-algo
--enable-chunked-prefill --max-num-queued-reqs --max-num-queued-tokens --long-prefill-token-threshold
--prefill-schedule-interval --watermark --scheduling-policy --async-scheduling --stream-interval --dtype --quantization
--load-format --trust-remote-code --tokenizer --revision --download-dir --safetensors-load-strategy --hf-overrides
--compilation-config -cc -O --enforce-eager --moe-backend --linear-backend --attention-backend --speculative-config
--spec-method --spec-model --spec-tokens --generation-config --override-generation-config --seed --max-logprobs
--logprobs-mode --disable-log-stats --enable-log-requests --enable-log-outputs --max-log-len
--enable-prompt-tokens-details --enable-force-include-usage --enable-server-load-tracking --sse-keep-alive-interval
--h11-max-incomplete-event-size --h11-max-header-count --structured-outputs-config --kv-transfer-config
--kv-offloading-size --kv-offloading-backend --otlp-traces-endpoint --shutdown-timeout --fingerprint-mode --config
--enable-lora --lora-modules --max-num-partial-prefills --swap-space --cpu-offload-gb --enable-sleep-mode
--disable-custom-all-reduce --limit-mm-per-prompt --tool-parser-plugin --reasoning-parser-plugin
"""


def parser() -> FlagParser:
    top = FlagParser(prog="saddle")
    serve.add_parser(top.add_subparsers(dest="command"))
    return top


def configs(*argv: str, **kwargs: Any) -> tuple[EngineConfig, ServerConfig, list[str]]:
    return serve.configs(vars(parser().parse_args(["serve", *argv])), **kwargs)


def example(flag: Flag) -> str | None:
    """A value for a flag; None where the flag stands alone."""
    if flag.kind == "bool":
        return None
    if flag.choices:
        return flag.choices[-1]
    special = {
        "--max-model-len": "4K", "--reasoning-parser": "minimax-append-think", "--tool-call-parser": "",
        "--block-size": "32", "--gpu-memory-utilization": "0.5", "--kv-cache-dtype": "fp8",
        "--cudagraph-capture-sizes": "8",
    }  # fmt: skip
    return special.get(flag.long, {"json": '{"k": 1}', "int": "2", "size": "2", "float": "2"}.get(flag.kind, "text"))


def test_every_field_has_a_flag() -> None:
    reachable = {target for flag in serve.FLAGS for target in flag.to} - {"cli.config"}
    wanted = {f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in fields(cls)}
    assert reachable == wanted
    assert [field.name for field in fields(EngineConfig)] == ["load", "cache", "scheduler", "compile"]
    assert all(is_dataclass(cls) for cls in SECTIONS.values())


@pytest.mark.parametrize("flag", [f for f in serve_flags.FLAGS if f.long not in ("--config", "--ssl-keyfile",
                         "--ssl-certfile")], ids=lambda flag: flag.long)  # fmt: skip
def test_every_flag_sets_its_fields(flag: Flag) -> None:
    value = example(flag)
    name = "--no-" + flag.long[2:] if flag.dest in ("enable_prefix_caching", "async_scheduling") else flag.long
    argv = ["m", name] if value is None else ["m", f"{flag.long}={value}"]
    engine, server, notes = configs(*(argv if flag.long != "--model" else argv[1:]))
    default_engine, default_server, _ = configs("m")
    for target in flag.to:
        section, field = target.split(".")
        now, then = (
            getattr(s if section == "server" else getattr(e, section), field)
            for e, s in ((engine, server), (default_engine, default_server))
        )
        assert now != then
    assert notes == []


@pytest.mark.parametrize("name", VLLM_FLAGS.split())
def test_vllm_flags_are_known(name: str) -> None:
    found = next(iter(parser()._subparsers._group_actions)).choices["serve"]._option_string_actions  # type: ignore
    assert name in found


def test_no_name_twice() -> None:
    names = [name for flag in serve.FLAGS for name in flag.names.split()]
    assert len(names) == len(set(names))
    assert all(bool(flag.to) + bool(flag.reason) + bool(flag.missing) for flag in serve.FLAGS)


@pytest.mark.parametrize("flag", [f for f in serve.FLAGS if f.reason], ids=lambda flag: flag.long)
def test_no_effect_is_logged_once(
    flag: Flag, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = types.ModuleType("saddle.launch")
    seen: list[Any] = []
    launch.serve = lambda engine, server: seen.append((engine, server)) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "saddle.launch", launch)
    monkeypatch.setattr("saddle.log.setup", lambda level: None)
    fine = flag.fine[0] if flag.fine else None
    value = str(fine) if fine is not None and flag.kind != "bool" else example(flag)
    argv = [flag.long] if value is None else [f"{flag.long}={value}"]
    with caplog.at_level(logging.INFO, "saddle"):
        assert serve.run(parser().parse_args(["serve", "m", *argv])) == 0
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(flag.long)
    assert lines[0].endswith(f" has no effect: {flag.reason}.")
    assert seen == [configs("m")[:2]]  # and indeed nothing else changed


@pytest.mark.parametrize("flag", [f for f in serve.FLAGS if f.missing], ids=lambda flag: flag.long)
def test_missing_capabilities_refuse(flag: Flag) -> None:
    value = example(flag)
    if flag.kind == "bool":
        name = "--no-" + flag.long[2:] if True in flag.fine else flag.long
        argv = [name]
    else:
        name, argv = flag.long, [flag.long, "8" if flag.kind in ("int", "float", "size") else str(value)]
    with pytest.raises(StartupError) as error:
        configs("m", *argv)
    assert str(error.value).startswith(name)
    assert flag.missing in str(error.value)
    for fine in flag.fine:
        if isinstance(fine, bool):
            argv = [flag.long if fine else "--no-" + flag.long[2:]]
        elif isinstance(fine, tuple):
            argv = [flag.long, *fine]
        else:
            argv = [f"{flag.long}={json.dumps(fine) if flag.kind == 'json' else fine}"]
        assert configs("m", *argv)[:2] == configs("m")[:2]


def test_guide_commands() -> None:
    """The commands of the M2 guides, on the devices that this version has."""
    guide = (
        "MiniMaxAI/MiniMax-M2 --trust-remote-code --enable_expert_parallel --tensor-parallel-size 1 "
        "--enable-auto-tool-choice --tool-call-parser minimax_m2 --reasoning-parser minimax_m2_append_think"
    )
    fused = '{"mode":3,"pass_config":{"fuse_minimax_qk_norm":true}}'
    engine, server, notes = configs(*guide.split(), "--compilation-config", fused)
    assert engine.load.model == "MiniMaxAI/MiniMax-M2"
    assert (server.tool_call_parser, server.reasoning_parser) == ("minimax_m2", "minimax_m2_append_think")
    assert [note.split(" has no effect")[0] for note in notes] == [
        "--enable-expert-parallel", "--trust-remote-code", "--enable-auto-tool-choice",
    ]  # fmt: skip
    assert engine.compile.uses_graphs and engine.compile.fuses_qk_norm
    with pytest.raises(StartupError, match="--tensor-parallel-size 4 is not possible"):
        configs(*guide.replace("size 1", "size 4").split())


@pytest.mark.parametrize(("argv", "field", "value"), [
    ([], "reasoning_parser", "minimax_m2"),
    ([], "tool_call_parser", "minimax_m2"),
    (["--reasoning-parser", "minimax-append-think"], "reasoning_parser", "minimax_m2_append_think"),
    (["--reasoning-parser", "minimax-m2"], "reasoning_parser", "minimax_m2"),
    (["--reasoning-parser="], "reasoning_parser", None),
    (["--tool-call-parser", "minimax"], "tool_call_parser", "minimax_m2"),
    (["--allowed-origins", '["*"]'], "allowed_origins", ("*",)),
    (["--api-key", "a", "b"], "api_keys", ("a", "b")),
    ([], "api_keys", ("env",)),
    (["--disable-uvicorn-access-log"], "access_log", False),
    (["--max-num-queued-reqs", "3"], "max_queued_requests", 3),
    (["--default-chat-template-kwargs.model_identity", "I am."], "default_chat_template_kwargs",
     {"model_identity": "I am."}),
])  # fmt: skip
def test_server_fields(argv: list[str], field: str, value: Any) -> None:
    assert getattr(configs("m", *argv, api_keys=("env",))[1], field) == value


@pytest.mark.parametrize(("argv", "section", "field", "value"), [
    (["--max-model-len", "auto"], "scheduler", "max_model_len", 0),
    (["--max-model-len", "-1"], "scheduler", "max_model_len", 0),
    (["--max-model-len", "25.6k"], "scheduler", "max_model_len", 25600),
    ([], "scheduler", "max_model_len", None),
    (["--no-async-scheduling"], "scheduler", "plans_in_flight", 0),
    (["--async-scheduling"], "scheduler", "plans_in_flight", 1),
    (["--no-enable-prefix-caching"], "cache", "enable_prefix_caching", False),
    (["--kv-cache-memory-bytes", "4G"], "cache", "kv_cache_memory_bytes", 4 << 30),
    (["--dtype", "float"], "load", "dtype", "float32"),
    (["--hf-overrides.num_hidden_layers", "2"], "load", "hf_overrides", {"num_hidden_layers": 2}),
])  # fmt: skip
def test_engine_fields(argv: list[str], section: str, field: str, value: Any) -> None:
    assert getattr(getattr(configs("m", *argv)[0], section), field) == value


@pytest.mark.parametrize("flag", ["--reasoning-parser", "--tool-call-parser"])
def test_an_unknown_parser_is_told_the_known_ones(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        configs("m", flag, "deepseek")
    said = capsys.readouterr().err
    assert f"{flag}: unknown parser 'deepseek'; known are " in said
    assert all(name in said for name in ("minimax_m2", "minimax-m2", "minimax"))


@pytest.mark.parametrize(("argv", "message"), [
    (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
    (["--block-size", "24"], "--block-size must be 8, 16, 32, 64 or 128, got 24"),
    (["--ssl-keyfile", "k"], "--ssl-certfile"),
    (["--model", "other"], "given twice"),
    (["--hf-overrides", "[1]"], "--hf-overrides must be a JSON object"),
    (["--speculative-config", '{"method": "ngram"}'], '--speculative-config \'{"method": "ngram"}\' is not possible'),
])  # fmt: skip
def test_wrong_values(argv: list[str], message: str) -> None:
    with pytest.raises(StartupError) as error:
        configs("m", *argv)
    assert message in str(error.value)


def test_model_of_the_file_yields(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: file\nport: 1\n")
    assert configs("--config", str(path))[0].load.model == "file"
    assert configs("tag", "--config", str(path))[0].load.model == "tag"
    assert configs("--model", "flag", "--config", str(path))[0].load.model == "flag"


def run_main(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main.main(argv)
    return code, capsys.readouterr().err


def test_startup_errors_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run_main(["serve", "m", "-tp", "2"], capsys)
    assert code == 1
    assert text == (
        "saddle serve: --tensor-parallel-size 2 is not possible: this version runs one model on one device.\n"
    )


def saddle(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "saddle", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_process() -> None:
    assert saddle("--version").stdout == "saddle 0.1.0\n"
    nothing = saddle()
    assert (nothing.returncode, "serve a model" in nothing.stdout) == (2, True)
    wrong = saddle("serve", "--tensor-paralel-size", "2")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(
        "saddle serve: error: unknown flag --tensor-paralel-size; did you mean --tensor-parallel-size?"
    )
    assert saddle("server").returncode == 2


@pytest.mark.parametrize("argv", [
    ["--help"], ["serve", "--help"], ["bench", "serve", "--help"], ["chat", "--help"], ["parse", "--help"],
])  # fmt: skip
def test_help_is_light(argv: list[str]) -> None:
    """Help loads neither torch nor the HTTP, numeric and terminal libraries."""
    code = (
        "import sys\nfrom saddle.cli.main import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'numpy', 'aiohttp', 'fastapi', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: saddle" in done.stdout

"""The flags of `saddle serve` that do something: one row each, with the configuration field that it sets.

Names, short forms and meanings are those of `vllm serve`; the group "Saddle" holds the few that vLLM does not have.
Defaults are not here: a flag that is not given leaves the default of `saddle.config`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from saddle.cli.flags import Flag, size
from saddle.config import KVCacheDtype
from saddle.errors import StartupError

MODEL, HTTP, OUTPUT, MEMORY, SCHEDULER, SADDLE = "Model", "HTTP", "Output", "Memory", "Scheduler", "Saddle"
EXECUTION = "Execution"

REASONING_PARSERS: dict[str, str | None] = {
    "minimax_m2": "minimax_m2", "minimax-m2": "minimax_m2", "minimax": "minimax_m2",
    "minimax_m2_append_think": "minimax_m2_append_think", "minimax-m2-append-think": "minimax_m2_append_think",
    "minimax-append-think": "minimax_m2_append_think", "": None,
}  # fmt: skip
TOOL_PARSERS: dict[str, str | None] = {
    "minimax_m2": "minimax_m2", "minimax-m2": "minimax_m2", "minimax": "minimax_m2", "": None,
}  # fmt: skip


def model_len(text: str) -> int:
    """`--max-model-len`: a count, or "auto" and -1 for the largest that fits, which the configuration writes as 0."""
    if text.strip().lower() in ("auto", "-1"):
        return 0
    value = size(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, or auto for the largest that fits, got {text!r}")
    return value


def reasoning_parser(text: str) -> str | None:
    return _named(text, REASONING_PARSERS)


def tool_parser(text: str) -> str | None:
    return _named(text, TOOL_PARSERS)


def _named(text: str, names: dict[str, str | None]) -> str | None:
    if text not in names:
        known = ", ".join(name or '"" (off)' for name in names)
        raise argparse.ArgumentTypeError(f"unknown parser {text!r}; known are {known}")
    return names[text]


def dtype(text: str) -> str:
    return {"float": "float32"}.get(text, text)


def kv_cache_dtype(text: str) -> str:
    """A name of vLLM's or Saddle's; e5m2 and the others of vLLM's are refused by name."""
    known = get_args(KVCacheDtype)
    if text not in known:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {text!r}")
    return text


def sizes(texts: Sequence[str]) -> tuple[int, ...]:
    """`--cudagraph-capture-sizes`: whole numbers, as words or one JSON list."""
    try:
        return tuple(int(text) for text in texts)
    except ValueError:
        raise StartupError(f"--cudagraph-capture-sizes must be whole numbers, got {' '.join(texts)!r}.") from None


def negate(value: bool) -> bool:
    return not value


FLAGS: tuple[Flag, ...] = (
    Flag(names="--config", group="General", metavar="FILE", to=("cli.config",),
         help="YAML file of flags, dashes or underscores; the command line wins"),
    # Model
    Flag(names="--model", group=MODEL, to=("load.model",), help="folder or hub id, as the positional argument"),
    Flag(names="--tokenizer", group=MODEL, to=("load.tokenizer",), help="folder or hub id, if not the model's"),
    Flag(names="--revision", group=MODEL, to=("load.revision",), help="branch, tag or commit on the hub"),
    Flag(names="--download-dir", group=MODEL, to=("load.download_dir",), help="where hub files are kept"),
    Flag(names="--load-format", group=MODEL, to=("load.load_format",), choices=("auto", "safetensors", "dummy"),
         help="dummy makes random weights from the config alone"),
    Flag(names="--dtype", group=MODEL, to=("load.dtype",), parse=dtype, choices=("auto", "bfloat16", "float32"),
         help="what weights that are not FP8 are computed in; auto: bfloat16 on a GPU, float32 on a CPU"),
    Flag(names="--seed", kind="int", group=MODEL, to=("load.seed",), help="seed of dummy weights"),
    Flag(names="--hf-overrides", kind="json", group=MODEL, to=("load.hf_overrides",),
         help="replaces values of config.json"),
    Flag(names="--generation-config", group=MODEL, to=("server.generation_config",),
         help="sampling defaults: auto is the checkpoint's, vllm or saddle neutral ones, else a folder"),
    Flag(names="--override-generation-config", kind="json", group=MODEL, to=("server.override_generation_config",),
         help='changes sampling defaults, such as {"temperature": 0.7}'),
    # HTTP
    Flag(names="--host", group=HTTP, to=("server.host",), help="address to listen on; all when not given"),
    Flag(names="--port", kind="int", group=HTTP, to=("server.port",), help="default 8000"),
    Flag(names="--uds", group=HTTP, metavar="PATH", to=("server.uds",), help="listen on a Unix socket instead"),
    Flag(names="--api-key", kind="words", group=HTTP, metavar="KEY", to=("server.api_keys",),
         help="keys that clients may present; default: SADDLE_API_KEY or VLLM_API_KEY of the environment"),
    Flag(names="--served-model-name", kind="words", group=HTTP, metavar="NAME", to=("server.served_model_names",),
         help="names that requests may use; the first is shown"),
    Flag(names="--root-path", group=HTTP, to=("server.root_path",), help="path prefix behind a proxy"),
    Flag(names="--ssl-keyfile", group=HTTP, to=("server.ssl_keyfile",), help="TLS key"),
    Flag(names="--ssl-certfile", group=HTTP, to=("server.ssl_certfile",), help="TLS certificate"),
    Flag(names="--ssl-ca-certs", group=HTTP, to=("server.ssl_ca_certs",), help="TLS certificate authorities"),
    Flag(names="--allowed-origins", kind="words", group=HTTP, to=("server.allowed_origins",),
         help="origins that may call from a browser, as words or a JSON list; none by default"),
    Flag(names="--disable-uvicorn-access-log", kind="bool", group=HTTP, to=("server.access_log",), value=negate,
         help="no log line for each HTTP request"),
    Flag(names="--enable-log-requests", kind="bool", group=HTTP, to=("server.log_requests",),
         help="log the parameters of each request"),
    Flag(names="--sse-keep-alive-interval", kind="float", group=HTTP, to=("server.sse_keep_alive_s",),
         help="seconds without a token after which a stream gets a comment line; 0 is never"),
    Flag(names="--shutdown-timeout", kind="float", group=HTTP, to=("server.shutdown_timeout_s",),
         help="seconds that streams may take to finish after SIGTERM"),
    # Output
    Flag(names="--chat-template", group=OUTPUT, to=("server.chat_template",), help="file, or the template itself"),
    Flag(names="--default-chat-template-kwargs", kind="json", group=OUTPUT,
         to=("server.default_chat_template_kwargs",), help="variables for the chat template"),
    Flag(names="--reasoning-parser", group=OUTPUT, parse=reasoning_parser, to=("server.reasoning_parser",),
         help='minimax_m2 (default), minimax_m2_append_think, or "" for none'),
    Flag(names="--tool-call-parser", group=OUTPUT, parse=tool_parser, to=("server.tool_call_parser",),
         help='minimax_m2 (default), or "" for none'),
    Flag(names="--max-logprobs", kind="int", group=OUTPUT, to=("server.max_logprobs",),
         help="most logprobs a request may ask for; -1 is the whole vocabulary"),
    Flag(names="--enable-force-include-usage", kind="bool", group=OUTPUT, to=("server.force_include_usage",),
         help="every stream ends with a usage chunk, asked for or not"),
    # Memory
    Flag(names="--block-size", kind="int", group=MEMORY, to=("cache.block_size",),
         help="tokens a KV block; default 64 on GPUs, 16 on CPUs"),
    Flag(names="--gpu-memory-utilization", kind="float", group=MEMORY, to=("cache.gpu_memory_utilization",),
         help="share of a GPU's memory to fill; default 0.92"),
    Flag(names="--kv-cache-memory-bytes", kind="size", group=MEMORY, to=("cache.kv_cache_memory_bytes",),
         help="KV memory a rank, such as 4G; overrides the share"),
    Flag(names="--enable-prefix-caching", kind="bool", group=MEMORY, to=("cache.enable_prefix_caching",),
         help="reuse the KV of prompts that begin alike; on by default"),
    Flag(names="--kv-cache-dtype", group=MEMORY, to=("cache.kv_cache_dtype",), parse=kv_cache_dtype,
         metavar="DTYPE", help="auto (default) is the dtype of the computation; bfloat16, float32; on GPUs fp8 "
         "(fp8_e4m3), one scale a layer, and fp8_dynamic, one for each token and head"),
    # Scheduler
    Flag(names="--max-model-len", group=SCHEDULER, parse=model_len, metavar="LENGTH", to=("scheduler.max_model_len",),
         help="longest prompt plus output, such as 32k or 32K; auto or -1 is the largest that fits"),
    Flag(names="--max-num-seqs", kind="int", group=SCHEDULER, to=("scheduler.max_num_seqs",),
         help="requests that run at once; default 256 on GPUs, 32 on CPUs"),
    Flag(names="--max-num-batched-tokens", kind="size", group=SCHEDULER, to=("scheduler.max_num_batched_tokens",),
         help="tokens a step; default 8192 on GPUs, 512 on CPUs"),
    Flag(names="--scheduling-policy", group=SCHEDULER, to=("scheduler.policy",), choices=("fcfs", "priority"),
         help="priority obeys the request field `priority`, lower first"),
    Flag(names="--max-num-queued-reqs", kind="int", group=SCHEDULER,
         to=("scheduler.max_num_queued_reqs", "server.max_queued_requests"),
         help="requests that may wait; more are refused"),
    Flag(names="--async-scheduling", kind="bool", group=SCHEDULER, to=("scheduler.plans_in_flight",), value=int,
         help="plan the next step while one runs; default on GPUs"),
    # Execution
    Flag(names="--enforce-eager", kind="bool", group=EXECUTION, to=("compile.enforce_eager",),
         help="no CUDA graphs: every kernel of a step is launched by the host"),
    Flag(names="--compilation-config -cc", kind="json", group=EXECUTION, to=("compile.compilation_config",),
         help='such as {"mode": 3, "pass_config": {"fuse_minimax_qk_norm": true}}; mode 0 is eager, 3 fused kernels '
         "and graphs"),
    Flag(names="--cudagraph-capture-sizes", kind="words", group=EXECUTION, metavar="ROWS", value=sizes,
         to=("compile.cudagraph_capture_sizes",), help="rows of the decode steps that get a graph"),
    Flag(names="--max-cudagraph-capture-size", kind="int", group=EXECUTION,
         to=("compile.max_cudagraph_capture_size",), help="the largest of them; default: all rows"),
    # Saddle's own
    Flag(names="--max-step-ms", kind="float", group=SADDLE, to=("scheduler.max_step_ms",), metavar="MS",
         help="while rows decode, prompts join a step only up to this predicted time; default 60 on a GPU, longer where"
              " that would leave prompts little; no limit on a CPU"),
    Flag(names="--reasoning-field", group=SADDLE, to=("server.reasoning_field",),
         choices=("both", "reasoning", "reasoning_content"), help="name of the thinking in answers; default both"),
    Flag(names="--vllm-metric-names", kind="bool", group=SADDLE, to=("server.vllm_metric_names",),
         help="/metrics also under vLLM's names, for existing dashboards"),
    Flag(names="--request-timeout", kind="float", group=SADDLE, to=("server.request_timeout_s",), metavar="SECONDS",
         help="longest time of a request, from admission to its last token; default no limit"),
    Flag(names="--max-body-bytes", kind="size", group=SADDLE, to=("server.max_body_bytes",),
         help="largest request body; default 64M"),
    Flag(names="--replay-bytes", kind="size", group=SADDLE, to=("server.replay_bytes",),
         help="memory that keeps generated turns as token ids, so that their KV is found again; default 256M"),
    Flag(names="--response-store-bytes", kind="size", group=SADDLE, to=("server.response_store_bytes",),
         help="memory that keeps responses for GET and previous_response_id, 0 for none; default 64M"),
)  # fmt: skip

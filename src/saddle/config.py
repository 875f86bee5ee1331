"""Configuration: frozen values, resolved once at start.

Config goes in, results come out: after `launch` has built the object graph nobody writes to a config, and what
start-up finds out (how many blocks fit, say) is a return value, not a field. A field that is None means "decide
for me"; the decision is taken where the facts are known and reported as a `Decision` with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from saddle.errors import StartupError

Policy = Literal["fcfs", "priority"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Dtype = Literal["auto", "bfloat16", "float32"]
ReasoningParser = Literal["minimax_m2", "minimax_m2_append_think"]
ToolParser = Literal["minimax_m2"]
ReasoningField = Literal["both", "reasoning", "reasoning_content"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A value that was derived, and why; printed at start."""

    name: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value} ({self.reason})"


def require(holds: bool, flag: str, value: object, right: str) -> None:
    """Raise StartupError that names the flag and what would be right."""
    if not holds:
        raise StartupError(f"{flag} must be {right}, got {value!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Which weights, and how they are read.

    model   local folder or hub id
    load_format   "dummy" makes random weights from the config alone
    dtype   what weights are computed in where they are not FP8; "auto" is bfloat16 on a GPU, float32 on a CPU
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    load_format: LoadFormat = "auto"
    dtype: Dtype = "auto"
    seed: int = 0
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV memory.

    block_size   tokens a block; None: 64 on GPUs, 16 on CPUs
    gpu_memory_utilization   share of a GPU's memory that Saddle may fill, weights included
    kv_cache_memory_bytes   KV memory a rank; overrides the share
    """

    block_size: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        require(self.block_size is None or self.block_size in (8, 16, 32, 64, 128), "--block-size", self.block_size,
                "8, 16, 32, 64 or 128")  # fmt: skip
        require(0 < self.gpu_memory_utilization <= 1, "--gpu-memory-utilization", self.gpu_memory_utilization,
                "above 0 and at most 1")  # fmt: skip
        require(self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes > 0, "--kv-cache-memory-bytes",
                self.kv_cache_memory_bytes, "above 0")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Who runs when.

    max_model_len   longest prompt plus output; None is the checkpoint's, 0 is the largest that fits
    max_num_seqs   rows; None: 256 on GPUs, 32 on CPUs
    max_num_batched_tokens   tokens a step; None: 8192 on GPUs, 512 on CPUs
    plans_in_flight   plans built before the oldest one's result is needed; 0 is synchronous; None: 1 on GPUs, 0 on CPUs
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    policy: Policy = "fcfs"
    plans_in_flight: int | None = None
    max_num_queued_reqs: int | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--max-model-len", self.max_model_len, 0),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, 1),
            ("--max-num-queued-reqs", self.max_num_queued_reqs, 1),
        ):
            require(value is None or value >= least, flag, value, f"{least} or more")
        require(self.policy in ("fcfs", "priority"), "--scheduling-policy", self.policy, "fcfs or priority")
        require(self.plans_in_flight in (None, 0, 1, 2), "plans_in_flight", self.plans_in_flight, "0, 1 or 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine process: its model, its memory, its scheduler."""

    load: LoadConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side: where it listens, who may call, how answers look."""

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None  # path of a file, or the template itself
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_parser: ReasoningParser | None = "minimax_m2"
    tool_call_parser: ToolParser | None = "minimax_m2"
    reasoning_field: ReasoningField = "both"
    generation_config: str = "auto"  # "auto": the checkpoint's; "vllm" or "saddle": neutral defaults; or a folder
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    max_logprobs: int = 20
    max_queued_requests: int | None = None
    request_timeout_s: float | None = None  # from admission to the last token
    max_body_bytes: int = 64 << 20
    replay_bytes: int = 256 << 20
    sse_keep_alive_s: float = 15.0
    shutdown_timeout_s: float = 30.0
    vllm_metric_names: bool = False
    force_include_usage: bool = False
    log_requests: bool = False
    access_log: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "--port", self.port, "between 0 and 65535")
        require(self.request_timeout_s is None or self.request_timeout_s > 0, "--request-timeout",
                self.request_timeout_s, "above 0 seconds")  # fmt: skip
        require((self.ssl_keyfile is None) == (self.ssl_certfile is None), "--ssl-keyfile", self.ssl_keyfile,
                "given together with --ssl-certfile")  # fmt: skip

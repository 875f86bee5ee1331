"""Configuration: frozen values, resolved once at start.

Config goes in, results come out: after `launch` has built the object graph nobody writes to a config, and what
start-up finds out (how many blocks fit, say) is a return value, not a field. A field that is None means "decide
for me"; the decision is taken where the facts are known and reported as a `Decision` with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from saddle.errors import StartupError

Policy = Literal["fcfs", "priority"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Dtype = Literal["auto", "bfloat16", "float32"]
ReasoningParser = Literal["minimax_m2", "minimax_m2_append_think"]
ToolParser = Literal["minimax_m2"]
ReasoningField = Literal["both", "reasoning", "reasoning_content"]
KVCacheDtype = Literal["auto", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_dynamic"]
# `--compilation-config`: keys with an effect, and those of vLLM's that choose how it compiles, which Saddle does not.
COMPILATION_KEYS = ("mode", "level", "cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size",
                    "pass_config")  # fmt: skip
NO_GRAPHS = ("NONE", 0)
# vLLM's ways in which steps with prompts have no graphs.
NO_PIECES = ("FULL", "FULL_DECODE_ONLY")
# Tokens of the steps with prompts that are graphs between attention: what pads a step to the next of them is computed
# by tiles that the step needs anyway, of 64 tokens and more from 128 on.
PIECE_SIZES = (16, 32, 64, 128, 192, 256, 384, 512)


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
    kv_cache_dtype   "auto" is the dtype of the computation; "fp8" ("fp8_e4m3") has one scale a layer, the checkpoint's
        or 1.0, "fp8_dynamic" one for each token and head, stored in the block
    """

    block_size: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        require(self.block_size is None or self.block_size in (8, 16, 32, 64, 128), "--block-size", self.block_size,
                "8, 16, 32, 64 or 128")  # fmt: skip
        require(0 < self.gpu_memory_utilization <= 1, "--gpu-memory-utilization", self.gpu_memory_utilization,
                "above 0 and at most 1")  # fmt: skip
        require(self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes > 0, "--kv-cache-memory-bytes",
                self.kv_cache_memory_bytes, "above 0")  # fmt: skip
        require(self.kv_cache_dtype in get_args(KVCacheDtype), "--kv-cache-dtype", self.kv_cache_dtype,
                "one of " + ", ".join(get_args(KVCacheDtype)))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """How steps are launched on a GPU.

    enforce_eager   no graphs, as mode 0
    compilation_config   vLLM's: `mode` (or `level`) 0 is eager, 1 to 3 are fused kernels and graphs;
        `cudagraph_mode` "NONE" is without graphs; `pass_config.fuse_minimax_qk_norm` chooses the kernel that
        normalises q and k, rotates them and writes the KV in one
    cudagraph_capture_sizes   rows of the decode steps that get a graph; empty: chosen from the number of rows
    max_cudagraph_capture_size   the largest of them; None: all rows
    """

    enforce_eager: bool = False
    compilation_config: Mapping[str, Any] = field(default_factory=dict)
    cudagraph_capture_sizes: tuple[int, ...] = ()
    max_cudagraph_capture_size: int | None = None

    def __post_init__(self) -> None:
        flag, found = "--compilation-config", self.compilation_config
        require(isinstance(found, Mapping), flag, found, "a JSON object")
        require(self.mode in (0, 1, 2, 3), f"{flag} mode", self.mode, "0 (eager) or 3 (fused kernels and graphs)")
        require(isinstance(found.get("pass_config", {}), Mapping), f"{flag} pass_config", found.get("pass_config"),
                "a JSON object")  # fmt: skip
        fuse = found.get("pass_config", {}).get("fuse_minimax_qk_norm", True)
        require(isinstance(fuse, bool), f"{flag} pass_config.fuse_minimax_qk_norm", fuse, "true or false")
        given = found.get("cudagraph_capture_sizes") or ()
        for name, sizes in (("--cudagraph-capture-sizes", self.cudagraph_capture_sizes),
                            (f"{flag} cudagraph_capture_sizes", given)):  # fmt: skip
            positive = isinstance(sizes, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in sizes)
            require(positive, name, sizes, "whole numbers above 0")
        largest = found.get("max_cudagraph_capture_size")
        for name, most in (("--max-cudagraph-capture-size", self.max_cudagraph_capture_size),
                           (f"{flag} max_cudagraph_capture_size", largest)):  # fmt: skip
            require(most is None or (isinstance(most, int) and most > 0), name, most, "a whole number above 0")

    @property
    def mode(self) -> Any:
        """`compilation_config.mode`, by its old name `level`; 3 when not given."""
        found = self.compilation_config
        mode = found.get("mode", found.get("level"))
        return 3 if mode is None else mode

    @property
    def uses_graphs(self) -> bool:
        """Whether decode steps are captured as CUDA graphs, where the device has them."""
        return not self.enforce_eager and self.mode > 0 and self._graph_mode not in NO_GRAPHS

    def piece_sizes(self, max_num_batched_tokens: int) -> tuple[int, ...]:
        """Tokens of the steps with prompts that get graphs, ascending; () without graphs.

        Larger steps run longer than their launches take, one by one.
        """
        if not self.uses_graphs or self._graph_mode in NO_PIECES:
            return ()
        return tuple(size for size in PIECE_SIZES if size <= max_num_batched_tokens)

    @property
    def fuses_qk_norm(self) -> bool:
        """Whether QK-norm, rotary and KV write are one kernel."""
        return self.mode > 0 and bool(self.compilation_config.get("pass_config", {}).get("fuse_minimax_qk_norm", True))

    @property
    def _graph_mode(self) -> Any:
        mode = self.compilation_config.get("cudagraph_mode")
        return mode.upper() if isinstance(mode, str) else mode

    def capture_sizes(self, max_num_seqs: int) -> tuple[int, ...]:
        """Rows of the decode steps that get a graph, ascending; () without graphs.

        Chosen, where none are given: 1, 2, 4, 8, then as many as waste under a tenth when a batch is filled up.
        """
        if not self.uses_graphs:
            return ()
        found = self.compilation_config
        largest = self.max_cudagraph_capture_size or found.get("max_cudagraph_capture_size")
        given = self.cudagraph_capture_sizes or tuple(found.get("cudagraph_capture_sizes") or ())
        if given:
            # No step has more rows than max_num_seqs: a size above that is there for the steps just below it.
            return tuple(sorted({min(size, max_num_seqs) for size in given if largest is None or size <= largest}))
        most = max_num_seqs if largest is None else min(largest, max_num_seqs)
        sizes = [size for size in (1, 2, 4, 8) if size <= most]
        while sizes[-1] < most:
            # The fewest rows that are padded to the next size are one more than the last: it may be 1.1 times as large.
            last = sizes[-1]
            # Steps that divide the last size, so that powers of two are among the sizes.
            step = max(n for n in (1, 2, 4, 8, 16) if n == 1 or (last % n == 0 and last + n < (last + 1) * 1.1))
            sizes.append(min(last + step, most))
        return tuple(sizes)

    def decisions(self, max_num_seqs: int, max_num_batched_tokens: int) -> list[Decision]:
        """What was decided here and why, for the lines printed at start."""
        if self.enforce_eager:
            why = "--enforce-eager"
        elif self.compilation_config:
            why = "--compilation-config"
        else:
            why = "the default"
        found = [Decision("graphs", "on" if self.uses_graphs else "off", why)]
        if self.uses_graphs:
            given = self.cudagraph_capture_sizes or self.compilation_config.get("cudagraph_capture_sizes")
            sizes = self.capture_sizes(max_num_seqs)
            found.append(Decision("cudagraph_capture_sizes", " ".join(map(str, sizes)),
                                  "as given" if given else "steps that waste under 10 %"))  # fmt: skip
            pieces = self.piece_sizes(max_num_batched_tokens)
            found.append(Decision("graphs of steps with prompts", " ".join(map(str, pieces)) or "none",
                                  "tokens, between attention calls"))  # fmt: skip
        fused = "pass_config" in self.compilation_config or self.mode == 0
        found.append(Decision("fuse_minimax_qk_norm", self.fuses_qk_norm,
                              "--compilation-config" if fused else "the default"))  # fmt: skip
        others = sorted(set(self.compilation_config) - set(COMPILATION_KEYS))
        if others:
            found.append(Decision("compilation_config", ", ".join(others),
                                  "no effect: Saddle compiles its own kernels in one way"))  # fmt: skip
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Who runs when.

    max_model_len   longest prompt plus output; None is the checkpoint's, 0 is the largest that fits
    max_num_seqs   rows; None: 256 on GPUs, 32 on CPUs
    max_num_batched_tokens   tokens a step; None: 8192 on GPUs, 512 on CPUs
    plans_in_flight   plans built before the oldest one's result is needed; 0 is synchronous; None: 1 on GPUs, 0 on CPUs
    max_step_ms   predicted time of a step above which no more prompt tokens join rows that decode; None: no such limit
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    policy: Policy = "fcfs"
    plans_in_flight: int | None = None
    max_num_queued_reqs: int | None = None
    max_step_ms: float | None = None

    def __post_init__(self) -> None:
        require(self.max_step_ms is None or self.max_step_ms > 0, "--max-step-ms", self.max_step_ms, "above 0")
        for flag, value, least in (
            ("--max-model-len", self.max_model_len, 0),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, 1),
            ("--max-num-queued-reqs", self.max_num_queued_reqs, 1),
        ):
            require(value is None or value >= least, flag, value, f"{least} or more")
        require(self.policy in ("fcfs", "priority"), "--scheduling-policy", self.policy, "fcfs or priority")
        require(self.plans_in_flight in (None, 0, 1, 2), "plans_in_flight", self.plans_in_flight, "0, 1 or 2")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of `CacheConfig` and `SchedulerConfig` that depend on the kind of device."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    plans_in_flight: int


# On a CPU the next plan is built on the core that computes this one: measured with 1, 4 and 16 rows, doing both in one
# thread takes about 2 % less time a step, and a token is sent one step earlier.
DEFAULT_SIZES = {"cpu": Sizes(16, 32, 512, 0), "cuda": Sizes(64, 256, 8192, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine process: its model, its memory, its scheduler."""

    load: LoadConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)

    def sizes(self, kind: str) -> Sizes:
        """What was asked for, else the default on a "cpu" or "cuda"."""
        asked = (self.cache.block_size, self.scheduler.max_num_seqs, self.scheduler.max_num_batched_tokens,
                 self.scheduler.plans_in_flight)  # fmt: skip
        default = DEFAULT_SIZES[kind]
        found = (default.block_size, default.max_num_seqs, default.max_num_batched_tokens, default.plans_in_flight)
        return Sizes(*(own if value is None else value for value, own in zip(asked, found, strict=True)))


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
    response_store_bytes: int = 64 << 20  # 0 keeps no response
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

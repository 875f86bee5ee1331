"""The vocabulary that the layers share: what is asked for, planned, computed and returned.

Nothing here imports torch, and nothing here knows text: requests are token ids, results are token ids. All types
are frozen; those that cross a process boundary are msgspec structs, so that encoding a step of 256 rows costs
microseconds.

Glossary
    block     unit of KV memory: `block_size` tokens of every layer
    row       slot of a running request on a device; it never moves while the request runs
    epoch     number of times that a row was given out; results for an older epoch are dropped
    step      one forward pass and one sampling, for all rows of a plan
    plan      what a step does (`StepPlan`)
    rank      one device's process
    replica   one data-parallel engine with its own scheduler
    piece     rendered text and token ids of one turn of a conversation
    num_*     a count; *_ids a list of ids; *_s seconds
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from enum import Enum

import msgspec

from saddle.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024


class FinishReason(str, Enum):
    """Why a request ended, in the words of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn and when a request ends.

    `n`, `stop`, `include_stop_str_in_output` and `skip_special_tokens` are read by the text layers alone; the
    engine reads the rest. Penalties and bias act on the logits in this order: logit_bias, allowed and bad words,
    repetition, presence and frequency penalty, then temperature, top_k, top_p, min_p.

    Attributes:
        temperature: 0 is greedy; up to 2.
        top_p: in (0, 1]; 1 is off.
        top_k: keep the k most likely tokens; 0 is off.
        min_p: in [0, 1]; drop tokens less likely than `min_p` times the most likely one.
        seed: a row's random numbers are a function of the seed and the position alone; None draws a seed.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens in prompt or output.
        presence_penalty, frequency_penalty: in [-2, 2]; count output tokens only.
        max_tokens: most tokens to generate; None is what the context leaves.
        min_tokens: no stop before that many tokens.
        stop: strings that end the text.
        stop_token_ids: ids that end the text, beside the EOS of the checkpoint.
        ignore_eos: go on after EOS.
        n: independent completions of the same prompt.
        logprobs: None for none; k for the sampled token's and the k most likely ones.
        prompt_logprobs: the same for every prompt token but the first.
        logit_bias: added to the logits of these ids.
        bad_words_ids: token sequences that are never completed.
        allowed_token_ids: if given, only these are sampled.

    Raises:
        InvalidRequest: naming the field, on construction.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        def require(holds: bool, field: str, right: str) -> None:
            if not holds:
                raise InvalidRequest(f"{field} must be {right}, got {getattr(self, field)!r}.", param=field)

        def finite(value: float) -> bool:
            return math.isfinite(value)

        require(finite(self.temperature) and 0 <= self.temperature <= 2, "temperature", "between 0 and 2")
        require(finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(-1 <= self.top_k < 2**31, "top_k", "a positive integer below 2**31, or 0 or -1 to switch it off")
        require(finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        require(finite(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "above 0")
        for field in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, field)
            require(finite(value) and -2 <= value <= 2, field, "between -2 and 2")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        require(self.min_tokens >= 0, "min_tokens", "0 or more")
        require(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        require(1 <= self.n <= 128, "n", "between 1 and 128")
        require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        require(self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more")
        require(self.prompt_logprobs is None or self.prompt_logprobs >= 0, "prompt_logprobs", "0 or more")
        require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        require(all(self.stop), "stop", "made of non-empty strings")
        require(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"a map of at most {MAX_LOGIT_BIAS} tokens")
        require(all(finite(v) for v in self.logit_bias.values()), "logit_bias", "a map to finite numbers")
        require(self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids", "not empty")
        require(all(self.bad_words_ids), "bad_words_ids", "made of non-empty sequences")

    def check_ids(self, vocab_size: int) -> None:
        """Raise InvalidRequest if a field names a token id that the model does not have."""
        named: dict[str, Iterable[int]] = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
            "bad_words_ids": [token_id for word in self.bad_words_ids for token_id in word],
        }
        for field, ids in named.items():
            wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
            if wrong is not None:
                raise InvalidRequest(f"{field} names token id {wrong}; ids are between 0 and {vocab_size - 1}.", field)

    def within(self, room: int) -> SamplingParams:
        """The same parameters with `max_tokens` at most `room`, and `min_tokens` at most that."""
        limit = room if self.max_tokens is None else min(self.max_tokens, room)
        if limit == self.max_tokens:
            return self
        return msgspec.structs.replace(self, max_tokens=limit, min_tokens=min(self.min_tokens, limit))

    def of_choice(self, number: int) -> SamplingParams:
        """Parameters of one of the `n` choices: they draw differently also when a seed is given."""
        if number == 0 or self.seed is None:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + number) % 2**63)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's output must match, for the grammar backend; `grammar/spec.py` builds it.

    kind, source   what is enforced, in the words of `grammar.spec`
    after_token_id   the output is bound behind this token, the end of thinking; None binds the first token
    max_thinking_tokens   after so many tokens `after_token_id` itself is enforced; None is no limit
    param   the field of the request that an error names
    """

    kind: str
    source: str
    after_token_id: int | None = None
    max_thinking_tokens: int | None = None
    param: str | None = None


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the engine sees it: token ids in, token ids out.

    `params.max_tokens` is set: the text layers clamp it to the context. `arrival_s` is `time.monotonic()`, which
    all processes of a host share. Requests with another `cache_salt` share no cached block.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    priority: int = 0
    cache_salt: str | None = None
    grammar: GrammarSpec | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, before temperature and truncation.

    `rank` is 1 for the most likely token. `top` holds (token id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


# ---------------------------------------------------------------------------------------------------------------
# engine -> device


class RowAdmit(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a row: all that the device keeps of it while it runs.

    token_ids   prompt, then what was generated before a preemption
    num_computed   leading tokens whose KV is in `block_ids` already (prefix hit); below len(token_ids)
    block_ids   blocks of those tokens only; later ones come with `RowWork.new_block_ids`
    seed        resolved: never None
    """

    row: int
    epoch: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int
    block_ids: list[int]
    params: SamplingParams
    seed: int


class RowWork(msgspec.Struct, frozen=True, array_like=True):
    """What one row does in one step.

        |<- num_computed (kept on the device) ->|<- num_cached ->|<- num_tokens ->|
                                                 blocks came      computed in
                                                 from the cache   this step

    num_tokens   tokens computed, at least 1
    num_cached   tokens skipped first, because their blocks were found in the prefix cache while the prompt runs
    new_block_ids   appended to the row's block table before anything else: cached blocks, then fresh ones
    samples      whether the last computed position yields a token; false inside a prompt
    context_bound   upper bound of the row's context after this step
    """

    row: int
    epoch: int
    num_tokens: int
    num_cached: int
    new_block_ids: list[int]
    samples: bool
    context_bound: int


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step, complete with the rows already admitted. An empty plan is legal.

    Plans run in `step_id` order. Rows not in `work` keep their state and do nothing. `masked_rows` wait for a
    `StepMask` before they sample.
    """

    step_id: int
    admits: list[RowAdmit]
    work: list[RowWork]
    masked_rows: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.work)


class StepMask(msgspec.Struct, frozen=True, array_like=True):
    """Grammar masks of a step: row i of `rows` may sample the token ids whose bit is set in `bits[i]`.

    `bits[i]` is little-endian, one bit a token, 4 * ceil(vocab_size / 32) bytes.
    """

    step_id: int
    rows: list[int]
    bits: list[bytes]


class RowSample(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that a row sampled in a step: one, or more with accepted drafts."""

    row: int
    epoch: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


class RowPromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of the prompt tokens at positions `start`, `start + 1`, ... that a step computed."""

    row: int
    epoch: int
    start: int
    logprobs: list[TokenLogprobs]


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a step returned. `error` is set when the step failed: then nothing else counts."""

    step_id: int
    samples: list[RowSample]
    prompt_logprobs: list[RowPromptLogprobs]
    error: str | None = None
    device_s: float = 0.0


ProgressFn = Callable[[str, float, str], None]  # phase, share from 0 to 1, note


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a device found when its weights were loaded: its KV memory is planned from it. Sizes in bytes.

    kind        "cpu" or "cuda"
    total_bytes, free_bytes   of the device; free beside the weights
    weight_bytes, step_bytes  taken by the weights, and by a step's work space
    bytes_per_token   keys and values of one token in all layers of this rank
    lines       as in `DeviceInfo`
    """

    kind: str
    total_bytes: int
    free_bytes: int
    weight_bytes: int
    step_bytes: int
    bytes_per_token: int
    vocab_size: int
    max_position_embeddings: int
    lines: list[str] = []


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What start-up of the devices found and decided; the scheduler is built from it.

    max_step_ms   predicted time of a step that prompt tokens may fill beside decoding rows; None: no bound
    yields_half   whether prompts get half as long as a step takes without them in any case
    lines   what was loaded, measured and chosen, one sentence each with its reason, printed once
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    plans_in_flight: int = 1
    max_step_ms: float | None = None
    yields_half: bool = False
    lines: list[str] = []


# ---------------------------------------------------------------------------------------------------------------
# engine -> API process


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request. The delta with a `finish_reason` is the last one.

    num_cached_tokens   prompt tokens that came from the prefix cache at first admission
    stop_token_id       the id that stopped it, where that is not the EOS of the checkpoint
    prompt_logprobs     None for the first prompt token, then one entry each; sent with the first sampled token
    error               with FinishReason.ERROR: what failed, for the sender
    queued_s, prefill_s with the first token: time waiting, time from first schedule to first token
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    queued_s: float | None = None
    prefill_s: float | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one request, as every API reports them."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State and counters of one engine; counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cache_queries: int = 0
    num_cache_hits: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    last_step_tokens: int = 0
    host_s: float = 0.0
    device_s: float = 0.0


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: TokenRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The client is gone: free the request; no delta follows."""

    request_ids: list[str]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """A text layer ended the request (a stop string): an abort that counts as success after `num_tokens`."""

    request_id: str
    reason: FinishReason
    num_tokens: int


class ResetCache(msgspec.Struct, frozen=True, tag=True):
    """Forget all cached blocks that no running request uses."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process in good order."""


ToEngine = Submit | Abort | Finish | ResetCache | Shutdown


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up: the phase under way and its share done, 0 to 1."""

    phase: str
    share: float
    note: str = ""


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests."""

    max_model_len: int
    block_size: int
    num_blocks: int
    vocab_size: int
    lines: list[str] = []  # what start-up decided and measured, each with its reason, to be printed


class Accepted(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The engine does not take the request; `status` and `param` as in `errors.RequestError`."""

    request_id: str
    message: str
    param: str | None = None
    status: int = 400


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """The tokens of one step, and the state after it."""

    deltas: list[TokenDelta]
    stats: EngineStats


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The last message of an engine that cannot go on or cannot start."""

    message: str
    startup: bool = False  # a StartupError: print the message without a traceback


FromEngine = Progress | EngineReady | Accepted | Refused | Deltas | EngineFailed

"""A request inside the engine, as counts.

    token_ids   |<------- prompt ------->|<-- generated, known -->|  in flight  |
                0                        num_prompt               len(token_ids) num_total
                |<---------- num_computed: planned so far ---------->|

`num_computed` chases `num_total`. It counts what was *planned*: a plan in flight is as good as done for every plan
after it, because devices run plans in order. An id in flight is one that a planned step will sample; the host does
not know it yet, the device that computes the next step does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from saddle.protocol import SamplingParams, TokenLogprobs, TokenRequest

NO_ROW = -1


class Status(Enum):
    """WAITING holds no row and no blocks; ENDED may hold both until the next update."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """State of one request.

    key             place in the order of service: smaller first (priority, arrival, number)
    max_total       most tokens that prompt and output may have together
    stop_ids        ids that end it
    row, epoch      where it runs, NO_ROW while it does not
    block_ids       its block table
    block_hashes    hash of every full block of known ids, as far as they were needed
    num_published   leading blocks of its table that were offered to the prefix cache
    num_flights     plans in flight that contain it
    planned_step    last step that contains it
    num_cached_tokens   tokens that came from the prefix cache before the first preemption
    """

    request_id: str
    params: SamplingParams
    key: tuple[int, float, int]
    token_ids: list[int]
    num_prompt: int
    max_total: int
    stop_ids: frozenset[int]
    seed: int
    arrival_s: float
    cache_salt: str | None
    has_grammar: bool
    status: Status = Status.WAITING
    num_computed: int = 0
    num_total: int = 0
    row: int = NO_ROW
    epoch: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_flights: int = 0
    planned_step: int = -1
    was_preempted: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    first_planned_s: float | None = None

    def __post_init__(self) -> None:
        self.num_total = len(self.token_ids)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def __lt__(self, other: Request) -> bool:
        return self.key < other.key

    @property
    def num_left(self) -> int:
        """Tokens to compute before it samples, those that the cache may hold included."""
        return self.num_total - self.num_computed

    @property
    def num_generated(self) -> int:
        """Generated ids that are known."""
        return len(self.token_ids) - self.num_prompt

    @property
    def reads_cache(self) -> bool:
        """Whoever wants the log-probabilities of a prompt has to compute all of it."""
        return self.params.prompt_logprobs is None

    def leave_row(self) -> None:
        """Forget row, blocks and all that was computed; known ids and ids in flight stay."""
        self.row = NO_ROW
        self.block_ids = []
        self.num_computed = self.num_published = 0


def from_tokens(
    request: TokenRequest, key: tuple[int, float, int], eos_ids: frozenset[int], max_model_len: int, seed: int
) -> Request:
    """The engine's state of a new request."""
    params = request.params
    num_prompt = len(request.prompt_ids)
    max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    return Request(
        request_id=request.request_id,
        params=params,
        key=key,
        token_ids=list(request.prompt_ids),
        num_prompt=num_prompt,
        max_total=min(num_prompt + max_tokens, max_model_len),
        stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids),
        seed=seed if params.seed is None else params.seed,
        arrival_s=request.arrival_s,
        cache_salt=request.cache_salt,
        has_grammar=request.grammar is not None,
    )

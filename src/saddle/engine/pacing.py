"""How many prompt tokens may join rows that decode, so that a step takes no longer than asked for.

A step with decoding rows makes each of their readers wait as long as it takes. Steps are measured: those of decoding
rows alone say what these cost, the rest of a mixed step is the cost of its prompt tokens, per token. Both follow what
was measured last, since a token costs more late in a long prompt. The cost per token is not constant in the number of
tokens (few tokens read as many weights as many), but that of the last step's number is the one that counts: where
prediction and measurement agree, they agree at the number in use.
"""

from __future__ import annotations

from saddle.protocol import StepPlan

FIRST_TOKENS = 512  # beside decoding rows, before any prompt was measured
DECODE_WEIGHT = 0.2  # of a new measurement
TOKEN_WEIGHT = 0.5


class Pacer:
    """Bounds the prompt tokens of a step.

    Args:
        max_step_s: predicted time of a step with decoding rows that prompt tokens may fill; None: no bound.
        yields_half: prompts get at least as much time as the decoding rows take, whatever `max_step_s`: without it a
            model that decodes slower than the bound would read no prompt while anybody is answered.
        least: tokens that a prompt gets in any case, so that it gets on.
    """

    def __init__(self, max_step_s: float | None, yields_half: bool, least: int) -> None:
        self._max_step_s = max_step_s
        self._yields_half = yields_half
        self._least = least
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long on the device."""
        if self._max_step_s is None or seconds <= 0:
            return
        num_prompt_tokens = sum(work.num_tokens for work in plan.work if work.num_tokens > 1)
        num_decodes = sum(work.num_tokens == 1 for work in plan.work)
        if num_prompt_tokens == 0:
            before = seconds if self._decode_s is None else self._decode_s
            self._decode_s = before + (seconds - before) * DECODE_WEIGHT
        elif num_prompt_tokens >= self._least:
            decode_s = (self._decode_s or 0.0) if num_decodes else 0.0
            # A decode step measured before may have been slower than this whole one.
            found = max(seconds - decode_s, 0.1 * seconds) / num_prompt_tokens
            before = found if self._token_s is None else self._token_s
            self._token_s = before + (found - before) * TOKEN_WEIGHT

    def limit(self, budget: int, num_decodes: int) -> int:
        """Prompt tokens that may join `num_decodes` rows, at most `budget`."""
        if self._max_step_s is None or num_decodes == 0:
            return budget
        if self._token_s is None:
            return min(budget, max(FIRST_TOKENS, self._least))
        decode_s = self._decode_s or 0.0
        left_s = self._max_step_s - decode_s
        if self._yields_half:
            left_s = max(left_s, decode_s)
        return min(budget, max(int(left_s / self._token_s), self._least))

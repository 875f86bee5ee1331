"""How many prompt tokens may join rows that decode, so that a step takes no longer than asked for.

A step with decoding rows makes each of their readers wait as long as it takes. What a step with prompts takes is

    fixed + per_token * tokens + per_pair * pairs

tokens: all of the step, those of decoding rows included. pairs: (token, token before it) of attention; a row that
decodes reads its keys for one token alone, which costs as much as `DECODE_PAIRS` pairs each. fixed: reading the
weights, which many tokens do no more often than few.

The three numbers are fitted to the steps that were measured, by least squares in which old steps fade and which a
weak prior holds up where the steps say nothing: those of one size cannot tell fixed from per_token. The prior is what
a model of M2's shape does on any device. Steps of rows alone, which read some of the experts, say what reading all
would take; computing `EVEN_TOKENS` tokens takes as long as that, and attention over `EVEN_CONTEXT` tokens as long as
all else does for a token.

What matters is that few steps take too long, not that the mean is right: predictions are raised by their mean error,
and a step has at most `GROWTH` times the tokens of the largest one that was measured. A measured time that is
far off (a step that something held up) counts less.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from saddle.protocol import RowWork, StepPlan

FIRST_TOKENS = 512  # that half of a step is taken to hold before anything was measured
EVEN_TOKENS = 2560  # take as long to compute as the weights take to read: 620 TFLOP/s against 3 TB/s
EVEN_CONTEXT = 8192  # 24,576 operations a pair and layer at 500 TFLOP/s, against EVEN_TOKENS of the weights' time
DECODE_PAIRS = 24  # 4 KiB of keys and values at 3 TB/s against 24,576 operations at 500 TFLOP/s
TOKENS = 1024  # unit of the fit, so that its numbers are of one size
PAIRS = TOKENS * EVEN_CONTEXT
UNREAD = 31 / 32  # of the experts, by one token: each goes to 8 of 256
DENSE = 0.04  # of the weights are no experts': 0.02 with all 62 layers, 0.06 with 16
LEAST_TOKEN = 0.125  # of what the prior says that a token costs
LEAST_EXTRA, MOST_EXTRA = -0.25, 3.0  # attention beyond what the prior says, in parts of it
KEEP = 0.95  # of the weight of older steps
# Of fixed, per_token and per_pair: how many steps the prior is worth, and the size of the first in units of the fit.
PRIOR = ((0.5, 1.0), (0.02, FIRST_TOKENS / TOKENS), (0.05, 0.5))
DECODE_WEIGHT = 0.2  # of a new measurement of rows alone
ERROR_WEIGHT = 0.1
GROWTH = 2  # times the tokens of the largest step measured: the fit is not trusted far beyond what it has seen
OUTLIER = 1.5  # a step that takes longer than this many times the prediction counts as that long

Vector = tuple[float, float, float]


class Pacer:
    """Bounds the prompt tokens of a step.

    Args:
        max_step_s: predicted time of a step with decoding rows that prompt tokens may fill; None: no bound.
        yields_half: prompts get at least half as long as the step takes without them, whatever `max_step_s`: without
            it a device that is slower than the bound would read next to nothing while anybody is answered, and read
            all its weights for that.
        least: tokens that a prompt gets in any case, so that it gets on.
    """

    def __init__(self, max_step_s: float | None, yields_half: bool, least: int) -> None:
        self._max_step_s = max_step_s
        self._yields_half = yields_half
        self._least = least
        self._weights_s = 0.0  # of reading all weights, from the latest step of rows alone
        self._error = 0.0  # mean of |measured / predicted - 1|
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        self._num_measured = 0
        self._largest = max(least, FIRST_TOKENS // GROWTH)  # tokens of a step that was measured
        self._fixed_s = self._token_s = self._pair_s = 0.0  # of the latest fit

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long on the device."""
        if self._max_step_s is None or seconds <= 0:
            return
        if all(work.num_tokens == 1 for work in plan.work):
            tokens, pairs = _size(plan.work)
            before = self._weights_s
            # What the rows left unread of the weights is read by prompts: nearly all experts have some of their tokens.
            found = max(seconds - self._pair_s * pairs, 0.0) / (1 - (1 - DENSE) * UNREAD**tokens)
            self._weights_s = before + (found - before) * (DECODE_WEIGHT if before else 1.0)
        else:
            self._learn(*_size(plan.work), seconds)

    def room(self, decodes: Sequence[RowWork], budget: int) -> tuple[float | None, int]:
        """What prompts may add to a step of these rows.

        Returns:
            Seconds, None for any, and tokens, at most `budget`.
        """
        if self._max_step_s is None or not decodes:
            return None, budget
        self._solve()
        longest_s, rows_s = self._max_step_s, self.predict_s(decodes)
        if self._yields_half:
            longest_s = max(longest_s, 1.5 * rows_s)
        return longest_s / (1 + self._error) - rows_s, min(budget, GROWTH * self._largest)

    def fit(self, room_s: float | None, start: int, budget: int, *, leads: bool) -> int:
        """Tokens of a prompt behind `start` others that `room_s` holds, at most `budget`.

        Args:
            leads: whether it is the first of its step, which gets on in any case.
        """
        if room_s is None:
            return budget
        least = self._least if leads else 0
        if room_s <= 0:
            return min(budget, least)
        slope = self._token_s + self._pair_s * start
        # The root of slope * n + pair_s * n^2 / 2 = room_s, in the form that does not cancel.
        found = 2 * room_s / (slope + sqrt(slope * slope + 2 * self._pair_s * room_s))
        return min(budget, max(int(found), least))

    def predict_s(self, work: Sequence[RowWork]) -> float:
        """Seconds that a step with prompts is predicted to take, by what was measured so far."""
        return self._predict(*_size(work))

    def cost_s(self, num_tokens: int, start: int) -> float:
        """Seconds that a prompt's tokens behind `start` others add to a step."""
        return self._token_s * num_tokens + self._pair_s * num_tokens * (start + num_tokens / 2)

    # the fit -----------------------------------------------------------------------------------------------------

    def _predict(self, tokens: int, pairs: float) -> float:
        return self._fixed_s + self._token_s * tokens + self._pair_s * pairs

    def _learn(self, tokens: int, pairs: float, seconds: float) -> None:
        predicted = self._predict(tokens, pairs)
        if self._num_measured >= len(PRIOR) and predicted > 0:
            seconds = min(seconds, OUTLIER * predicted)
            self._error += (min(abs(seconds / predicted - 1), OUTLIER - 1) - self._error) * ERROR_WEIGHT
        self._num_measured += 1
        self._largest = max(tokens, self._largest)
        features = 1.0, tokens / TOKENS + pairs / PAIRS, pairs / PAIRS
        for row, feature in enumerate(features):
            self._products[row] = self._products[row] * KEEP + feature * seconds
            for column, other in enumerate(features):
                self._squares[row][column] = self._squares[row][column] * KEEP + feature * other
        self._solve()

    def _solve(self) -> None:
        """The three costs from the sums, held up by the prior."""
        assert self._max_step_s is not None
        first = self._weights_s / EVEN_TOKENS if self._weights_s else self._max_step_s / 2 / FIRST_TOKENS
        expected = self._weights_s, first * TOKENS, 0.0
        matrix, right = [list(line) for line in self._squares], list(self._products)
        for row, (steps, first) in enumerate(PRIOR):
            # As so many steps of the mean size so far, of which one of the size of the first is taken for granted.
            weight = steps * (self._squares[row][row] + first * first) / (self._squares[0][0] + 1)
            matrix[row][row] += weight
            right[row] += weight * expected[row]
        _, token, extra = solve(matrix, right)
        (count, tokens, pairs), (_, both, mixed), (_, _, square) = matrix
        if not LEAST_EXTRA * token <= extra <= MOST_EXTRA * token:
            # Attention is some multiple of the rest: with the nearest that may be, two numbers are left.
            ratio = LEAST_EXTRA if extra < LEAST_EXTRA * token else MOST_EXTRA
            cross, square = tokens + ratio * pairs, both + ratio * (2 * mixed + ratio * square)
            product = right[1] + ratio * right[2]
            token = (count * product - cross * right[0]) / (count * square - cross * cross)
            extra = ratio * token
        if token < LEAST_TOKEN * expected[1]:
            token, extra = LEAST_TOKEN * expected[1], 0.0
        fixed = (right[0] - tokens * token - pairs * extra) / count
        self._fixed_s, self._token_s, self._pair_s = max(fixed, 0.0), token / TOKENS, (token + extra) / PAIRS


def _size(work: Sequence[RowWork]) -> tuple[int, float]:
    """Tokens and pairs of a step, see above."""
    tokens, pairs = 0, 0.0
    for item in work:
        count, end = item.num_tokens, item.context_bound
        tokens += count
        pairs += DECODE_PAIRS * end if count == 1 else count * (end - count / 2)
    return tokens, pairs


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> Vector:
    """x of `matrix` @ x = `right`, three by three, symmetric and positive definite."""
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for pivot in range(3):
        for below in range(pivot + 1, 3):
            factor = rows[below][pivot] / rows[pivot][pivot]
            rows[below] = [low - factor * high for low, high in zip(rows[below], rows[pivot], strict=True)]
    z = rows[2][3] / rows[2][2]
    y = (rows[1][3] - rows[1][2] * z) / rows[1][1]
    x = (rows[0][3] - rows[0][1] * y - rows[0][2] * z) / rows[0][0]
    return x, y, z

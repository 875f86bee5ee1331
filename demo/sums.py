"""Integer arithmetic, with the steps written out so that each one is a look at two digits.

The thinking first writes the question as an expression, then works the product out, then adds and subtracts from
left to right. Columns go from the units up; `7+8+0:5,1` reads "seven plus eight plus the carry nought: write five,
carry one". Subtraction takes the smaller number from the larger one, so a borrow never runs off the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.words import is_held_out

LARGEST = 9_999
LARGEST_FACTOR = 99


@dataclass(frozen=True, slots=True)
class Expression:
    """first op term op term ...; a term is a number or a product (a, b)."""

    terms: tuple[int | tuple[int, int], ...]
    ops: str

    def text(self, gap: str = "", times: str = "*") -> str:
        """The expression in symbols, `gap` around each operator."""
        parts = [self._term(0, gap, times)]
        for number, op in enumerate(self.ops, 1):
            parts += [gap + op + gap, self._term(number, gap, times)]
        return "".join(parts)

    def _term(self, number: int, gap: str, times: str) -> str:
        term = self.terms[number]
        return f"{term[0]}{gap}{times}{gap}{term[1]}" if isinstance(term, tuple) else str(term)

    @property
    def value(self) -> int:
        values = [t[0] * t[1] if isinstance(t, tuple) else t for t in self.terms]
        total = values[0]
        for op, value in zip(self.ops, values[1:], strict=True):
            total += value if op == "+" else -value
        return total


def draw(r: random.Random, scored: bool, most_terms: int = 5, digits: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 4)) -> Expression:
    """A random expression from the right side of the hold-out rule."""
    while True:
        count = r.choice((2, 2, 3, 3, 4, 5))
        count = min(count, most_terms)
        terms: list[int | tuple[int, int]] = [number(r, digits) for _ in range(count)]
        if r.random() < 0.4:
            place = r.randrange(count)
            factors = (number(r, digits), r.randint(2, 9) if r.random() < 0.4 else r.randint(10, LARGEST_FACTOR))
            terms[place] = factors if r.random() < 0.7 else (factors[1], factors[0])
            if r.random() < 0.25:
                terms = [terms[place]]  # a product alone
        ops = "".join(r.choice("+-") for _ in terms[1:])
        expression = Expression(tuple(terms), ops)
        if is_held_out(expression.text()) == scored:
            return expression


def number(r: random.Random, digits: tuple[int, ...]) -> int:
    length = r.choice(digits)
    return r.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


# ---------------------------------------------------------------------------------------------------------------
# the steps


def columns(a: int, b: int, op: str) -> str:
    """The columns of a + b, or of a - b for a >= b >= 0."""
    x, y = str(a)[::-1], str(b)[::-1]
    carry, found = 0, []
    for i in range(max(len(x), len(y))):
        u, v = int(x[i]) if i < len(x) else 0, int(y[i]) if i < len(y) else 0
        total = u + v + carry if op == "+" else u - v - carry
        out = int(total > 9) if op == "+" else int(total < 0)
        found.append(f"{u}{op}{v}{op}{carry}:{total % 10},{out}")
        carry = out
    return " ".join(found)


def add(a: int, b: int, op: str) -> str:
    """One line for a op b; a may be negative, b is not."""
    result = a + b if op == "+" else a - b
    if a >= 0 and op == "+":
        work = columns(a, b, "+")
    elif a >= 0:
        work = columns(a, b, "-") if a >= b else f"-({b}-{a}) " + columns(b, a, "-")
    elif op == "-":
        work = f"-({-a}+{b}) " + columns(-a, b, "+")
    else:
        work = f"({b}-{-a}) " + columns(b, -a, "-") if b >= -a else f"-({-a}-{b}) " + columns(-a, b, "-")
    return f"{a}{op}{b}: {work} = {result}"


def times_digit(a: int, digit: int) -> str:
    """a times one digit, from the units up."""
    carry, found = 0, []
    for char in str(a)[::-1]:
        total = int(char) * digit + carry
        found.append(f"{char}*{digit}+{carry}:{total % 10},{total // 10}")
        carry = total // 10
    return " ".join(found) + f" = {a * digit}"


def multiply(a: int, b: int) -> list[str]:
    """Lines for a * b; the factor with fewer digits is taken apart."""
    if len(str(b)) > len(str(a)):
        a, b = b, a
    head = f"{a}*{b}"
    if b < 10:
        return [f"{head}: {times_digit(a, b)}"]
    tens, units = divmod(b, 10)
    low, high = a * units, a * tens * 10
    return [
        f"{head}: {units} and {tens}0",
        f"{a}*{units}: {times_digit(a, units)}",
        f"{a}*{tens}: {times_digit(a, tens)}, {high}",
        add(high, low, "+"),
    ]


def steps(expression: Expression) -> str:
    """The thinking: the expression, its product, then every sum from left to right."""
    lines = [expression.text()]
    values = []
    for term in expression.terms:
        if isinstance(term, tuple):
            lines += multiply(*term)
            values.append(term[0] * term[1])
        else:
            values.append(term)
    if len(lines) > 1 and expression.ops:
        lines.append(Expression(tuple(values), expression.ops).text())
    total = values[0]
    for op, value in zip(expression.ops, values[1:], strict=True):
        lines.append(add(total, value, op))
        total = total + value if op == "+" else total - value
    return "\n".join(lines)


def answer(expression: Expression) -> str:
    return f"{expression.text(' ')} = {expression.value}"


# ---------------------------------------------------------------------------------------------------------------
# the question

WORDINGS = (
    "What is {}?", "what is {}", "What's {}?", "Compute {}.", "compute {}", "Calculate {}.", "calculate {}", "{}", "{} = ?",
    "{} =", "{}?", "How much is {}?", "how much is {}", "Please compute {}.", "Can you calculate {}?", "Work out {}.",
    "Evaluate {}.", "Solve {}.", "Tell me {}.", "I need the result of {}.", "Find the value of {}.", "What does {} equal?",
    "What does {} make?", "Give me the result of {}.", "Add it up: {}", "Sum: {}", "{} please", "Quick: {}", "Could you work out {} for me?",
    "The answer to {}?", "Hey, what is {}?", "Do the math: {}", "result of {}", "What do you get for {}?", "Now {}",
)  # fmt: skip


def spell(expression: Expression, r: random.Random) -> str:
    """The expression as a person may write it: with or without blanks, in symbols or in words."""
    style = r.random()
    if style < 0.3:
        return expression.text(" ", r.choice("**x"))
    if style < 0.55:
        return expression.text("", r.choice("**x"))
    plus, minus = r.choice((("plus", "minus"), ("plus", "minus"), ("and", "minus"), ("plus", "less")))
    times = r.choice(("times", "times", "multiplied by"))
    text = expression.text(" ", "*")
    return text.replace("+", plus).replace(" - ", f" {minus} ").replace("*", times)


def question(expression: Expression, r: random.Random) -> str:
    """One of the wordings, or a sentence for the short forms."""
    plain = all(isinstance(term, int) for term in expression.terms)
    if plain and r.random() < 0.15:
        special = _sentence([t for t in expression.terms if isinstance(t, int)], expression.ops, r)
        if special:
            return special
    if not expression.ops and isinstance(expression.terms[0], tuple) and r.random() < 0.4:
        a, b = expression.terms[0]
        return r.choice((f"What is the product of {a} and {b}?", f"Multiply {a} by {b}.", f"the product of {a} and {b}",
                         f"multiply {a} and {b}", f"How much is {a} times {b}?"))  # fmt: skip
    return r.choice(WORDINGS).format(spell(expression, r))


def _sentence(terms: list[int], ops: str, r: random.Random) -> str | None:
    if set(ops) == {"+"}:
        listed = ", ".join(map(str, terms[:-1])) + f" and {terms[-1]}"
        return r.choice((f"What is the sum of {listed}?", f"Add {listed}.", f"the sum of {listed}", f"Add up {listed}."))
    if ops == "-":
        a, b = terms
        return r.choice((f"Subtract {b} from {a}.", f"What is the difference of {a} and {b}?", f"Take {b} away from {a}.",
                         f"What is {a} take away {b}?", f"{a} less {b}"))  # fmt: skip
    return None

"""Short word problems. Each template is a story and the expression it asks for; numbers, names and nouns vary.

`UNSEEN` templates never occur in training: they show how far the model carries, and are reported, not scored.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.sums import Expression
from demo.words import NOUNS, Words

# Story, terms and operators. A lower-case letter is a number, {P}, {Q} are people, {n}, {m} nouns. A term such as "bc"
# is a product. Numbers are drawn so that no stock runs negative.
TEMPLATES: tuple[tuple[str, str, str], ...] = (
    ("{P} has {a} {n}. {Q} gives {P} {b} more. How many {n} does {P} have now?", "a b", "+"),
    ("{P} has {a} {n} and buys {b} more. How many {n} does {P} have?", "a b", "+"),
    ("{P} has {a} {n} and gives {b} of them to {Q}. How many {n} are left?", "a b", "-"),
    ("{P} had {a} {n} and lost {b}. How many {n} does {P} still have?", "a b", "-"),
    ("There are {a} {n} in a box. {P} takes out {b}. How many {n} remain in the box?", "a b", "-"),
    ("{P} buys {a} boxes with {b} {n} each. How many {n} is that?", "ab", ""),
    ("A box holds {b} {n}. How many {n} are in {a} boxes?", "ab", ""),
    ("{P} packs {a} bags with {b} {n} each and has {c} {n} left over. How many {n} did {P} have?", "ab c", "+"),
    ("{P} has {a} {n}. {Q} has {b} more {n} than {P}. How many {n} does {Q} have?", "a b", "+"),
    ("{P} has {a} {n}. {Q} has {b} fewer {n} than {P}. How many {n} does {Q} have?", "a b", "-"),
    ("{P} has {a} {n} and {Q} has {b} {n}. How many {n} do they have together?", "a b", "+"),
    ("{P} has {a} {n}, {Q} has {b} {n} and {R} has {c} {n}. How many {n} do they have in all?", "a b c", "++"),
    ("A shop had {a} {n}. It sold {b} in the morning and {c} in the afternoon. How many {n} are left?", "a b c", "--"),
    ("{P} had {a} {n}, bought {b} more and then gave {c} to {Q}. How many {n} does {P} have now?", "a b c", "+-"),
    ("{P} had {a} {n}, gave {b} to {Q} and then found {c}. How many {n} does {P} have now?", "a b c", "-+"),
    ("One of the {n} costs {b} coins. How many coins do {a} {n} cost?", "ab", ""),
    ("{P} buys {a} {n} for {b} coins each and pays with {c} coins. How many coins does {P} get back?", "c ab", "-"),
    ("{P} reads {b} pages a day. How many pages does {P} read in {a} days?", "ab", ""),
    ("A bus has {a} passengers. {b} get off and {c} get on. How many passengers are on the bus?", "a b c", "-+"),
    ("In a garden there are {a} rows of {b} {n}. {P} picks {c} of them. How many {n} are left?", "ab c", "-"),
    ("{P} collects {a} {n} on Monday, {b} on Tuesday and {c} on Wednesday. How many {n} in total?", "a b c", "++"),
    ("{P} needs {a} {n} and has {b}. How many more {n} does {P} need?", "a b", "-"),
    ("{P} saves {b} coins a week for {a} weeks and then spends {c} coins. How many coins are left?", "ab c", "-"),
    ("A farmer has {a} {n} and {b} {m}. How many animals and things is that in all?", "a b", "+"),
    ("{P} bakes {a} trays of {b} {n} and eats {c} of the {n}. How many {n} remain?", "ab c", "-"),
    ("{P} is {a} years old. {Q} is {b} years older. How old is {Q}?", "a b", "+"),
    ("{P} is {a} years old. {Q} is {b} years younger. How old is {Q}?", "a b", "-"),
    ("A train travels {b} kilometres an hour. How far does it get in {a} hours?", "ab", ""),
    ("{P} walks {a} steps, then {b} steps back, then {c} steps forward. How far is {P} from the start?", "a b c", "-+"),
    ("There were {a} {n} on a shelf. {P} put {b} more there and {Q} took {c}. How many {n} are on the shelf?", "a b c", "+-"),
    ("{P} counts {a} {n} and {Q} counts {b} {n}. How many {n} do they count together?", "a b", "+"),
    ("{P} finds {a} {n} in the morning and {b} in the evening. How many {n} does {P} find?", "a b", "+"),
    ("There are {a} {n} on a table. {P} adds {b}. How many {n} are on the table?", "a b", "+"),
    ("{P} wants {a} {n} but has only {b}. How many {n} are missing?", "a b", "-"),
    ("{P} had {a} {n}. {Q} took {b} of them. How many {n} does {P} have left?", "a b", "-"),
    ("{P} has {a} {n} and throws {b} away. How many {n} does {P} keep?", "a b", "-"),
    ("Of {a} {n}, {b} are broken. How many {n} are whole?", "a b", "-"),
    ("{P} has {a} {n} and {Q} has {b}. How many more {n} does {P} have than {Q}?", "a b", "-"),
    ("{P} sells {b} of {a} {n}. How many {n} are not sold?", "a b", "-"),
    ("{P} fills {a} bags with {b} {n} each. How many {n} are there in all?", "ab", ""),
    ("{P} makes {b} {n} an hour. How many {n} does {P} make in {a} hours?", "ab", ""),
    ("{a} friends bring {b} {n} each. How many {n} do they bring?", "ab", ""),
    ("Every shelf has {b} {n}. How many {n} are on {a} shelves?", "ab", ""),
    ("{P} pays {b} coins for each of {a} {n}. How many coins does {P} pay?", "ab", ""),
    ("{P} had {c} coins and buys {a} {n} at {b} coins each. How many coins are left?", "c ab", "-"),
    ("{P} has {c} {n} and gets {a} bags of {b} {n}. How many {n} does {P} have now?", "c ab", "+"),
    ("{P} buys {a} packs of {b} {n} and gives {c} to {Q}. How many {n} does {P} keep?", "ab c", "-"),
    ("{P} has {a} {n}, loses {b} and loses {c} more. How many {n} remain?", "a b c", "--"),
    ("{P} has {a} {n}, finds {b} and finds {c} more. How many {n} does {P} have?", "a b c", "++"),
    ("A store has {a} {n}. {b} arrive and {c} are sold. How many {n} does the store have now?", "a b c", "+-"),
    ("{P} plants {a} rows of {b} {n} and then {c} more. How many {n} does {P} plant?", "ab c", "+"),
    ("{P} put {a} {n} in one bag and {b} {n} in another. How many {n} are in the bags?", "a b", "+"),
    ("{P} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {P} read?", "a b", "+"),
    ("A book has {a} pages. {P} has read {b} pages. How many pages are left?", "a b", "-"),
    ("{P} earns {a} coins and spends {b} coins. How many coins does {P} have left?", "a b", "-"),
    ("{P} cuts {a} {n} from a tree and {Q} cuts {b}. They eat {c}. How many {n} are left?", "a b c", "+-"),
)  # fmt: skip
UNSEEN: tuple[tuple[str, str, str], ...] = (
    ("{P} picked {a} {n} but {b} of them were bad. How many good {n} were there?", "a b", "-"),
    ("Each of {a} children gets {b} {n}. How many {n} are handed out?", "ab", ""),
    ("{P} carries {a} {n} in one hand and {b} in the other, then drops {c}. How many {n} are still carried?", "a b c", "+-"),
    ("After giving away {b} of the {a} {n}, how many {n} does {P} have?", "a b", "-"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Story:
    text: str
    expression: Expression
    unit: str

    @property
    def reply(self) -> str:
        return f"{self.expression.value} {self.unit}"


def draw(r: random.Random, scored: bool, templates: tuple[tuple[str, str, str], ...] = TEMPLATES) -> Story:
    """A story with names and nouns from the right side of the hold-out rule."""
    words = Words(r, scored)
    if scored:  # without a name or noun nothing would tell a scored story from one that was trained on
        templates = tuple(template for template in templates if any(gap in template[0] for gap in ("{P}", "{n}")))
    text, terms, ops = r.choice(templates)
    while True:
        numbers = _numbers(r, terms, ops)
        expression = _expression(terms, ops, numbers)
        if expression.value >= 0:
            break
    names: list[str] = []
    while len(names) < 3:
        name = words.name()
        if name not in names:
            names.append(name)
    nouns = (words.of(NOUNS, 0.4), words.of(NOUNS, 0.4))
    filled = text.format(P=names[0], Q=names[1], R=names[2], n=nouns[0], m=nouns[1], **numbers)
    return Story(filled, expression, _unit(text, nouns[0]))


def _unit(text: str, noun: str) -> str:
    question = text.rsplit(". ", 1)[-1]
    for unit in ("coins", "pages", "passengers", "kilometres", "years", "steps"):
        if unit in question or (unit in text and "{n}" not in question and f"How many {unit}" in text):
            return unit
    if "How old" in text:
        return "years"
    if "How far does" in text:
        return "kilometres"
    if "How far is" in text:
        return "steps"
    return "things" if "things" in question else noun


def _numbers(r: random.Random, terms: str, ops: str) -> dict[str, int]:
    most = r.choice((20, 100, 100, 1000))
    found = {letter: r.randint(1, most) for letter in "abc"}
    for term in terms.split():
        if len(term) == 2:
            found[term[0]] = r.randint(2, 20 if most < 1000 else 40)
            found[term[1]] = r.randint(2, min(most, 60))
    # What is taken away must be there; let it be so most of the time without drawing again for long.
    first = terms.split()[0]
    if "-" in ops and len(first) == 1:
        found[first] = r.randint(most // 2, 3 * most)
    return found


def _expression(terms: str, ops: str, numbers: dict[str, int]) -> Expression:
    values = [numbers[t] if len(t) == 1 else (numbers[t[0]], numbers[t[1]]) for t in terms.split()]
    return Expression(tuple(values), ops)

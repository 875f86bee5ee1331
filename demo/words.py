"""The words that the generators build from, and the rule that keeps some of them for scoring alone.

A word is held out when its checksum says so, whether it stands in a list or is made up of syllables. Training draws
from the others only, so no name of a scored case can have been seen.
"""

from __future__ import annotations

import random
import zlib

HELD_OUT_ONE_IN = 8


def is_held_out(text: str) -> bool:
    """Whether a word (or an expression) belongs to scoring."""
    return zlib.crc32(text.lower().encode()) % HELD_OUT_ONE_IN == 0


VERBS = """get find create list send update delete check book cancel open close start stop add remove search lookup read
write count compare convert track order reserve print upload download share move copy rename archive restore approve
reject assign invite block mute play pause record measure test build deploy scan sort merge split plan schedule renew
export import publish rate flag verify refund ship pack call fetch show set reset enable disable draft sign label""".split()

OBJECTS = """weather order invoice ticket flight hotel room meeting event reminder note task file folder image song movie
playlist message email contact customer payment refund account balance budget report chart table database server backup
branch commit issue package shipment parcel address route map distance station train bus taxi bicycle recipe menu meal
restaurant doctor patient appointment prescription lesson course student teacher grade exam book library article paper
journal translation dictionary currency stock price discount coupon product catalog inventory warehouse machine sensor
temperature humidity light lamp heater door window camera alarm battery printer scanner camera license passport visa
contract policy claim tax loan mortgage salary employee team project deadline milestone sprint bug release log metric
alert dashboard query schema index cache queue job worker cluster container domain certificate password token session
user profile avatar comment review rating survey form poll vote match score league player garden plant tree seed crop
tractor engine tire wheel boat harbor ferry museum gallery painting statue concert festival theater seat subscription
newsletter podcast episode channel video stream photo album gift voucher donation charity volunteer shift roster locker
desk elevator floor parking garage toll bridge tunnel river lake tide moon planet star satellite rocket""".split()

NOUNS = """apples pears plums oranges lemons cherries nuts eggs cookies cakes pies loaves bottles cups plates forks spoons
pens pencils books stamps coins cards marbles shells stones buttons ribbons beads balls kites dolls blocks toys boxes
bags baskets jars tickets posters photos flowers roses tulips seeds trees sheep goats hens ducks horses fish frogs
birds bricks tiles nails screws bolts planks chairs lamps candles shirts socks hats scarves gloves shoes keys maps
letters magazines notebooks stickers badges medals bananas melons peaches carrots potatoes onions tomatoes peppers
muffins waffles sandwiches chocolates sweets lollies balloons whistles drums flutes tents ropes buckets brushes""".split()

NAMES = """Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Kira Leo Mia Noah Olga Paul Rosa Sam Tina Uwe Vera Will
Yara Zoe Amir Bela Carlos Dina Elif Farid Gina Hana Ivan Jana Karim Lena Marco Nora Omar Petra Rafael Sara Tom Ursula
Viktor Wanda Xenia Yusuf Alice Boris Celia Dario Edith Frank Gerda Henry Irene Jack Karen Louis Maria Nadia Oscar Peter
Ruth Simon Tara Ulla Vince Walter Yvonne Adam Bruno Chloe Daniel Erika Fiona George Helen Isaac Judith""".split()

FILLER = """small large blue red green old new fast slow north south east west main first last daily weekly private public
quiet bright early late spring summer autumn winter river valley hill garden silver golden open central""".split()

CITIES = """Paris Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Warsaw Athens Helsinki Tokyo Delhi Cairo Lima Quito
Accra Nairobi Toronto Boston Denver Austin Seattle Chicago Dallas Sydney Perth Hamburg Munich Lyon Porto Geneva""".split()

PARAMETERS = """city name title date day id number count limit page size amount price level speed color format language unit
status type priority category owner target source path text subject body message email phone country zone street room
floor seat age weight height width length depth duration delay start end year month week hour minute score rank index
port host user group role team project branch version tag label key value mode method reason comment query topic region
channel currency code""".split()

ONSETS = "b d f g h j k l m n p r s t v w z br cr dr fl gr kl pl pr sk sl st tr".split()
VOWELS = "a e i o u ai ea io ou".split()
REAL = [word.lower() for word in (*VERBS, *OBJECTS, *NOUNS, *NAMES, *FILLER, *CITIES, *PARAMETERS) if len(word) > 2]
CODAS = ["", "", "", "l", "n", "r", "s", "t", "x", "nd", "rk", "st"]


def made_up(r: random.Random) -> str:
    """A word that no list has: syllables, or a real word bent. Both spell like words and must be copied by letter."""
    return twisted(r) if r.random() < 0.5 else syllables(r)


def twisted(r: random.Random) -> str:
    """A listed word with a letter lost, doubled or changed, or the halves of two words."""
    word = r.choice(REAL)
    if r.random() < 0.5:
        other = r.choice(REAL)
        return word[: r.randint(2, 5)] + other[-r.randint(2, 5) :]
    place = r.randrange(1, len(word))
    return word[:place] + r.choice(("", word[place] * 2, r.choice("aeiouabcdefghklmnoprstuw"))) + word[place + 1 :]


def syllables(r: random.Random) -> str:
    count = r.choice((1, 2, 2, 2, 3))
    return "".join(r.choice(ONSETS) + r.choice(VOWELS) for _ in range(count)) + r.choice(CODAS)


class Words:
    """Draws words for training (`scored` False) or for scoring."""

    def __init__(self, r: random.Random, scored: bool) -> None:
        self.r = r
        self.scored = scored

    def allows(self, text: str) -> bool:
        return is_held_out(text) == self.scored

    def of(self, pool: list[str], made_up_share: float = 0.3) -> str:
        """A word of a list or a made-up one, from the right side of the rule."""
        while True:
            word = made_up(self.r) if self.r.random() < made_up_share else self.r.choice(pool)
            if self.allows(word):
                return word

    def name(self) -> str:
        """A person's name."""
        word = self.of(NAMES, 0.4)
        return word[0].upper() + word[1:]

    def phrase(self, most: int) -> str:
        """A value of one to `most` words, as a request would give it."""
        r = self.r
        words = []
        for _ in range(r.randint(1, most)):
            kind = r.random()
            if kind < 0.3:
                words.append(made_up(r))
            elif kind < 0.5:
                words.append(r.choice(NAMES))
            elif kind < 0.65:
                words.append(r.choice(CITIES))
            elif kind < 0.8:
                words.append(r.choice(FILLER))
            elif kind < 0.92:
                words.append(r.choice(OBJECTS))
            else:
                words.append(r.choice("ABCDEFGHKLMNPRSTXZ") + str(r.randrange(1000)))
        return " ".join(words)

"""The words of the tiny language, its sentence forms, and its tokens.

Every word and every digit ("4 0 7") is one token together with the space before it. So a text has as many tokens as
pieces, and a text with a given distance can be built without a tokenizer.
"""

# ruff: noqa: SIM905 (lists of words are read more easily as text)

from __future__ import annotations

import random
import re
from collections.abc import Sequence

BOS, TURN, END, PAD = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

SHE = """Mira Paula Kira Nora Anna Lena Ida Eva Mila Sara Clara Emma Greta Hanna Jana Karla Lea Maya Nina Olga Petra
Rosa Sofia Tina Ursula Vera Wanda Yara Zoe Alice Bella Celia Diana Edith Flora Gina Helga Irene Julia Laura""".split()
HE = """Omar Amir Otto Gustav Boris Simon Adam Ben Carl David Emil Felix Georg Hugo Ivan Jakob Karim Leon Max Noah
Oscar Paul Quentin Robin Stefan Theo Uwe Viktor Walter Xaver Yusuf Zeno Arthur Bruno Conrad Dario Erik Frank Gregor
Henry""".split()
NAMES = SHE + HE
ALIASES = """Falcon Comet Umber Juniper Ember Cedar Onyx Raven Maple Cobalt Willow Saffron Thunder Pebble Orchid Lynx
Badger Heron Quartz Zephyr Marble Hazel Indigo Jasper Kestrel Lotus Meteor Nimbus Opal Pepper Quill Rocket Sparrow Topaz
Velvet Walnut Amber Birch Coral Dahlia Echo Flint Garnet Lilac""".split()
COLOURS = "red blue green white black pink yellow brown grey orange purple silver".split()
OBJECTS = """lamp guitar wheel quilt table chair book drum clock vase ladder mirror basket bottle hammer kettle pencil
piano bucket carpet candle camera blanket button wagon whistle trumpet umbrella violin teapot shovel rope ring pillow
needle mug lantern kite""".split()
FACT_WORDS = [*NAMES, *ALIASES, *OBJECTS]
"""The words that facts are about. Filler never uses one, or it would add a second fact about the same word."""

FIELDS: dict[str, list[str]] = {
    "animal": "bear fox cat dog horse owl rabbit wolf goat mouse".split(),
    "place": "village harbour forest market garden castle bridge tower river valley school library".split(),
    "adjective": "small old quiet happy brave tired clever young gentle proud".split(),
    "food": "bread soup cheese rice apples honey cake beans".split(),
    "thing": "door box boat cart stone fence tree window".split(),
    "colour": COLOURS,
    "hour": "morning evening night noon".split(),
    "weather": "rain snow wind sun fog".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
}
FIELDS |= {f"{name}2": FIELDS[name] for name in ("animal", "place", "weather")}
FILLER = """It rained.
All was quiet.
The {day} was long.
The {animal} ate some {food}.
There was {weather} on {day}.
Nobody saw the {adjective} {animal}.
The {weather} came over the {place}.
People in the {place} liked {food}.
The {place} was {adjective} on {day}.
Some {food} lay beside the {thing}.
The {colour} {thing} stood in the {place}.
It was a {adjective} {hour} in the {place}.
The {animal} and the {animal2} shared the {food}.
The {animal} ran to the {place} and came back.
The road went from the {place} to the {place2}.
In the {hour} the {animal} slept near the {place}.
Later the {hour} was full of {weather} and {weather2}.
A {colour} {thing} was sold in the {place} on {day}.
A {adjective} {animal} looked at the {colour} {thing} for a long time.""".split("\n")
STORY = """{a} had a {colour} {object} and took it along.
There {a} met {b}, who came from the {place2}.
{b} said that the {animal} was {adjective}.
The {animal} ran away with the {object}.
{a} looked for the {animal} in the {place2}.
{b} found the {object} near the {place}.
In the {hour} there was {weather}, so they all went home.
{a} gave the {animal} some {food}.
{b} and {a} sat in the {place} and ate {food}.
The {animal} was {adjective} again.
Then {b} carried the {colour} {object} to the {place2}.
{a} thanked {b} for the {object}.""".split("\n")
STORY_BEGIN, STORY_END = "One {hour} {a} walked to the {place}.", "{a} and {b} were {adjective} friends from then on."

PIECE = re.compile(r"<\|[a-z_]+\|>| ?[A-Za-z]+| ?\d| ?[.,?!:]|\n")
"""Matches one token. For texts of this language it cuts like the tokenizer; a test compares the two."""


def count(text: str) -> int:
    """Tokens of a text of this language."""
    return len(PIECE.findall(text))


def pick(rng: random.Random, words: Sequence[str], number: int, taken: set[str]) -> list[str]:
    """Different words that are not in `taken`, and adds them to it. Raises ValueError if too few are left."""
    found = rng.sample([word for word in words if word not in taken], number)
    taken.update(found)
    return found


def digits(rng: random.Random, number: int = 3) -> str:
    """Digits such as " 4 0 7"."""
    return "".join(f" {rng.randrange(10)}" for _ in range(number))


def possession(rng: random.Random, taken: set[str]) -> str:
    """A thing such as " red lamp"; no object repeats."""
    return f" {rng.choice(COLOURS)} {pick(rng, OBJECTS, 1, taken)[0]}"


def fill(rng: random.Random, template: str, **fields: str) -> str:
    """The template as a sentence, with a space before it; missing fields are drawn."""
    drawn = {name: rng.choice(words) for name, words in FIELDS.items()}
    return " " + template.format(**{**drawn, **fields})


_BY_LENGTH: dict[int, list[str]] = {}
for _template in FILLER:
    _BY_LENGTH.setdefault(count(fill(random.Random(0), _template)), []).append(_template)
SHORTEST = min(_BY_LENGTH)
_SURE = next(
    length for length in range(SHORTEST, 99) if length + 1 not in _BY_LENGTH
)  # sentences of every length up to it exist


def filler(rng: random.Random, tokens: int) -> list[str]:
    """Sentences without facts, of exactly `tokens` tokens in all: 0, or SHORTEST and more."""
    sentences = []
    while tokens > 2 * _SURE:
        sentences.append(fill(rng, rng.choice(FILLER)))
        tokens -= count(sentences[-1])
    while tokens:
        # A rest that no sentence fits is halved; sentences for the halves exist.
        length = tokens if tokens in _BY_LENGTH else tokens // 2
        sentences.append(fill(rng, rng.choice(_BY_LENGTH[length])))
        tokens -= length
    rng.shuffle(sentences)
    return sentences

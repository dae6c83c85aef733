"""Parts of documents: fragments of text, facts, and filler.

The class of a fragment says how far a model can predict it, and sets its weight in the loss:
TEXT     ordinary words
ANSWER   follows from earlier text of the document
NEW      a value at its first mention, which is unpredictable

Two flags may be added to a class. A BLIND fragment cannot see a HIDDEN one, so a fragment between the two must have
carried the answer.
HIDDEN   not seen by BLIND fragments of the same row
BLIND    sees no HIDDEN fragment of the same row
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tiny.words import ALIASES, FILLER, NAMES, SHORTEST, count, digits, fill, filler, pick, possession

TEXT, ANSWER, NEW = 0, 1, 2
CLASS, HIDDEN, BLIND = 3, 4, 8
Sentence = list[tuple[str, int]]


@dataclass(frozen=True)
class Level:
    """The difficulty of documents.

    facts    the highest number of open facts
    pairs    the highest number of pairs of related facts (two-chunk, across-chunk)
    filler   the probability of a filler sentence between two others
    blind    share of across-chunk documents with BLIND questions
    """

    facts: int
    pairs: int
    filler: float
    blind: float = 1.0


@dataclass(frozen=True)
class Fact:
    """One sentence with a value, such as " The key of Omar is" + " 1 8 0" + "."."""

    head: str
    value: str
    tail: str = "."
    question: str = ""

    def say(self, kind: int) -> Sentence:
        return [(self.head, TEXT), (self.value, kind), (self.tail, TEXT)]


def key_fact(name: str, value: str) -> Fact:
    return Fact(f" The key of {name} is", value, question=f"What is the key of {name}?")


def owner_fact(name: str, value: str) -> Fact:
    return Fact(f" {name} owns", value, question=f"What does {name} own?")


def alias_fact(name: str, alias: str) -> Fact:
    return Fact(f" {name} is", f" {alias}", question=f"Who is {name}?")


def some_facts(rng: random.Random, number: int, taken: set[str]) -> list[Fact]:
    """Facts of all three forms, mostly keys."""
    facts = []
    for name in pick(rng, NAMES, number, taken):
        form = rng.random()
        if form < 0.6:
            facts.append(key_fact(name, digits(rng)))
        elif form < 0.8:
            facts.append(owner_fact(name, possession(rng, taken)))
        else:
            facts.append(alias_fact(name, pick(rng, ALIASES, 1, taken)[0]))
    return facts


def idle(rng: random.Random) -> Sentence:
    return [(fill(rng, rng.choice(FILLER)), TEXT)]


def loosen(
    rng: random.Random, sentences: list[Sentence], level: Level, budget: int, wide: bool = False
) -> list[Sentence]:
    """The sentences in order, with filler between some of them; sometimes much filler, up to the budget.

    wide   often much filler
    """
    room = budget - sum(count(text) for sentence in sentences for text, _ in sentence)
    share = rng.random() if rng.random() < (0.7 if wide else 0.3) else 0.0
    spread = room * share * (1 if wide else level.filler) / max(1, len(sentences))
    found = []
    for sentence in sentences:
        if spread > 3 and rng.random() < 0.7:
            found += [[(text, TEXT)] for text in filler(rng, int(spread * rng.uniform(0.5, 1.5)) + SHORTEST)]
        elif rng.random() < level.filler:
            found.append(idle(rng))
        found.append(sentence)
    return found

"""Training documents: lists of (text, class) fragments, made on the fly from one seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable

from tiny.chats import ASK_STORY, NOTED, SMALL_TALK, UNKNOWN, chat, story
from tiny.facts import (
    ANSWER,
    BLIND,
    HIDDEN,
    NEW,
    TEXT,
    Fact,
    Level,
    Sentence,
    alias_fact,
    idle,
    key_fact,
    loosen,
    owner_fact,
    some_facts,
)
from tiny.words import (
    ALIASES,
    BOS,
    COLOURS,
    FACT_WORDS,
    FIELDS,
    FILLER,
    NAMES,
    SHORTEST,
    STORY,
    STORY_BEGIN,
    STORY_END,
    count,
    digits,
    filler,
    pick,
    possession,
)

# Each kind of document is a function: (rng, level, budget in tokens, taken words) -> sentences.


def seeds(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """The first stage: facts in one short form, then all of them again, in another order each time."""
    head, tail = rng.choice([(" {}", ""), (" {} is", ""), (" {} owns", ""), (" The key of {} is", "")])
    facts = []
    who = ALIASES if "owns" in head and rng.random() < 0.5 else NAMES
    for name in pick(rng, who, rng.randint(2, level.facts), taken):
        kind = rng.random()
        value = digits(rng, 1) if kind < 0.4 else digits(rng) if kind < 0.7 else possession(rng, taken)
        facts.append(Fact(head.format(name), " " + value.split()[1] if 0.7 <= kind < 0.85 else value, tail))
    return in_rounds(rng, facts, rng.randint(1, 3))


def lists(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """Whole sentences of one form, then all of them again."""
    form, number = rng.randrange(3), rng.randint(2, level.facts)
    facts = []
    for name in pick(rng, NAMES, number, taken):
        if form == 0:
            facts.append(key_fact(name, digits(rng)))
        elif form == 1:
            facts.append(owner_fact(name, possession(rng, taken)))
        else:
            facts.append(alias_fact(name, pick(rng, ALIASES, 1, taken)[0]))
    return in_rounds(rng, facts, rng.randint(1, 2))


def in_rounds(rng: random.Random, facts: list[Fact], rounds: int) -> list[Sentence]:
    again = [fact for _ in range(rounds) for fact in rng.sample(facts, len(facts))]
    return [fact.say(NEW) for fact in facts] + [fact.say(ANSWER) for fact in again]


def owners(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """A drill of one lookup: owners and their things, people and aliases, then all of them again."""
    number = rng.randint(2, level.pairs)
    people = pick(rng, NAMES if rng.random() < 0.5 else ALIASES, number, taken)
    return in_rounds(rng, [owner_fact(name, possession(rng, taken)) for name in people], rng.randint(1, 3))


def recall(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """A stream of new facts, repeated facts and filler. Often it repeats the fact not mentioned for longest."""
    facts = some_facts(rng, min(level.facts, rng.randint(2, level.facts + 2)), taken)
    sentences, known, used = [], [], 0
    length = rng.uniform(0.4, 1) * budget
    while used < length:
        step = rng.random()
        if known and step < level.filler:
            sentence = idle(rng)
        elif facts and (not known or rng.random() < 0.35):
            known.append(facts.pop())
            sentence = known[-1].say(NEW)
        else:
            fact = known[0] if rng.random() < 0.4 else rng.choice(known)
            known.remove(fact)
            known.append(fact)
            sentence = fact.say(ANSWER)
        sentences.append(sentence)
        used += sum(count(text) for text, _ in sentence)
    return sentences


def two(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """Two-chunk facts: aliases and owners, in either order; questions need one of the two or both."""
    names = pick(rng, NAMES, rng.randint(2, level.pairs), taken)
    other_names = pick(rng, ALIASES, len(names), taken)
    aliases = [alias_fact(name, alias) for name, alias in zip(names, other_names, strict=True)]
    owners = [owner_fact(fact.value[1:], possession(rng, taken)) for fact in aliases]
    told = [fact.say(NEW) for fact in aliases]
    others = [fact.say(NEW) for fact in rng.sample(owners, len(owners))]
    order = rng.random()
    sentences = told + others if order < 0.5 else others + told
    if order > 0.75:
        rng.shuffle(sentences)
    questions = []
    for name, alias, owner in zip(names, aliases, owners, strict=True):
        if rng.random() < 0.6:
            questions.append([(f" What does {name} own?", TEXT), *alias.say(ANSWER), *owner.say(ANSWER)])
        else:
            questions.append(owner_fact(name, owner.value).say(ANSWER))
        if rng.random() < 0.35:
            questions.append([(f" {owner.question}", TEXT), *owner.say(ANSWER)])
        if rng.random() < 0.35:
            questions.append(alias.say(ANSWER))
    rng.shuffle(questions)
    return loosen(rng, sentences + questions, level, budget)


def direct(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """A drill of the step that is hardest to learn: two-chunk facts, and questions that need both at once."""
    names = pick(rng, NAMES, rng.randint(2, level.pairs), taken)
    aliases = pick(rng, ALIASES, len(names), taken)
    owned = [possession(rng, taken) for _ in names]
    first = [alias_fact(name, alias).say(NEW) for name, alias in zip(names, aliases, strict=True)]
    second = [owner_fact(alias, thing).say(NEW) for alias, thing in zip(aliases, owned, strict=True)]
    asked = [owner_fact(name, thing).say(ANSWER) for name, thing in zip(names, owned, strict=True)]
    told = [first, rng.sample(second, len(second))]
    rng.shuffle(told)
    return [*told[0], *told[1], *rng.sample(asked, len(asked))]


def order(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """A drill of "it": across-chunk facts alone."""
    told, asked = across_facts(rng, level, rng.randint(2, level.pairs), taken)
    return told + asked


def across(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """Facts about "it". Only the order of the sentences gives the meaning of "it"."""
    told, asked = across_facts(rng, level, rng.randint(1, level.pairs), taken)
    return loosen(rng, told, level, int(0.7 * budget), wide=True) + loosen(rng, asked, level, 0)


def across_facts(
    rng: random.Random, level: Level, number: int, taken: set[str]
) -> tuple[list[Sentence], list[Sentence]]:
    """Pairs of sentences, "There is" a thing and a name that owns "it" (sometimes the thing), and a question for each.

    Most questions cannot see the sentences with "There is". A model that sees them learns to count sentences at the
    question, instead of resolving "it" when it reads "it".
    """
    told, asked = [], []
    blind = BLIND if rng.random() < level.blind else 0
    for name in pick(rng, NAMES, number, taken):
        thing = possession(rng, taken)
        said = [(thing, ANSWER)] if rng.random() < 0.25 else [(" it", TEXT)]
        told += [[(f" There is{thing}.", TEXT | HIDDEN)], [(f" {name} owns", TEXT), *said, (".", TEXT)]]
        asked.append([(f" {name} owns", TEXT | blind), (thing, ANSWER | blind), (".", TEXT)])
    return told, rng.sample(asked, number)


def far(rng: random.Random, level: Level, budget: int, taken: set[str]) -> list[Sentence]:
    """A few facts at the beginning, with their questions at the end of the budget. Between them stand other documents,
    which teach more than filler."""
    facts = some_facts(rng, rng.randint(2, 6), taken)
    told, asked = [fact.say(NEW) for fact in facts], [fact.say(ANSWER) for fact in rng.sample(facts, len(facts))]
    rest = budget - sum(count(text) for sentence in told + asked for text, _ in sentence)
    between: list[Sentence] = []
    while rest > 120:
        # Names of one inner document may repeat in the next, but never a name with an open question.
        inner = rng.choice([recall, two, across, story])(rng, level, min(rest, 160), set(taken))
        between += inner
        rest -= sum(count(text) for sentence in inner for text, _ in sentence)
    if rest >= SHORTEST:
        between += [[(text, TEXT)] for text in filler(rng, rest)]
    return told + between + asked


# ---- rows of tokens -----------------------------------------------------------------------------------------------

Kind = Callable[[random.Random, Level, int, set[str]], list[Sentence]]
KINDS: dict[str, Kind] = {
    kind.__name__: kind for kind in (seeds, lists, owners, recall, far, two, direct, order, across, story, chat)
}


def document(rng: random.Random, kind: str, level: Level, budget: int) -> Sentence:
    """One document as a flat list of fragments. A chat begins with its first turn, others with <|endoftext|>."""
    start = [] if kind == "chat" else [(BOS, TEXT)]
    sentences = KINDS[kind](rng, level, budget, set())
    return start + [fragment for sentence in sentences for fragment in sentence]


def row(rng: random.Random, mix: dict[str, float], level: Level, tokens: int) -> Sentence:
    """Fragments of at least `tokens` tokens: one chat, or a sequence of documents of the other kinds."""
    kinds, weights = list(mix), list(mix.values())
    (kind,) = rng.choices(kinds, weights)
    found: Sentence = []
    rest = tokens
    while rest > 0:
        new = document(rng, kind, level, rest)
        found += new
        rest -= sum(count(text) for text, _ in new)
        while (kind := rng.choices(kinds, weights)[0]) == "chat" and len(kinds) > 1:
            pass
    return found


def lexicon() -> list[str]:
    """Every word that a document may hold."""
    fixed = [*FILLER, *STORY, STORY_BEGIN, STORY_END, *SMALL_TALK, *SMALL_TALK.values(), NOTED, UNKNOWN, ASK_STORY]
    words = {word for text in fixed for word in text.replace("{", "").replace("}", "").split()}
    words = {word.strip(".,?!") for word in words} - set(FIELDS)
    return sorted(words.union(FACT_WORDS, COLOURS, *FIELDS.values()))

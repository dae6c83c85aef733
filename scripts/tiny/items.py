"""Questions with one right answer: a prompt that holds the facts, and the words that follow from them.

Each function draws one item from a generator. `items` draws many under a fixed seed, so that they are reproducible.
Positions count tokens of the prompt; its <|endoftext|> is at 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from tiny.chats import NOTED, SMALL_TALK, UNKNOWN
from tiny.documents import document
from tiny.facts import ANSWER, Level, Sentence, alias_fact, key_fact, owner_fact, some_facts
from tiny.words import ALIASES, BOS, END, NAMES, SHORTEST, TURN, count, digits, filler, pick, possession

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question.

    chunks    texts with the facts, in sequence
    question  the text up to the first word of the answer
    answer    the words that must follow
    messages  for a chat item: the turns that `question` renders; it has no chunks and begins without <|endoftext|>
    """

    chunks: tuple[str, ...]
    question: str
    answer: str
    messages: tuple[Message, ...] = ()

    @property
    def prompt(self) -> str:
        """The text before the answer. LLM.generate puts <|endoftext|> before it, but not in a chat."""
        return "".join(self.chunks) + self.question

    @property
    def text(self) -> str:
        """The whole item as one text, with special tokens."""
        return ("" if self.messages else BOS) + self.prompt + self.answer

    @property
    def prompt_tokens(self) -> int:
        return count(self.text) - count(self.answer)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """[start, end) of each chunk in token positions; position 0 is <|endoftext|>, outside all chunks."""
        ends = [1]
        for chunk in self.chunks:
            ends.append(ends[-1] + count(chunk))
        return list(pairwise(ends))


def recall(rng: random.Random, distance: int, facts: int = 6) -> Item:
    """The key of one of several people, with `distance` tokens from the first digit of the fact to that of the answer.

    Raises ValueError for a distance below 9, which leaves no room for the question.
    """
    names = pick(rng, NAMES, facts, set())
    wanted, *others = [key_fact(name, digits(rng)) for name in names]
    told = {fact: f"{fact.head}{fact.value}{fact.tail}" for fact in (wanted, *others)}
    room = distance - count(wanted.value + wanted.tail + wanted.head)
    if room < 0:
        raise ValueError(f"distance={distance}: at least {distance - room} tokens stand between fact and answer")
    length = count(told[wanted])
    later = rng.randint(0, min(len(others), room // length))
    while 0 < room - later * length < SHORTEST:  # no filler is that short
        later -= 1
    sentences = filler(rng, room - later * length)
    for fact in others[:later]:
        sentences.insert(rng.randint(0, len(sentences)), told[fact])
    before = "".join(told[fact] for fact in others[later:])
    return Item((before + told[wanted] + "".join(sentences),), wanted.head, wanted.value)


def two_chunk(rng: random.Random, form: str, tokens: int, pairs: int = 4) -> Item:
    """Aliases in the first chunk, owners in the second; a prompt of exactly `tokens` tokens.

    form   "written": a question about a name, answered in two written steps
           "direct": the thing a name owns, in one step
           "first", "second": only the first or the second fact of the pair is needed
    """
    taken: set[str] = set()
    names, aliases = pick(rng, NAMES, pairs, taken), pick(rng, ALIASES, pairs, taken)
    first = [alias_fact(name, alias) for name, alias in zip(names, aliases, strict=True)]
    second = [owner_fact(alias, possession(rng, taken)) for alias in aliases]
    name, alias, owner = names[0], first[0], second[0]  # told in another order
    question, answer = {
        "written": (f" What does {name} own?", f"{alias.head}{alias.value}.{owner.head}{owner.value}"),
        "direct": (f" {name} owns", owner.value),
        "first": (alias.head, alias.value),
        "second": (f" {owner.question}", f"{owner.head}{owner.value}"),
    }[form]
    chunks = [[f"{fact.head}{fact.value}." for fact in rng.sample(facts, pairs)] for facts in (first, second)]
    return Item(stretched(rng, chunks, tokens - count(question), keep_first=False), question, answer)


def across_chunk(rng: random.Random, tokens: int, pairs: int = 4) -> Item:
    """Chunks in pairs: "There is" a thing, and a name that owns "it"; then a question for one of the names.

    The meaning of "it" follows from the chunk before and is not in the second chunk. It is not in the question either,
    so the model must resolve it while reading the second chunk. A prompt of exactly `tokens` tokens.
    """
    taken: set[str] = set()
    names, things = pick(rng, NAMES, pairs, taken), [possession(rng, taken) for _ in range(pairs)]
    chunks = []
    for name, thing in zip(names, things, strict=True):
        chunks += [[f" There is{thing}."], [f" {name} owns it."]]
    asked = rng.randrange(pairs)
    question = f" {names[asked]} owns"
    return Item(stretched(rng, chunks, tokens - count(question), keep_first=True), question, things[asked])


def stretched(rng: random.Random, chunks: list[list[str]], tokens: int, keep_first: bool) -> tuple[str, ...]:
    """The chunks with filler among their sentences, so that they and <|endoftext|> have exactly `tokens` tokens.

    Raises ValueError if `tokens` is too small.
    """
    room = tokens - 1 - sum(count(sentence) for chunk in chunks for sentence in chunk)
    if room < 0 or 0 < room < SHORTEST:
        raise ValueError(f"a prompt of {room} tokens more than its facts cannot be made")
    shares = [rng.uniform(0.5, 1.5) for _ in chunks]
    parts = [int(room * share / sum(shares)) for share in shares]
    parts = [part if part >= SHORTEST else 0 for part in parts]
    rest = room - sum(parts)
    if rest:
        parts[rng.choice([place for place, part in enumerate(parts) if part or rest >= SHORTEST])] += rest
    found = []
    for chunk, part in zip(chunks, parts, strict=True):
        sentences = list(chunk)
        for sentence in filler(rng, part):
            sentences.insert(rng.randint(int(keep_first), len(sentences)), sentence)
        found.append("".join(sentences))
    return tuple(found)


def chat(rng: random.Random, form: str) -> Item:
    """A short chat whose last question has one answer.

    form   "told": four facts in one message
           "turns": four facts in two messages, with small talk between
           "at once": facts and the question in one message
           "two": two pairs of facts; the answer needs both facts of one pair
           "unknown": a question about a name that was not mentioned
    """
    taken: set[str] = set()
    if form == "two":
        names, aliases = pick(rng, NAMES, 2, taken), pick(rng, ALIASES, 2, taken)
        pairs = [(alias_fact(n, a), owner_fact(a, possession(rng, taken))) for n, a in zip(names, aliases, strict=True)]
        facts = [fact for pair in pairs for fact in pair]
        question = f"What does {names[0]} own?"
        answer = "You said" + "".join(f"{fact.head}{fact.value}." for fact in pairs[0])
    else:
        facts = some_facts(rng, 4, taken)
        asked = rng.choice(facts)
        sentence = f"{asked.head}{asked.value}."
        question, answer = asked.question, sentence[1:] if sentence.startswith(" The") else f"You said{sentence}"
    if form == "unknown":
        question, answer = f"What is the key of {pick(rng, NAMES, 1, taken)[0]}?", UNKNOWN
    told = [f"{fact.head}{fact.value}." for fact in rng.sample(facts, len(facts))]
    if form == "turns":
        hello, greeting = rng.choice(list(SMALL_TALK.items()))
        says = [("".join(told[:2])[1:], NOTED), (hello, greeting), ("Please remember this." + "".join(told[2:]), NOTED)]
        says.append((question, ""))
    elif form == "at once":
        says = [("".join(told)[1:] + " " + question, "")]
    else:
        says = [("Please remember this." + "".join(told), NOTED), (question, "")]
    messages: list[Message] = []
    for user, assistant in says:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    messages.pop()  # the last one is the answer
    return Item((), render(messages), answer + END, tuple(messages))


def render(messages: Sequence[Message]) -> str:
    """ChatML up to the beginning of the assistant's answer, equal to the shipped chat template."""
    turns = [f"{TURN}{message['role']}\n{message['content']}{END}\n" for message in messages]
    return "".join(turns) + f"{TURN}assistant\n"


def seeds(rng: random.Random) -> Item:
    """A document of the first stage, with a question for its last fact."""
    level = Level(facts=5, pairs=2, filler=0)
    fragments: Sentence = []
    while not fragments or count("".join(text for text, _ in fragments)) > 64:
        fragments = document(rng, "seeds", level, 64)
    last = max(place for place, (_, kind) in enumerate(fragments) if kind == ANSWER)
    told = "".join(text for text, _ in fragments[1:last])
    return Item((told,), "", fragments[last][0])


TESTS: dict[str, Callable[[random.Random], Item]] = {
    "seeds": seeds,
    **{f"recall {d}": partial(recall, distance=d) for d in (64, 128, 256, 512, 1024, 2048)},
    **{f"recall {d}, 13 facts": partial(recall, distance=d, facts=13) for d in (256, 512, 1024)},
    **{
        f"two-chunk {form} {tokens}": partial(two_chunk, form=form, tokens=tokens)
        for form in ("written", "direct", "first", "second")
        for tokens in (128, 256, 512, 1024)
    },
    **{f"across-chunk {tokens}": partial(across_chunk, tokens=tokens) for tokens in (96, 128, 256, 512, 1024)},
    **{f"chat {form}": partial(chat, form=form) for form in ("told", "turns", "at once", "two", "unknown")},
}
"""Every test by name. recall 512: distance; two-chunk and across-chunk 512: tokens of the prompt, four pairs."""


def items(test: str, number: int, seed: int = 1) -> list[Item]:
    """`number` items of a test. The same arguments give the same items."""
    rng = random.Random(f"{test} {seed}")
    return [TESTS[test](rng) for _ in range(number)]

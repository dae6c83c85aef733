"""Texts on which the quality of a codec is measured. On a text that a model cannot predict, differences mean little."""

from __future__ import annotations

import random

from nanokv.core.errors import ConfigError
from nanokv.hub.catalog import SHIPPED
from nanokv.llm import LLM

NAMES = "Mira Nora Omar Otto Boris Anna Emil Clara Felix Petra Karim Vera".split()  # noqa: SIM905
COLOURS = "red blue green white black yellow".split()  # noqa: SIM905
THINGS = "lamp guitar wheel table chair book drum clock".split()  # noqa: SIM905
FACTS = 6
"""Facts that a passage of the closed language tells before it repeats them."""


def texts_for(llm: LLM, count: int, tokens: int) -> dict[str, list[int]]:
    """`count` texts of `tokens` tokens: the small shipped models read their own closed language, others Python's help.

    Raises ConfigError where the texts or the model are too short.
    """
    is_shipped = llm.folder.name in SHIPPED and llm.tokenizer is not None
    return facts(llm, count, tokens) if is_shipped else topics(llm, count, tokens)


def topics(llm: LLM, count: int, tokens: int) -> dict[str, list[int]]:
    """The first `tokens` tokens of the longest `count` texts of Python's own help, pydoc_data.topics.

    A model without a tokenizer reads the bytes of a text as token ids.
    Raises ConfigError where the texts or the model are too short.
    """
    from pydoc_data.topics import topics as texts

    names = sorted(texts, key=lambda name: (-len(texts[name]), name))[:count]
    return _encoded(llm, {name: texts[name][: 32 * tokens] for name in names}, tokens)  # no token has more letters


def facts(llm: LLM, count: int, tokens: int) -> dict[str, list[int]]:
    """Texts of the closed language of the shipped models (weights/README.md): facts, then the same facts again.

    Raises ConfigError where the model is too short.
    """
    return _encoded(
        llm, {f"facts {number}": _passages(random.Random(number), tokens) for number in range(count)}, tokens
    )


def _passages(generator: random.Random, words: int) -> str:
    """At least `words` words; each is at least one token."""
    said: list[str] = []
    while sum(len(sentence.split()) for sentence in said) < words:
        told = []
        for name in generator.sample(NAMES, FACTS):
            digits = " ".join(str(generator.randrange(10)) for _ in range(3))
            owned = f"{generator.choice(COLOURS)} {generator.choice(THINGS)}"
            told.append(generator.choice([f"The key of {name} is {digits}.", f"{name} owns {owned}."]))
        said += told + generator.sample(told, FACTS)
    return " ".join(said)


def _encoded(llm: LLM, texts: dict[str, str], tokens: int) -> dict[str, list[int]]:
    found = {}
    for name, text in texts.items():
        ids = list(text.encode()) if llm.tokenizer is None else llm.tokenizer.encode(text, add_special=True)
        found[name] = ids[:tokens]
    shortest = min(map(len, found.values()))
    if min(shortest, llm.engine.max_length) < tokens:
        raise ConfigError(f"texts of {tokens} tokens: at most {min(shortest, llm.engine.max_length)} here")
    return found

"""Card: an interview question, an answer of a minute, and its numbers, computed. One file per topic.

A card is a function in lessons/interview/TOPIC.py that returns its numbers: text in the answer -> computed value.

    @card(question="...", answer="... 128 KiB a token ...", follow_ups=("...",), file="...", command="...")
    def bytes_of_a_token():
        return {"128": layout.bytes_per_token / 1024}

The function imports what its numbers need, so that a quiz does not wait for torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.course import load_course
from nanokv.learn.running import load_file

NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w-])(?![.,]\d)")
"""A number of a text, such as 131,072 or 4.8, but not a part of a name: int4, 2026-04, Llama-3.1-8B."""

Numbers = dict[str, float]


@dataclass(frozen=True)
class Card:
    """One question.

    numbers   computes the numbers of the answer, from the engine's own code where that knows them
    """

    topic: str
    name: str
    question: str
    answer: str
    """As spoken, in about a minute."""
    follow_ups: tuple[str, ...]
    file: str
    """The file of the repository to show."""
    command: str
    """The command to run beside it."""
    numbers: Callable[[], Numbers]


def card(
    question: str, answer: str, follow_ups: Sequence[str], file: str, command: str
) -> Callable[[Callable[[], Numbers]], Card]:
    """A decorator that makes a card of the function that computes its numbers. Texts may contain line breaks."""

    def make(numbers: Callable[[], Numbers]) -> Card:
        topic = numbers.__module__.rpartition(".")[2]
        texts = [" ".join(text.split()) for text in (question, answer, *follow_ups)]
        return Card(topic, numbers.__name__, texts[0], texts[1], tuple(texts[2:]), file, command, numbers)

    return make


def topics() -> list[str]:
    """All topics: the files of lessons/interview."""
    return sorted(path.stem for path in _folder().glob("*.py"))


def load_cards(topic: str | None = None) -> list[Card]:
    """The cards of a topic, or of all. Raises CourseError for an unknown topic, naming the known ones."""
    known = topics()
    if topic is not None and topic not in known:
        raise CourseError(f"topic {topic!r}: expected one of {', '.join(known)}")
    modules = [load_file(_folder() / f"{name}.py", f"interview.{name}") for name in ([topic] if topic else known)]
    return [one for module in modules for one in vars(module).values() if isinstance(one, Card)]


def wrong_numbers(one: Card) -> list[str]:
    """Errors in a card's numbers, one line each.

    Each computed number is in the answer and has that value; each number of the answer is computed, or given in the
    question.
    """
    stated, given, numbers = NUMBER.findall(one.answer), NUMBER.findall(one.question), one.numbers()
    wrong = [f"{text}: not in the answer" for text in numbers if text not in stated]
    wrong += [f"{text}: neither computed nor given" for text in stated if text not in numbers and text not in given]
    for text, value in numbers.items():
        decimals = len(text.partition(".")[2])
        if round(value, decimals) != float(text.replace(",", "")):
            wrong.append(f"{text}: computed {value:,.{decimals + 2}f}")
    return wrong


def _folder() -> Path:
    return load_course().folder / "interview"

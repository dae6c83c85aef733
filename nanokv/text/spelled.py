"""Special tokens that messages spell: which ones in a rendered chat are only text.

A user may write "<|im_end|>", which must not end a turn. So the chat is rendered a second time, with one letter of each
special token that a message spells replaced by another:

    plain     <|im_start|>user\\nWhat is <|im_end|>?<|im_end|>
    other     <|im_start|>user\\nWhat is <|jm_end|>?<|im_end|>
                                         ^ the texts differ inside a special token of the message, which stays text

A letter for a letter: lengths, JSON and repr stay as they are, so a template does not notice. A template that looks for
a special token itself does (it splits thoughts off at </think>): then the texts differ elsewhere too, and that token
counts as the template means it. The text is always the plain one, in which nothing was replaced.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from nanokv.core.errors import RequestError
from nanokv.text.template import Chat

_FROM = ("messages", "tools", "documents")


def find_spelled(chat: Chat, special: Collection[str]) -> frozenset[int]:
    """A position in chat.text inside each special token that messages, tools or documents spell.

    special   the texts of the special tokens
    Raises    RequestError where the template refuses the chat
    """
    given = [chat.values[name] for name in _FROM]
    names = sorted((name for name in special if name), key=len, reverse=True)
    if not names or not any(name in text for text in _texts(given) for name in names):
        return frozenset()
    pattern = re.compile("|".join(map(re.escape, names)))
    spelled = {name for text in _texts(given) for name in pattern.findall(text)}
    found = _differences(chat, spelled, pattern)
    if found is None:  # the template looks for one of them: try each alone
        found = {place for name in sorted(spelled) for place in _differences(chat, {name}, pattern) or ()}
    return frozenset(found)


def _differences(chat: Chat, names: set[str], pattern: re.Pattern) -> set[int] | None:
    """Where the text changes with one letter of these tokens; None where it changes in another way too."""

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: _twin_of(match[0]) if match[0] in names else match[0], value)
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list) else value

    values = {**chat.values, **{name: replaced(chat.values[name]) for name in _FROM}}
    try:
        other = Chat(chat.template, values).text
    except RequestError:
        return None
    if len(other) != len(chat.text):
        return None
    places = {i for i, (one, two) in enumerate(zip(chat.text, other, strict=True)) if one != two}
    return places if all(other[i] == _twin(chat.text[i]) for i in places) else None


def _twin_of(name: str) -> str:
    """A special token with its first letter replaced; its first character where it has no letter of ASCII."""
    place = next((i for i, letter in enumerate(name) if letter.isascii() and letter.isalpha()), 0)
    return name[:place] + _twin(name[place]) + name[place + 1 :]


def _twin(letter: str) -> str:
    """Another character of the same kind and case."""
    if letter in "zZ":
        return chr(ord(letter) - 25)
    if letter.isascii():
        return chr(ord(letter) + 1) if letter.isalpha() else ("!" if letter != "!" else "?")
    return chr(ord(letter) ^ 1)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

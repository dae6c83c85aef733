"""Fields: one JSON object, read with types. Every error names the file, the field and its value.

The files come from strangers: every number has bounds, no error prints a long value, and only a regular file of a
bounded size is read.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from nanokv.core.errors import CheckpointError

MOST = 1 << 20
"""Of an integer that shapes tensors: a few of them multiplied fit in 64 bits. The widest released layer has 53,248."""
SMALLEST, LARGEST = 1e-15, 1e15
"""Of a number: its logarithm, and its products with positions and with others of its kind, are finite."""
MOST_BYTES = 32 << 20
"""Of a JSON file. The index of a released model with 140,000 tensors has half of it."""
MOST_CHARACTERS = 80
"""Of a value in an error."""

_short = reprlib.Repr()
_short.maxlist = _short.maxdict = 8
_short.maxlevel = 2
_short.maxstring = _short.maxlong = _short.maxother = 60


def shown(value: Any) -> str:
    """A value of a file for an error: its repr, cut."""
    text = _short.repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


class Fields:
    """One JSON object. Each reader returns a value of its type, or raises CheckpointError.

    A field that is null counts as missing. A missing field has the default; without a default it is an error.

    data    the object
    where   the file and the place in it, for error messages
    """

    def __init__(self, data: dict[str, Any], where: str) -> None:
        if not isinstance(data, dict):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(data).__name__}")
        self.data = data
        self.where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, of any type."""
        value = self.data.get(name)
        return default if value is None else value

    def inside(self, name: str) -> Fields:
        """The object in a field; an empty one if the field is missing."""
        return Fields(self.get(name, {}), f"{self.where}: {name[:MOST_CHARACTERS]}")

    def error(self, name: str, complaint: str) -> CheckpointError:
        """The error to raise for a field: file, field, value and complaint."""
        value = f"={shown(self.data[name])}" if name in self.data else ""
        return CheckpointError(f"{self.where}: {name}{value}: {complaint}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing: the file is incomplete")
        return value

    def integer(self, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """An integer between `least` and `most`."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(name, f"expected an integer of at least {least} and at most {most}")
        return value

    def number(self, name: str, default: float | None = None, least: float = SMALLEST) -> float:
        """A number between `least` and LARGEST."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= LARGEST:
            raise self.error(name, f"expected a number above 0, between {least:g} and {LARGEST:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "expected true or false")
        return value

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of the allowed values."""
        value = self.get(name, default)
        if value not in allowed:
            raise self.error(name, f"not supported; supported are {', '.join(allowed)}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers of at least 0; empty if the field is missing."""
        value = self.get(name, [])
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
            raise self.error(name, "expected a list of integers of at least 0")
        return tuple(value)

    def text(self, name: str) -> str | None:
        """A text; None if the field is missing."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "expected a text")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id or a list of them; empty if the field is missing.

        Ids outside of the vocabulary are left out: no model says them. Files use -1 for "none", and some count added
        tokens that the embedding does not have.
        """
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise self.error(name, "expected a token id or a list of token ids")
        return tuple(i for i in ids if 0 <= i < vocab_size)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    try:
        if not path.is_file():  # a pipe would be waited for, a device read for ever
            raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise CheckpointError(f"{path}: larger than {MOST_BYTES >> 20} MiB, which no such file is")
        data = json.loads(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    except RecursionError:
        raise CheckpointError(f"{path}: cannot be read as JSON (its values are nested too deeply)") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data

"""Fields: one JSON object, read with types. Every error names the file, the field and its value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nanokv.core.check import check_integer
from nanokv.core.errors import CheckpointError


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
        return Fields(self.get(name, {}), f"{self.where}: {name}")

    def error(self, name: str, complaint: str) -> CheckpointError:
        """The error to raise for a field: file, field, value and complaint."""
        value = f"={self.data[name]!r}" if name in self.data else ""
        return CheckpointError(f"{self.where}: {name}{value}: {complaint}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing: the file is incomplete")
        return value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._required(name, default)
        check_integer(CheckpointError, f"{self.where}: {name}", value, least)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(name, "expected a number above 0")
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

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty if the field is missing."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.error(name, "expected a list of texts")
        return tuple(value)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id or a list of them; empty if the field is missing."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size for i in ids):
            raise self.error(name, f"expected token ids below vocab_size={vocab_size}")
        return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data

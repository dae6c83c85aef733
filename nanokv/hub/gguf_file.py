"""GGUFFile: the metadata and the tensors of a model in one GGUF file or several. Knows no checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanokv.core.errors import PullError
from nanokv.hub.gguf_header import read_header, shown

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_CHUNK = 1 << 22
"""Numbers decoded at once."""


def model_name(path: Path) -> str:
    """The name of the model in a file: without .gguf and, for a part, without its number."""
    part = _PART.fullmatch(path.name)
    return part["name"] if part else path.name.removesuffix(".gguf")


class GGUFFile:
    """The metadata and the tensors of a model.

    path     of the file, or of the first of the files that the model was split into (NAME-00001-of-00003.gguf)
    paths    of all files, in order; their data stay on disk until a tensor is read
    Raises   PullError, one line, where a file is damaged, missing or cannot be read

    The readers of keys return the default where the file lacks the key; without a default the key is required. They
    raise PullError naming the key and its value where that is of another type or beyond its bounds.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.paths = path, [path]
        self._fields, self._tensors = read_header(path)
        count = self.integer("split.count", 1)
        if count > 1:
            self._join_parts(count)

    def _join_parts(self, count: int) -> None:
        """Adds the tensors of the other parts."""
        part, number = _PART.fullmatch(self.path.name), self.integer("split.no", 0)
        if part is None or int(part["count"]) != count:
            form = f"NAME-00001-of-{count:05}.gguf"
            raise PullError(f"{self.path}: part {number + 1} of {count} of a split file, whose parts are named {form}")
        names = [f"{part['name']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
        if number or int(part["number"]) != 1:
            raise PullError(f"{self.path}: part {number + 1} of {count} of a split file; give the first, {names[0]}")
        self.paths = [self.path.with_name(name) for name in names]
        for i, path in enumerate(self.paths[1:], 1):
            if not path.exists():
                raise PullError(f"{self.path}: part {i + 1} of {count} is missing: {path}")
            fields, tensors = read_header(path)
            if fields.get("split.no") != i or fields.get("split.count") != count:
                raise PullError(f"{path}: not part {i + 1} of {count} of a split file by its own keys")
            if twice := sorted(self._tensors.keys() & tensors.keys()):
                raise PullError(f"{path}: tensor {shown(twice[0])} is in an earlier part too")
            self._tensors |= tensors
        expected = self.integer("split.tensors.count", len(self._tensors))
        if len(self._tensors) != expected:
            raise PullError(f"{self.path}: its {count} parts hold {len(self._tensors)} tensors instead of {expected}")

    # ---- keys ----

    def integer(self, key: str, default: int | None = None, least: int = 0, most: int = 2**31 - 1) -> int:
        """An integer between `least` and `most`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._unfit(key, f"an integer from {least} to {most}")
        return value

    def per_layer(self, key: str, default: int | None = None) -> int:
        """An integer above 0, or an array of it, one for each layer: all are equal."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self._unfit(key, "an integer above 0, the same in all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0, as the shortest decimal of the same float32: 9.999999747378752e-06 is 1e-05."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e38:
            raise self._unfit(key, "a number above 0")
        return float(str(np.float32(value)))

    def is_zero(self, key: str) -> bool:
        """Whether the key is there and its value 0."""
        value = self._fields.get(key)
        return isinstance(value, (int, float)) and value == 0

    def flag(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._unfit(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._unfit(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self._unfit(key, "a list of texts")
        return value

    def numbers(self, key: str, count: int, default: int | None = None) -> list:
        """A list of `count` numbers, or of more, of which the first count; `default` repeated where it is missing."""
        value = self._fields.get(key)
        if value is None and default is not None:
            return [default] * count
        value = self._value(key, None)
        if not isinstance(value, np.ndarray) or len(value) < count:
            raise self._unfit(key, f"a list of {count} numbers")
        return value[:count].tolist()

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return key in self._fields

    def _value(self, key: str, default: Any) -> Any:
        value = self._fields.get(key, default)
        if value is None:
            raise PullError(f"{self.path}: the key {key} is missing")
        return value

    def _unfit(self, key: str, expected: str) -> PullError:
        value = self._fields.get(key)
        found = f"a list of {len(value)}" if isinstance(value, (list, np.ndarray)) else f"{value!r:.60}"
        return PullError(f"{self.path}: {key}={found}: expected {expected}")

    # ---- tensors ----

    @property
    def tensor_names(self) -> set[str]:
        """The names of all tensors, as llama.cpp writes them."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, rows first, as checkpoints list it."""
        return self._tensors[name].shape

    def is_q8(self, name: str) -> bool:
        """Whether a tensor is stored in blocks Q8_0."""
        return self._tensors[name].kind.name == "Q8_0"

    def rows(self, name: str) -> np.ndarray:
        """The bytes of a tensor by row, uint8 [..., bytes of a row]; of a vector by number where it can be divided."""
        from gguf.constants import GGML_QUANT_SIZES

        shape, kind, data = self._tensors[name]
        by_number = len(shape) == 1 and GGML_QUANT_SIZES[kind][0] == 1
        return data.reshape(*(shape if by_number else shape[:-1]), -1)

    def decode(self, name: str, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Decodes rows of a tensor, a few million numbers at once.

        rows     of `rows(name)`: some of them, in any order
        Yields   float32 [n], the numbers row after row
        Raises   PullError for a type without support
        """
        from gguf.constants import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        kind = self._tensors[name].kind
        block, size = GGML_QUANT_SIZES[kind]
        flat = np.ascontiguousarray(rows).reshape(-1)
        step = max(_CHUNK // block, 1) * size
        for start in range(0, len(flat), step):
            try:
                with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
                    yield dequantize(flat[start : start + step], kind).reshape(-1)
            except (NotImplementedError, ValueError) as error:
                raise PullError(
                    f"{self.path}: tensor {name} is of the type {kind.name}, which is not supported"
                ) from error

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, of the file's shape. Raises PullError for a type without support."""
        return np.concatenate([*self.decode(name, self.rows(name))]).reshape(self.shape(name))

"""The header of a GGUF file: its metadata and the places of its tensors. Knows no checkpoint.

The header is read here and not by the gguf package, whose reader makes several arrays for each string of a vocabulary
(seconds for a large one) and believes each count in the file. Here every count is compared with the bytes that are
left before a list is made, so that a damaged file costs one line, little time and little memory. The package's table of
block sizes is used, and its decoding of blocks (gguf_file.py).

Source: docs/gguf.md of ggml-org/ggml. Version 3 of the format, and version 2, which differs in nothing that is read.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanokv.core.errors import PullError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_LENGTH, _TYPE = struct.Struct("<Q"), struct.Struct("<I")
_KEYS, _TENSORS, _ITEMS, _NAME = 1 << 14, 1 << 18, 1 << 21, 1 << 10
"""Most metadata keys, tensors, items of an array, and bytes of a name: several times those of the largest models."""


def shown(name: str) -> str:
    """A name of a file for an error: cut, and on one line."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Stored(NamedTuple):
    """A tensor of a file.

    shape    rows first, as checkpoints list it
    kind     of its blocks
    data     the bytes in the file: uint8, not copied
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Reads the metadata and the list of tensors.

    Returns   key -> value (arrays of numbers as np.ndarray, of texts as list), and name -> tensor
    Raises    PullError, one line, where the file is damaged, of another version, or cannot be read
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PullError(f"{path}: not a file")  # opening a pipe would wait for ever
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise PullError(f"{path}: not a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise PullError(f"{path}: {error.strerror or error}") from error
    try:
        return _Reader(data, os.fspath(path)).header()
    except struct.error:
        raise PullError(f"{path}: truncated or damaged GGUF file (it ends inside its header)") from None


class _Reader:
    """Reads the mapped file `data` from front to back."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self._data, self._where, self._at = data, where, 4

    def header(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        version = self._unpack(_TYPE)
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            raise PullError(f"{self._where}: {'big-endian' if big else f'version {version} of'} GGUF is not supported")
        num_tensors = self._count("tensors", 24, _TENSORS)
        num_keys = self._count("keys", 13, _KEYS)
        fields: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text("a key", _NAME)
            if key in fields:
                raise self._damaged(f"the key {shown(key)} stands there twice")
            fields[key] = self._value(key, self._unpack(_TYPE))
        return fields, self._tensors(num_tensors, fields.get("general.alignment", 32))

    def _tensors(self, count: int, alignment: Any) -> dict[str, Stored]:
        from gguf.constants import GGML_QUANT_SIZES

        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment={alignment!r} is not a power of two")
        kinds = {kind.value: kind for kind in GGML_QUANT_SIZES}
        infos = []
        for _ in range(count):
            name = self._text("a tensor's name", _NAME)
            num_dims = self._unpack(_TYPE)
            if not 1 <= num_dims <= 4:
                raise self._damaged(f"tensor {shown(name)} has {num_dims} dimensions")
            shape = tuple(self._unpack(_LENGTH) for _ in range(num_dims))[::-1]
            infos.append((name, shape, self._unpack(_TYPE), self._unpack(_LENGTH)))
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, Stored] = {}
        for name, shape, number, offset in infos:
            if name in tensors:
                raise self._damaged(f"tensor {shown(name)} stands there twice")
            if number not in kinds:
                raise PullError(f"{self._where}: tensor {shown(name)} is of the unknown type {number}")
            kind = kinds[number]
            block, size = GGML_QUANT_SIZES[kind]
            if not all(shape) or shape[-1] % block:
                raise self._damaged(f"tensor {shown(name)} is {list(shape)}, in blocks of {block}")
            begin, num_bytes = start + offset, prod(shape) // block * size
            if begin + num_bytes > len(self._data):
                raise self._damaged(
                    f"tensor {shown(name)} ends at byte {begin + num_bytes}, the file at {len(self._data)}"
                )
            tensors[name] = Stored(shape, kind, np.frombuffer(self._data, np.uint8, num_bytes, begin))
        return tensors

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text(key, len(self._data))
        if kind == _ARRAY:
            return self._array(key, self._unpack(_TYPE))
        return self._numbers(key, kind, 1)[0].item()

    def _array(self, key: str, kind: int) -> np.ndarray | list[str]:
        if kind != _STRING:
            size = np.dtype(_NUMBERS.get(kind, "u1")).itemsize
            return self._numbers(key, kind, self._count(f"items of {shown(key)}", size, len(self._data)))
        count = self._count(f"items of {shown(key)}", _LENGTH.size, _ITEMS)
        data, at, end, texts = self._data, self._at, len(self._data), []
        unpack = _LENGTH.unpack_from
        for _ in range(count):  # the loop over a vocabulary: as little as possible for each text
            (length,) = unpack(data, at)
            at += _LENGTH.size
            if length > end - at:
                raise self._damaged(f"a text of {shown(key)} has {length} bytes, and {end - at} are left")
            texts.append(data[at : at + length])
            at += length
        self._at = at
        return [self._decode(key, text) for text in texts]

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise PullError(f"{self._where}: the key {shown(key)} is of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        if count * dtype.itemsize > len(self._data) - self._at:
            raise struct.error
        values = np.frombuffer(self._data, dtype, count, self._at)
        self._at += values.nbytes
        return values

    def _text(self, what: str, most: int) -> str:
        length = self._unpack(_LENGTH)
        if length > min(most, len(self._data) - self._at):
            raise self._damaged(f"{shown(what)} has {length} bytes, and {len(self._data) - self._at} are left")
        text = self._data[self._at : self._at + length]
        self._at += length
        return self._decode(what, text)

    def _decode(self, what: str, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{shown(what)} is not in UTF-8") from None

    def _count(self, what: str, least_bytes: int, most: int) -> int:
        """A number of things that take at least `least_bytes` each."""
        count = self._unpack(_LENGTH)
        left = len(self._data) - self._at
        if count > most or count * least_bytes > left:
            raise self._damaged(
                f"{count} {what} in {left} bytes" if count <= most else f"{count} {what}, at most {most}"
            )
        return count

    def _unpack(self, form: struct.Struct) -> int:
        (value,) = form.unpack_from(self._data, self._at)
        self._at += form.size
        return value

    def _damaged(self, reason: str) -> PullError:
        return PullError(f"{self._where}: truncated or damaged GGUF file ({reason})")

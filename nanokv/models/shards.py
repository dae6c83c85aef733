"""Shards: the files of weights in a folder, and which of them holds each tensor.

Where model.safetensors.index.json exists, it decides: a copy of a tensor in another file than the one that the index
gives is not read. Files come from strangers: an index may name plain files of its own folder only, and a FIFO, a device
or a file that is mostly header is refused before it is opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from nanokv.core.errors import CheckpointError
from nanokv.models.fields import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 2 << 20
"""Bytes of a header that any file may have; beyond them at most 1 % of the file, for a header describes tensors."""


@dataclass(frozen=True)
class Shards:
    """The files of weights of one folder.

    files    in the order of their names
    owners   tensor -> name of the file that holds it, as the index says; empty without an index
    """

    files: list[Path]
    owners: dict[str, str] = field(default_factory=dict)


def find_shards(folder: Path) -> Shards:
    """The shards in the index, else model.safetensors, else the only *.safetensors.

    Raises CheckpointError where there is none, or several without an index, and for an index that names no plain files.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and *.safetensors")
    if os.path.lexists(folder / INDEX):
        owners = _owners(folder / INDEX)
        return Shards([folder / name for name in sorted(set(owners.values()))], owners)
    if os.path.lexists(folder / SINGLE):
        return Shards([folder / SINGLE])
    others = sorted(folder.glob("*.safetensors"))
    if len(others) != 1:
        found = f"{len(others)} files and no {INDEX}" if others else "no *.safetensors"
        raise CheckpointError(f"{folder}: {found}; expected model.safetensors, or shards with their index")
    return Shards(others)


def _owners(index: Path) -> dict[str, str]:
    """The weight_map of an index, checked."""
    owners = read_json(index).get("weight_map")
    if not isinstance(owners, dict) or not owners or not all(isinstance(name, str) for name in owners.values()):
        raise CheckpointError(f"{index}: weight_map does not name a file for each tensor")
    for name in set(owners.values()):
        plain = {PurePosixPath(name).name, PureWindowsPath(name).name} == {name} and name not in ("", "..")
        if not plain or not name.isprintable() or len(name) > 255:
            raise CheckpointError(f"{index}: weight_map names {name[:80]!r}; expected a file name inside this folder")
    return owners


def open_shard(path: Path) -> Any:
    """An open safetensors file, its header parsed. Raises CheckpointError naming the file."""
    size = shard_size(path)
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < header <= size and header > size // 100:
            large = f"its header has {header} of {size} bytes"
            raise CheckpointError(f"{path}: {large}: no model has so many tensors; the file is damaged")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read as safetensors ({reason}); the file is damaged") from None


def shard_size(path: Path) -> int:
    """Bytes of a regular file. Raises CheckpointError for anything else: opening a FIFO would wait for ever."""
    try:
        if path.is_file():
            return path.stat().st_size
        missing = "no such file, but the index names it: a part of the model is missing"
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else missing}")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

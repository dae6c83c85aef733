"""Checkpoint: the tensors of a folder's safetensors files under one set of names. Knows no family.

Files of the same model can differ in their names. They are translated here, so that a builder knows one name for each
tensor:

    model.language_model.layers...    the text part of a vision-language model: the middle word is dropped
    mtp.*, *visual.*, extra layers    ignored: nanokv takes no images and predicts one token at a time
    mlp.experts.gate_up_proj          all experts in one [E, 2 * inner, width] (and down_proj [E, width, inner]): shown
                                      as gate_proj, up_proj and down_proj of each expert

Opening a checkpoint reads the headers of the files only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nanokv.core.errors import CheckpointError
from nanokv.models.config import ModelConfig
from nanokv.models.fields import read_json

STORED_DTYPES = ("F32", "BF16", "F16")
"""Supported dtypes, as safetensors names them."""
IGNORED = re.compile(r"(^|\.)(mtp|visual)\.|rotary_emb\.inv_freq$")
"""Names of tensors that nanokv does not use, or that follow from the config."""
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
"""Names of tensors that hold all experts of a layer."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or the part of a fused tensor that belongs to one expert.

    file     open safetensors file
    name     of the tensor in the file
    shape    of the tensor, or of the part
    expert   index of the expert; None: the whole tensor
    first    first row of the part
    """

    file: Any
    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0

    @property
    def dtype(self) -> str:
        """As safetensors names it, such as "BF16"."""
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> torch.Tensor:
        """The stored values, mapped from the file."""
        if self.expert is None:
            return self.file.get_tensor(self.name)
        return self.file.get_slice(self.name)[self.expert, self.first : self.first + self.shape[0]]


class Checkpoint:
    """The tensors of a model's folder by name.

    folder   holds model.safetensors, or shards with an index, or one *.safetensors
    config   of the model: which layers are extra ones, and whether the head is the embedding table
    Raises   CheckpointError naming a file that is missing or cannot be read
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self._config = config
        self._tensors: dict[str, Stored] = {}
        ignored = tuple(f"model.layers.{config.num_layers + extra}." for extra in range(config.num_extra_layers))
        for path in checkpoint_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except FileNotFoundError:
                missing = "no such file, but the index names it: a part of the model is missing"
                raise CheckpointError(f"{path}: {missing}") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); the file is damaged") from None
            names = [name for name in file.keys() if not IGNORED.search(name)]  # noqa: SIM118 (not a dict)
            named = (pair for name in names for pair in _named(file, name))
            self._tensors.update((name, stored) for name, stored in named if not name.startswith(ignored))

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The stored tensor. Call `check` first: it compares the shapes."""
        return self._tensors[name].read()

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compares the stored tensors with the ones that the model needs.

        shapes   name -> shape of every tensor that the model needs
        Raises   CheckpointError naming every tensor that is missing, unexpected, misshapen or of another dtype
        """
        tensors = dict(self._tensors)
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        if self._config.tie_embeddings and head in tensors and table in tensors:
            alike = tensors[head].dtype == tensors[table].dtype
            if not alike or not torch.equal(tensors[head].read(), tensors[table].read()):
                differ = f"{head} differs from {table}, but config.json ties them (tie_word_embeddings)"
                raise CheckpointError(f"{self.folder}: {differ}")
            del tensors[head]
        common = [name for name in shapes if name in tensors]
        complaints = {
            "missing": [name for name in shapes if name not in tensors],
            "unexpected": [name for name in tensors if name not in shapes],
            "misshapen": [
                f"{name} is {list(tensors[name].shape)}, config.json asks for {list(shapes[name])}"
                for name in common
                if tensors[name].shape != shapes[name]
            ],
            f"not of a supported dtype ({', '.join(STORED_DTYPES)})": [
                f"{name} is {tensors[name].dtype}" for name in common if tensors[name].dtype not in STORED_DTYPES
            ],
        }
        found = [f"{complaint}: {_folded(names)}" for complaint, names in complaints.items() if names]
        if found:
            raise CheckpointError(f"{self.folder}: the tensors do not fit config.json; {'; '.join(found)}")


def _named(file: Any, name: str) -> Iterator[tuple[str, Stored]]:
    """One stored tensor under the names that builders know."""
    shape = tuple(file.get_slice(name).get_shape())
    canonical = name.replace("model.language_model.", "model.", 1)
    fused = FUSED.fullmatch(canonical)
    if fused is None or len(shape) != 3:
        yield canonical, Stored(file, name, shape)
        return
    experts, rows, columns = shape
    names = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
    for expert in range(experts):
        for place, part in enumerate(names):
            own = (rows // len(names), columns)
            yield f"{fused[1]}.{expert}.{part}.weight", Stored(file, name, own, expert, place * own[0])


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of weights: model.safetensors, else the shards in the index, else the only *.safetensors.

    Raises CheckpointError where there is none, or several without an index.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and *.safetensors")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: weight_map does not name a file for each tensor")
        return [folder / name for name in sorted(set(shards.values()))]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) != 1:
        found = f"{len(others)} files and no {index.name}" if others else "no *.safetensors"
        raise CheckpointError(f"{folder}: {found}; expected model.safetensors, or shards with their index")
    return others


def _folded(names: Iterable[str]) -> str:
    """All names; those that differ only in layer or expert become one: model.layers.{3-5,7}.mlp.up_proj.weight"""
    for axis in ("layers", "experts"):
        numbers: dict[str, list[int]] = {}
        for name in names:
            number = re.search(rf"\.{axis}\.(\d+)\.", name)
            pattern = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
            numbers.setdefault(pattern, []).extend([int(number[1])] if number else [])
        names = [one.replace("{}", _ranges(found), 1) if found else one for one, found in numbers.items()]
    return ", ".join(names)


def _ranges(numbers: list[int]) -> str:
    """Numbers as text: 3, or {3-5,7}."""
    # Numbers that follow each other differ from their places by the same amount.
    grouped = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in grouped]
    text = ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else f"{{{text}}}"

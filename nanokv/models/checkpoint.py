"""Checkpoint: the tensors of a folder's safetensors files under one set of names. Knows no family.

Files of the same model can differ in their names. They are translated here, so that a builder knows one name for each
tensor:

    model.language_model.layers...    the text part of a vision-language model: the middle word is dropped
    mtp.*, *visual.*, extra layers    ignored: nanokv takes no images and predicts one token at a time
    mlp.experts.gate_up_proj          all experts in one [E, 2 * inner, width] (and down_proj [E, width, inner]): shown
                                      as gate_proj, up_proj and down_proj of each expert. Qwen3-VL-MoE stores each
                                      transposed: the shape tells, and as in transformers a square one is not

Two stored tensors under one name are an error: neither is chosen. Quantised matrices are joined with their scales and
decoded when they are read (models/quantized.py). Opening a checkpoint reads the headers of the files only.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch

from nanokv.core.errors import CheckpointError
from nanokv.models.config import ModelConfig
from nanokv.models.quantized import Source, pair, q8_matrices
from nanokv.models.shards import find_shards, open_shard

STORED_DTYPES = ("F32", "BF16", "F16")
"""Supported dtypes, as safetensors names them."""
IGNORED = re.compile(r"(^|\.)(mtp|visual)\.|rotary_emb\.inv_freq$")
"""Names of tensors that nanokv does not use, or that follow from the config."""
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
"""Names of tensors that hold all experts of a layer."""
LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")
ROWS = 1 << 12
"""Rows of a matrix that are compared at a time."""
MOST_CHARACTERS = 1500
"""Of the names in one complaint, after those that differ only in layer or expert have become one."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or the part of a fused tensor that belongs to one expert.

    file     open safetensors file
    name     of the tensor in the file
    shape    of the tensor, or of the part
    expert   index of the expert; None: the whole tensor
    first    first row of the part
    turned   whether the experts are stored transposed: rows of the part are columns of the file
    """

    file: Any
    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0
    turned: bool = False

    @property
    def dtype(self) -> str:
        """As safetensors names it, such as "BF16"."""
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> torch.Tensor:
        """The stored values, mapped from the file."""
        if self.expert is None:
            return self.file.get_tensor(self.name)
        rows, whole = slice(self.first, self.first + self.shape[0]), self.file.get_slice(self.name)
        return whole[self.expert, :, rows].T.contiguous() if self.turned else whole[self.expert, rows]


class Checkpoint:
    """The tensors of a model's folder by name.

    folder   holds model.safetensors, or shards with an index, or one *.safetensors
    config   of the model: its layers and experts, which layers are extra ones, whether the head is the embedding table,
             how matrices are quantised
    dtype    of matrices that are decoded
    codes    a file with the codes of some matrices (hub/home.py:Q8_FILE), which count instead of the stored numbers
             where it exists; None: no such file counts
    Raises   CheckpointError naming a file that is missing or cannot be read, or two tensors of the same name
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: torch.dtype, codes: Path | None = None) -> None:
        self.folder = folder
        self._config = config
        shards, placed = find_shards(folder), defaultdict[str, set[str]](set)
        for name, owner in shards.owners.items():
            placed[owner].add(name)
        found: dict[str, Stored] = {}
        for path in shards.files:
            file = open_shard(path)
            names = set(file.keys())
            own = placed[path.name]
            if lost := own - names:
                raise CheckpointError(f"{path}: lacks tensors that the index places there: {_folded(sorted(lost))}")
            for name in sorted(names):
                if name not in own and name in shards.owners:
                    continue  # a copy: the index gives another file
                for canonical, stored in _named(file, name, config):
                    if canonical in found:
                        twice = f"{_readable(found[canonical].name)} and {_readable(name)} of {path.name}"
                        raise CheckpointError(f"{folder}: two tensors for {_readable(canonical)}: {twice}")
                    found[canonical] = stored
        self._tensors: dict[str, Source] = dict(found)
        self._broken: dict[str, str] = {}
        if config.quantization is not None:
            self._tensors, self._broken = pair(self._tensors, config.quantization, dtype)
        if codes is not None and codes.exists():
            file = open_shard(codes)
            parts = {name: Stored(file, name, tuple(file.get_slice(name).get_shape())) for name in set(file.keys())}
            self._tensors |= q8_matrices(parts)

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
            if not _equal(tensors[head], tensors[table]):
                differ = f"{head} differs from {table}, but config.json ties them (tie_word_embeddings)"
                raise CheckpointError(f"{self.folder}: {differ}")
            del tensors[head]
        common = [name for name in shapes if name in tensors]
        complaints = {
            "missing": [name for name in shapes if name not in tensors and name not in self._broken],
            "unexpected": [name for name in tensors if name not in shapes],
            "misshapen": [
                f"{name} is {list(tensors[name].shape)}, config.json asks for {list(shapes[name])}"
                for name in common
                if tensors[name].shape != shapes[name]
            ],
            f"not of a supported dtype ({', '.join(STORED_DTYPES)})": [
                f"{name} is {tensors[name].dtype}" for name in common if tensors[name].dtype not in STORED_DTYPES
            ],
            "quantised in a way that is not decoded": list(self._broken.values()),
        }
        found = [f"{complaint}: {_folded(names)}" for complaint, names in complaints.items() if names]
        if found:
            raise CheckpointError(f"{self.folder}: the tensors do not fit config.json; {'; '.join(found)}")


def _named(file: Any, name: str, config: ModelConfig) -> Iterator[tuple[str, Stored]]:
    """One stored tensor under the names that builders know; none for a tensor that is ignored."""
    canonical = name.replace("model.language_model.", "model.", 1)
    layer = LAYER.match(canonical)
    extra = layer is not None and 0 <= int(layer[1]) - config.num_layers < config.num_extra_layers
    if extra or IGNORED.search(name):
        return
    shape = tuple(file.get_slice(name).get_shape())
    fused, moe = FUSED.fullmatch(canonical), config.moe
    if fused is None or moe is None:
        yield canonical, Stored(file, name, shape)
        return
    both = fused[2] == "gate_up_proj"
    parts, own = (("gate_proj", "up_proj") if both else ("down_proj",)), (moe.width, config.hidden_size)
    own = own if both else own[::-1]
    whole = (moe.num_experts, len(parts) * own[0], own[1])
    turned = shape != whole
    if turned and shape != (whole[0], whole[2], whole[1]):
        yield canonical, Stored(file, name, shape)  # unexpected, and the matrices that it ought to hold are missing
        return
    for expert in range(moe.num_experts):
        for place, part in enumerate(parts):
            yield f"{fused[1]}.{expert}.{part}.weight", Stored(file, name, own, expert, place * own[0], turned)


def _equal(one: Source, other: Source) -> bool:
    """Whether two matrices hold the same numbers, in whatever dtypes: float32 holds those of every supported one."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= set(STORED_DTYPES):
        return False
    pairs = zip(one.read().split(ROWS), other.read().split(ROWS), strict=True)
    return all(torch.equal(some.float(), others.float()) for some, others in pairs)


def _readable(name: str) -> str:
    """A name from a file, safe to print on one line."""
    name = name if len(name) <= 240 else f"{name[:240]}..."
    return name if name.isprintable() else ascii(name)


def _folded(names: Iterable[str]) -> str:
    """The names; those that differ only in layer or expert become one: model.layers.{3-5,7}.mlp.up_proj.weight"""
    for axis in ("layers", "experts"):
        numbers: dict[str, list[int]] = {}
        for name in names:
            number = re.search(rf"\.{axis}\.([0-9]{{1,6}})\.", name)
            pattern = name if number is None else f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}"
            numbers.setdefault(pattern, []).extend([int(number[1])] if number else [])
        names = [one.replace("{}", _ranges(found), 1) if found else one for one, found in numbers.items()]
    names = list(map(_readable, names))
    shown = bisect_right(list(accumulate(map(len, names))), MOST_CHARACTERS)
    return ", ".join(names[:shown] + ([f"and {len(names) - shown} more"] if len(names) > shown else []))


def _ranges(numbers: list[int]) -> str:
    """Numbers as text: 3, or {3-5,7}."""
    # Numbers that follow each other differ from their places by the same amount.
    grouped = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in grouped]
    text = ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else f"{{{text}}}"

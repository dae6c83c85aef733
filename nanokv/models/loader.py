"""From a folder to a Decoder: finds the files, checks every tensor before the first is read, then builds.

Raises CheckpointError for whatever is wrong with a folder, in one line that names all of it: nothing is silently
zero, converted or skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanokv.codecs.raw import RawCodec
from nanokv.core.errors import CheckpointError
from nanokv.kernels import ops
from nanokv.models import FAMILIES
from nanokv.models.config import ModelConfig, read_json
from nanokv.models.decoder import Decoder
from nanokv.models.weights import Weights, dummy

STORED_DTYPES = ("F32", "BF16", "F16")
IGNORED = ("rotary_emb.inv_freq",)
"""Ends of the names of tensors that old checkpoints carry and that follow from the config."""
NAMED_AT_MOST = 4


def load_model(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    codec: RawCodec,
    page_size: int,
    load: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model of a folder, ready to be bound to a PageLayout.

    folder     holds *.safetensors; not touched when load is "dummy"
    dtype      of the weights; activations take ops.activation_dtype(device, dtype)
    codec      how k and v will be written; with page_size it shapes what the layers keep
    load       "auto" reads the checkpoint; "dummy" fills the model with noise that follows from `seed`
    progress   called with (tensors taken, tensors in all) while the model is built
    Raises     CheckpointError naming the file, or every tensor that is missing, unexpected, misshapen or quantised
    """
    family = import_module(FAMILIES[config.family][1])
    shapes = family.tensors(config)
    if load == "dummy":
        read = dummy(shapes, dtype, seed)
    else:
        checkpoint = Checkpoint(Path(folder))
        checkpoint.check(shapes, config.tie_embeddings)
        read = checkpoint.read
    device = torch.device(device)
    count = None if progress is None else lambda taken: progress(taken, len(shapes))
    weights = Weights(read, dtype, ops.activation_dtype(device, dtype), device, count)
    return family.build(config, weights, codec, page_size)


class Checkpoint:
    """The safetensors files of a folder: which tensor is where. Headers are read on construction, numbers are not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {}
        for path in checkpoint_files(folder):
            try:
                file = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file, but the index names it; fetch the model again") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); fetch it again") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, mapped from its file."""
        return self._files[name].get_tensor(name)

    def check(self, shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
        """Compares what is stored with what the model needs. Raises one CheckpointError for all that differs."""
        stored = {name: file.get_slice(name) for name, file in self._files.items() if not name.endswith(IGNORED)}
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        if tied and head in stored and table in stored:
            alike = stored[head].get_dtype() == stored[table].get_dtype()
            if not alike or not torch.equal(self.read(head), self.read(table)):
                raise CheckpointError(
                    f"{self.folder}: {head} differs from {table}, but config.json ties them (tie_word_embeddings)"
                )
            del stored[head]
        common = [name for name in shapes if name in stored]
        actual = {name: tuple(stored[name].get_shape()) for name in common}
        complaints = {
            "missing": [name for name in shapes if name not in stored],
            "unexpected": [name for name in stored if name not in shapes],
            "misshapen": [
                f"{name} is {list(actual[name])}, config.json asks for {list(shapes[name])}"
                for name in common
                if actual[name] != shapes[name]
            ],
            f"not of a supported dtype ({', '.join(STORED_DTYPES)})": [
                f"{name} is {stored[name].get_dtype()}"
                for name in common
                if stored[name].get_dtype() not in STORED_DTYPES
            ],
        }
        found = [f"{complaint}: {_some(names)}" for complaint, names in complaints.items() if names]
        if found:
            raise CheckpointError(f"{self.folder}: the tensors do not fit config.json; {'; '.join(found)}")


def checkpoint_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names, or the only *.safetensors there is."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and *.safetensors")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: weight_map does not name a file for each tensor; fetch the model again")
        return [folder / name for name in sorted(set(shards.values()))]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) != 1:
        found = f"{len(others)} files and no {index.name}" if others else "no *.safetensors"
        raise CheckpointError(f"{folder}: {found}; expected model.safetensors, or shards with their index")
    return others


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")

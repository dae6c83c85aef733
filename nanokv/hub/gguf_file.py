"""GGUFFile: the metadata and the tensors of a GGUF file, as the file stores them. Knows no checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nanokv.core.errors import PullError


class GGUFFile:
    """The metadata and the tensors of one GGUF file.

    path     of the file; its data stay on disk until a tensor is read
    Raises   PullError, one line, where the file is damaged or cannot be read
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise PullError(f"{path}: not a GGUF file")
            reader = GGUFReader(path)
        except OSError as error:
            raise PullError(f"{path}: {error.strerror or error}") from error
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise PullError(f"{path}: truncated or damaged GGUF file ({error})".replace("\n", " ")) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or `default` where the file lacks it."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        """The value of a metadata key. Raises PullError naming it where the file lacks it."""
        value = self.get(key)
        if value is None:
            raise PullError(f"{self.path}: the key {key} is missing")
        return value

    @property
    def tensor_names(self) -> set[str]:
        """The names of all tensors, as llama.cpp writes them."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, rows first, as checkpoints list it."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32, in the file's row order. Raises PullError for a type without support."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        except (NotImplementedError, ValueError) as error:
            raise PullError(f"{self.path}: cannot read {name} ({tensor.tensor_type.name}): {error}") from error

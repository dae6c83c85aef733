"""Weights: the tensors of a checkpoint by name, as the builders of the families take them. Knows no family.

A builder takes each tensor once, in the dtype and on the device of the model. Files are mapped into memory, so a
tensor that is used as it stands is never copied, and what a builder packs is read once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BANK = 4_194_301
"""Random numbers that dummy weights are cut from; a prime, so that no two rows of a matrix are the same cut."""


class Weights:
    """Tensors by name.

    read         name -> tensor, as it is stored
    dtype        of matrices
    activation   of vectors (norms, biases), which are added to or multiplied with activations
    progress     called with the number of tensors taken so far, or None
    """

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        dtype: torch.dtype,
        activation: torch.dtype,
        device: torch.device,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.dtype = dtype
        self.activation = activation
        self.device = device
        self._read = read
        self._progress = progress
        self._taken = 0

    def matrix(self, *names: str) -> torch.Tensor:
        """The matrices, one below the other: [sum of their rows, columns]."""
        return self._take(names, self.dtype)

    def vector(self, *names: str) -> torch.Tensor:
        """The vectors, one after the other: [sum of their lengths]."""
        return self._take(names, self.activation)

    def _take(self, names: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
        parts = [self._read(name).to(self.device, dtype) for name in names]
        self._taken += len(parts)
        if self._progress is not None:
            self._progress(self._taken)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def dummy(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> Callable[[str], torch.Tensor]:
    """A `read` without files: norms are 1, all else is seeded noise of standard deviation 0.02.

    The noise is drawn once and copied from random places, because drawing billions of numbers takes minutes. Each
    tensor owns its memory: a benchmark streams as many bytes as with real weights.
    """
    generator = torch.Generator().manual_seed(seed)
    bank = torch.empty(BANK).normal_(0, 0.02, generator=generator).to(dtype)

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name], dtype=dtype)
        if name.endswith("norm.weight"):
            return tensor.fill_(1)
        flat = tensor.view(-1)
        start = int(torch.randint(BANK, (), generator=generator))
        for piece in flat.split(BANK):
            first = min(len(piece), BANK - start)
            piece[:first] = bank[start : start + first]
            piece[first:] = bank[: len(piece) - first]
        return tensor

    return read

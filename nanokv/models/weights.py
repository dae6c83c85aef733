"""Weights: the tensors of a checkpoint by name, for the builders of the families. Knows no family.

A builder takes each tensor once, states its shape, and gets it in the dtype and on the device of the model. Files are
mapped into memory: a tensor that needs no conversion is not copied, and a packed one is read once. A builder states
every shape at the place of use, so running it over `recorded` weights yields the list of tensors that a checkpoint must
hold; no second list exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.q8 import GROUP
from nanokv.layers.linear import Linear

BANK = 4_194_301
"""Random numbers of which dummy weights are slices; a prime, so that no two rows of a matrix are the same slice."""
Read = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Name and shape -> the stored tensor."""


@dataclass
class Weights:
    """Tensors by name, and the settings of the layers that a builder makes of them.

    read         returns a tensor of the shape that the builder states
    dtype        of matrices
    q8           whether projections take 8 bits for a number
    activation   dtype of vectors (norms, biases): that of the activations they meet
    ops          Ops of the layers
    progress     called with `taken`, or None
    taken        tensors taken so far
    """

    read: Read
    dtype: torch.dtype
    activation: torch.dtype
    device: torch.device
    ops: Ops
    progress: Callable[[int], None] | None = None
    taken: int = 0
    q8: bool = False

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A matrix [rows, columns]."""
        return self.take(name, (rows, columns), self.dtype)

    def projection(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A matrix [out, in] for `linear`. For 8 bits it keeps the stored dtype: only one rounding comes after it."""
        return self.take(name, (rows, columns), None if self.q8 else self.dtype)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """The layer of a weight made of projections, in 8 bits where they are asked for and `in` has whole groups.

        bias   as of Linear
        """
        q8 = self.q8 and weight.shape[1] % GROUP == 0
        return Linear(weight if q8 else weight.to(self.dtype), self.activation, self.ops, bias, q8)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A vector [size] in the dtype of activations."""
        return self.take(name, (size,), self.activation)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        """A tensor of any shape in any dtype; None: the stored one."""
        tensor = self.read(name, shape).to(self.device, dtype)
        self.taken += 1
        if self.progress is not None:
            self.progress(self.taken)
        return tensor


def join(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """torch.cat; on the meta device shapes only: there torch.cat imports torch's compiler, which takes 1.4 s."""
    if not parts[0].is_meta:
        return torch.cat(parts, dim)
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.empty(shape, device="meta")


def recorded(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Weights without numbers (on torch's meta device) that record in `shapes` the tensors that a builder takes."""
    meta = torch.device("meta")

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        shapes[name] = shape
        return torch.empty(shape, device=meta)

    return Weights(read, torch.float32, torch.float32, meta, AUTO)


def dummy(dtype: torch.dtype, seed: int) -> Read:
    """A `read` without files: norms are 1, all other tensors seeded noise of standard deviation 0.02.

    The noise is drawn once and copied from random offsets, because drawing billions of numbers takes minutes. Each
    tensor owns its memory, so that a benchmark streams as many bytes as with real weights.
    """
    generator = torch.Generator().manual_seed(seed)
    bank = torch.empty(BANK).normal_(0, 0.02, generator=generator).to(dtype)

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if name.endswith("norm.weight"):
            return tensor.fill_(1)
        start = int(torch.randint(BANK, (), generator=generator))
        for piece in tensor.view(-1).split(BANK):
            first = min(len(piece), BANK - start)
            piece[:first] = bank[start : start + first]
            piece[first:] = bank[: len(piece) - first]
        return tensor

    return read

"""Experts: the packed weights of a mixture of experts, and their addresses for a kernel that reads all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from nanokv.kernels.linear import PackedLinear


@dataclass(frozen=True)
class Experts:
    """The weights of the experts of one layer, all of the same shapes.

    gate_up   a [2 * hidden, width] for each expert: the rows of gate, then those of up
    down      a [width, hidden] for each expert
    """

    gate_up: list[PackedLinear]
    down: list[PackedLinear]

    @property
    def count(self) -> int:
        return len(self.down)

    @property
    def hidden(self) -> int:
        """Width between the two products."""
        return self.down[0].shape[1]

    @cached_property
    def gate_up_at(self) -> torch.Tensor:
        """Addresses of the weights `gate_up`: int64 [count].

        Raises ValueError for weights in another form than "plain". The weights must not be moved afterwards.
        """
        return _addresses(self.gate_up)

    @cached_property
    def down_at(self) -> torch.Tensor:
        """Addresses of the weights `down`, as `gate_up_at`."""
        return _addresses(self.down)


def _addresses(weights: list[PackedLinear]) -> torch.Tensor:
    forms = {weight.form for weight in weights}
    if forms != {"plain"}:
        raise ValueError(f"experts in the form {forms}: a kernel reads plain weights only")
    return torch.tensor([weight.data.data_ptr() for weight in weights], device=weights[0].data.device)

"""Experts: the feed-forward layers of a mixture as packed weights, and where each lies for a kernel that reads all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from nanokv.kernels.linear import PackedLinear


@dataclass(frozen=True)
class Experts:
    """The weights of each expert; all have the same shapes.

    gate_up   [2 * hidden, width] each: the rows of gate, then those of up
    down      [width, hidden] each
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
        """int64 [count]: the address of each expert's weight, which must be in the form "plain" and stay there."""
        return _addresses(self.gate_up)

    @cached_property
    def down_at(self) -> torch.Tensor:
        """As gate_up_at."""
        return _addresses(self.down)


def _addresses(weights: list[PackedLinear]) -> torch.Tensor:
    forms = {weight.form for weight in weights}
    if forms != {"plain"}:
        raise ValueError(f"experts in the form {forms}: only plain weights can be read by address")
    return torch.tensor([weight.data.data_ptr() for weight in weights], device=weights[0].data.device)

"""Muon for the matrices of a small model, on a CPU.

torch.optim.Muon orthogonalises one matrix at a time, in bfloat16; on a processor without bfloat16 instructions that
costs more than the model itself. Here matrices of one shape are stacked and stay in float32.

Source   Jordan et al. 2024 (Muon); constants and update rule as in torch.optim.Muon, adjust_lr_fn="original"
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, columns]: for each matrix, nearly the closest orthogonal one (singular values about 1)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Orthogonalised momentum. The state is one stack of momenta for each shape."""

    def __init__(self, parameters: list[Tensor], rate: float, momentum: float = 0.95, decay: float = 0.05) -> None:
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.stacks: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            self.stacks.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momenta = {shape: torch.zeros(len(stack), *shape) for shape, stack in self.stacks.items()}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rate."""
        for shape, stack in self.stacks.items():
            gradients = torch.stack([parameter.grad for parameter in stack])
            momenta = self.momenta[shape].lerp_(gradients, 1 - self.momentum)
            updates = orthogonal(gradients.lerp(momenta, self.momentum))
            rate = scale * self.rate
            for parameter, update in zip(stack, updates, strict=True):
                parameter.mul_(1 - rate * self.decay)
                parameter.add_(update, alpha=-rate * max(1, shape[0] / shape[1]) ** 0.5)

    def state_dict(self) -> list[Tensor]:
        return list(self.momenta.values())

    def load_state_dict(self, state: list[Tensor]) -> None:
        for momenta, saved in zip(self.momenta.values(), state, strict=True):
            momenta.copy_(saved)

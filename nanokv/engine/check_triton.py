"""A minimal kernel that shows whether triton works on a device. Importing this needs triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

SIZE = 64
"""Numbers that the kernel adds to."""


@triton.jit
def add_one_kernel(numbers, SIZE: tl.constexpr):
    """Adds 1 to each of `numbers`, float32 [SIZE]."""
    places = numbers + tl.arange(0, SIZE)
    tl.store(places, tl.load(places) + 1.0)


def adds(device: torch.device) -> bool:
    """Whether the kernel computes the right numbers. Raises triton's exception where it does not compile or run."""
    numbers = torch.arange(SIZE, dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        add_one_kernel[(1,)](numbers, SIZE=SIZE)
    return torch.equal(numbers.cpu(), torch.arange(SIZE, dtype=torch.float32) + 1)

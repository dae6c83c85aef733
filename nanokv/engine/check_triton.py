"""The smallest kernel there is, to see whether triton works on a device. Importing this needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SIZE = 64


@triton.jit
def add_one_kernel(numbers, SIZE: tl.constexpr):
    places = numbers + tl.arange(0, SIZE)
    tl.store(places, tl.load(places) + 1.0)


def adds(device: torch.device) -> bool:
    """Whether a kernel compiles, runs and adds. Raises whatever triton raises where it does not get that far."""
    numbers = torch.arange(SIZE, dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        add_one_kernel[(1,)](numbers, SIZE=SIZE)
    return torch.equal(numbers.cpu(), torch.arange(SIZE, dtype=torch.float32) + 1)

"""Inputs and comparisons that the tests of the kernels share."""

from __future__ import annotations

import torch


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal random numbers, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def last(length: int, count: int) -> list[int]:
    """The last `count` positions of a request."""
    return list(range(length - count, length))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have equal bits; NaN equals the same NaN, and 0 does not equal -0."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

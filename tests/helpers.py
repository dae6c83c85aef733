"""What many test files need: random tensors, equality of bits, rows of a request, an engine that is run to its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nanokv import LLM, RequestOutput


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers from the standard normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes: -0 differs from 0, and a NaN equals itself."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def last(length: int, count: int) -> list[int]:
    """The last `count` positions of a request of `length` tokens."""
    return list(range(length - count, length))


def with_logprobs(outputs: Iterable[RequestOutput]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of each output: these show a changed bit that a token would hide."""
    return [
        (output.token_ids, [report[token] for token, report in zip(output.token_ids, output.logprobs, strict=True)])
        for output in outputs
    ]


def run(llm: LLM, most: int = 500) -> list[RequestOutput]:
    """Steps the engine until it has no work, counts its pages after each step, and returns every output."""
    outputs: list[RequestOutput] = []
    for _ in range(most):
        if not llm.engine.has_work:
            return outputs
        outputs.extend(llm.engine.step())
        llm.engine.cache.check()
    raise AssertionError("the engine does not come to an end")

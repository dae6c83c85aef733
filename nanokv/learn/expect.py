"""Expectations of the tests of exercises. One that fails says in words which value was expected where, and which came.

Random numbers come from `random_of` and `tensor_of`. They depend on a label and on the seed of the run: the course's
variant in public tests, NANOKV_GRADER_SEED in hidden ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_seed = 0
LONGEST = 160
"""Characters of a value that are shown."""


def use_seed(seed: int) -> None:
    """Sets the seed of all later draws."""
    global _seed
    _seed = seed


def random_of(label: str) -> random.Random:
    """A generator for one purpose of one test."""
    return random.Random(f"{_seed} {label}")


def tensor_of(label: str, *shape: int) -> torch.Tensor:
    """Standard normal float32 numbers of this shape, on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(random_of(label).randrange(2**62))
    return torch.randn(*shape, generator=generator)


def equal(got: Any, expected: Any, what: str) -> None:
    """Raises AssertionError unless both are equal and of comparable kinds.

    what   what the value is, for the words of a failure
    """
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for key in expected:
            if key not in got:
                raise AssertionError(f"{what}: {key!r} is missing; got {_show(got)}")
            equal(got[key], expected[key], f"{what}, {key!r}")
        if len(got) != len(expected):
            raise AssertionError(f"{what}: expected the keys {_show(list(expected))}, got {_show(list(got))}")
        return
    if _is_sequence(expected) and _is_sequence(got):
        _equal_sequences(list(got), list(expected), what)
        return
    is_other_kind = isinstance(expected, bool) and not isinstance(got, bool)
    if is_other_kind or _is_sequence(got) != _is_sequence(expected) or got != expected:
        raise AssertionError(f"{what}: expected {_show(expected)}, {_got(got)}")


def near(got: Any, expected: float, what: str, tolerance: float = 1e-9) -> None:
    """Raises AssertionError unless a plain number is within `tolerance`, relative to the expected one."""
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise AssertionError(f"{what}: expected the number {expected:g}, {_got(got)}")
    if not abs(got - expected) <= tolerance * max(1.0, abs(expected)):
        raise AssertionError(f"{what}: expected {expected:.6g}, got {got:.6g}")


def close(got: Any, expected: torch.Tensor, what: str, axes: Sequence[str] = (), tolerance: float = 1e-5) -> None:
    """Raises AssertionError unless shape and dtype are the same and every number is within `tolerance`.

    axes   names of the axes, such as ("row", "head", "dim"), for the words of a failure
    """
    import torch

    if not isinstance(got, torch.Tensor):
        raise AssertionError(f"{what}: expected a tensor {list(expected.shape)}, {_got(got)}")
    if got.shape != expected.shape:
        names = f" ({', '.join(axes)})" if axes else ""
        raise AssertionError(f"{what}: expected the shape {list(expected.shape)}{names}, got {list(got.shape)}")
    if got.dtype != expected.dtype:
        raise AssertionError(f"{what}: expected dtype {expected.dtype}, got {got.dtype}")
    a, b = got.detach().double(), expected.detach().double()
    wrong = ~torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        labels = [*axes[: len(place)], *(f"axis {i}" for i in range(len(axes), len(place)))]
        where = ", ".join(f"{name} {i}" for name, i in zip(labels, place, strict=True)) or "the number"
        raise AssertionError(
            f"{what}: at {where}: expected {b[tuple(place)].item():.6g}, got {a[tuple(place)].item():.6g} "
            f"({int(wrong.sum())} of {wrong.numel()} numbers are off)"
        )


def refuses(error: type[Exception], call: Callable[[], Any], what: str) -> None:
    """Raises AssertionError unless the call raises `error`. Other exceptions of the call pass through."""
    try:
        got = call()
    except error:
        return
    raise AssertionError(f"{what}: expected a {error.__name__}, got {_show(got)} and no error")


def _equal_sequences(got: list, expected: list, what: str) -> None:
    shown = f"expected {_show(expected)}, got {_show(got)}"
    if len(got) != len(expected):
        raise AssertionError(f"{what}: expected {len(expected)} of them, got {len(got)}: {shown}")
    for place, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one != other:
            raise AssertionError(f"{what}: first difference at place {place}: {shown}")


def _is_sequence(value: Any) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, (str, bytes))) or type(value).__name__ == "array"


def _show(value: Any) -> str:
    if type(value).__name__ == "array":
        value = list(value)
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def _got(got: Any) -> str:
    return f"got {_show(got)}" + (" (is a return missing?)" if got is None else "")

"""Bounds of a chat template: CPU time, and the sizes of values. A template comes with the weights: foreign code.

    time     CPU seconds of the rendering thread, checked at the lines of Python that it runs (sys.settrace; a debugger
             gets its own function back afterwards). It is CPU time, so that a busy machine refuses no template
    memory   an operation that may make a value larger asks before it allocates, and the sum over all values is counted

The bounds grow with the input, so that a long conversation has room. One operation of C on values within the bounds is
not interrupted.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError

_SECONDS = 2.0  # of CPU time
_VALUE = 1 << 20  # characters of a value, or items of a list
_TOTAL = 1 << 26  # bytes of all values of a rendering
_BITS = 1 << 14  # of an integer


class OutOfBounds(TemplateError):
    """A template that would take more than it may."""


class _OutOfTime(BaseException):
    """Ends a template; no `except Exception` of jinja stops it."""


class Budget:
    """The bounds of one rendering; `chars` of input widen them."""

    def __init__(self, chars: int) -> None:
        self.seconds = _SECONDS + 2e-5 * chars
        self.value = _VALUE + 8 * chars
        self.left = _TOTAL + 256 * chars


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited(budget: Budget) -> Iterator[None]:
    """Holds the block to a budget. Raises OutOfBounds."""
    walk = weight.__code__
    end, before, events = time.thread_time() + budget.seconds, sys.gettrace(), 0

    def watch(frame: Any, _event: str, _argument: Any) -> Any:
        nonlocal events
        events += 1
        if events % 8 == 0 and time.thread_time() > end:
            raise _OutOfTime
        return watch if frame.f_code is not walk else None  # that one is bounded itself

    token = _budget.set(budget)
    sys.settrace(watch)
    try:
        yield
    except _OutOfTime:
        raise OutOfBounds(f"it runs for more than {budget.seconds:.1f} s") from None
    finally:
        sys.settrace(before)
        _budget.reset(token)


def allow(size: int) -> None:
    """Raises OutOfBounds where a value of `size` characters or items is too large."""
    if size > (most := _budget.get().value):
        raise OutOfBounds(f"it asks for a value of {size:.3g} characters or items; at most {most} are allowed")


def keep(value: Any) -> Any:
    """Counts a new value and returns it. Raises OutOfBounds where all values together are too large."""
    if isinstance(value, (str, bytes)):
        size = len(value)
    elif isinstance(value, (list, tuple, dict, set)):
        size = 8 * len(value)
    else:
        return value
    budget = _budget.get()
    budget.left -= size
    if budget.left < 0:
        raise OutOfBounds("its values take too much memory")
    return value


def deep(value: Any) -> Any:
    """Checks a value that is written out or compared, and returns it: nested lists may stand for an endless text."""
    if isinstance(value, (list, tuple, Mapping, Set, ValuesView)):
        weight(value)
    return value


def weight(value: Any, indent: int = 0, is_bounded: bool = True) -> int:
    """Characters and items of a value with all that it contains, each as often as it is reached.

    indent       characters that each level of nesting adds to an item
    is_bounded   raise OutOfBounds beyond the size that a value may have
    """
    most = _budget.get().value if is_bounded else sys.maxsize
    total, stack = 0, [(value, 0)]
    while stack:
        one, depth = stack.pop()
        total += 1 + indent * depth
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, Mapping):
            stack += [(item, depth + 1) for pair in one.items() for item in pair]
        elif isinstance(one, (list, tuple, Set, ValuesView)):
            stack += [(item, depth + 1) for item in one]
        if total > most:
            raise OutOfBounds(f"it writes or compares a value of more than {most} characters or items")
    return total


def allow_binary(operator: str, left: Any, right: Any) -> None:
    """Raises OutOfBounds where `left operator right` may be too large."""
    numbers = [one for one in (left, right) if isinstance(one, int)]
    if any(one.bit_length() > _BITS for one in numbers):
        raise OutOfBounds("it computes with too large an integer")
    if operator == "**" and len(numbers) == 2 and right * left.bit_length() > _BITS:
        raise OutOfBounds("it computes too large an integer")
    if operator == "*" and len(numbers) == 1:
        allow(
            numbers[0]
            * max((len(one) for one in (left, right) if isinstance(one, (str, bytes, list, tuple))), default=0)
        )
    elif operator == "+" and not numbers:
        allow(sum(len(one) for one in (left, right) if isinstance(one, (str, bytes, list, tuple))))
    elif operator == "%" and isinstance(left, (str, bytes)):
        allow_percent(left, right)


def allow_percent(form: str | bytes, values: Any) -> None:
    """Raises OutOfBounds where `form % values` may be too large: fields have widths, which may be values themselves."""
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    several = values if isinstance(values, tuple) else (values,)
    uses = text.count("%") if isinstance(values, Mapping) else 1
    widths = _sum_integers(several) if "*" in text else 0
    allow(len(text) + _sum_digits(text) + widths + uses * weight(several))


def allow_format(form: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raises OutOfBounds where `form.format(...)` may be too large: a value may stand often, and be a width."""
    values = [*args, *kwargs.values()]
    widths = _sum_integers(values) if re.search(r"\{[^{}]*\{", form) else 0
    allow(len(form) + _sum_digits(form) + form.count("{") * (weight(values) + widths))


def allow_method(owner: Any, name: str, args: list[Any]) -> None:
    """Raises OutOfBounds where a method of a text or a number may make too large a value. Lists what `join` takes."""
    if name in ("center", "ljust", "rjust", "zfill", "to_bytes"):
        allow(_sum_integers(args[:1]))
    elif name == "expandtabs":
        allow(len(owner) * (1 + _sum_integers(args)))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], type(owner)) and isinstance(args[1], type(owner)):
        allow(len(owner) + owner.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        args[0] = list(args[0])
        allow(weight(args[0]) + len(owner) * len(args[0]))
    elif name == "translate":
        raise OutOfBounds("it calls translate, which is not allowed")


def _sum_digits(form: str) -> int:
    """The sum of the numbers that a form writes: widths and precisions."""
    return sum(int(run[:12]) for run in re.findall(r"[0-9]+", form))


def _sum_integers(values: Iterable[Any]) -> int:
    return sum(abs(value) for value in values if isinstance(value, int))

"""Arguments that no caller may give: names that do not exist, and values of another type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from nanokv.core.errors import NanokvError

T = TypeVar("T", bound=type)


def no_such(
    error: type[NanokvError], owner: str, unknown: Iterable[str], known: Iterable[str], params: type | None = None
) -> NanokvError:
    """The error for keywords that `owner` does not have: it names the nearest to the first of them, or all that exist.

    params   a dataclass whose fields people give in place of an argument `params`
    """
    name = next(iter(unknown))
    spelled = {one: one for one in known}
    everything = ", ".join(spelled)
    if params is not None:
        spelled |= {field.name: f"params={params.__name__}({field.name}=...)" for field in fields(params)}
    nearest = get_close_matches(name, spelled, n=1)
    advice = f"the nearest is {spelled[nearest[0]]}" if nearest else f"it has {everything}"
    return error(f"{name}: {owner} has no such argument; {advice}")


def refuses_unknown(error: type[NanokvError]) -> Callable[[T], T]:
    """Decorator of a class: its constructor raises `error` for a keyword that it does not have."""

    def decorate(cls: T) -> T:
        construct: Callable[..., None] = vars(cls)["__init__"]
        known = list(signature(cls).parameters)

        @wraps(construct)
        def checked(self: Any, *values: Any, **named: Any) -> None:
            if unknown := [name for name in named if name not in known]:
                raise no_such(error, cls.__name__, unknown, known)
            construct(self, *values, **named)

        setattr(cls, "__init__", checked)  # noqa: B010  mypy refuses an assignment to __init__
        return cls

    return decorate


def check_optional(error: type[NanokvError], name: str, value: Any, kind: type) -> None:
    """Checks that `value` is a `kind` or None. Raises `error`."""
    if value is not None and not isinstance(value, kind):
        raise error(f"{name}={value!r:.60}: expected {kind.__name__}, or None")

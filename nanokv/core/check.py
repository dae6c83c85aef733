"""Checks of values that users give. The error names the field, its value and the allowed values."""

from __future__ import annotations

from typing import Any

from nanokv.core.errors import NanokvError


def check_integer(error: type[NanokvError], name: str, value: Any, least: int) -> None:
    """Checks that `value` is an integer of at least `least`; True and False are not integers here.

    error    the class to raise
    name     of the field, for the error
    Raises   `error`
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise error(f"{name}={value!r}: expected an integer of at least {least}")

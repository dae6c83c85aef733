"""Patching: replaces a function of the engine by another one under every name it has, and undoes it.

A function of a module has its name in that module and in every module that imported it; a method has its name in its
class. A property stays a property; the same holds for static and class methods.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

from nanokv.core.errors import ExerciseTODO
from nanokv.learn.course import Exercise
from nanokv.learn.source import split_name

_WRAPPED = (property, staticmethod, classmethod, cached_property)
_replaced: dict[int, Any] = {}
"""id of a replacement -> the module's function that it replaces."""
_methods: dict[type, dict[str, Any]] = {}
"""Class -> its own attributes before they were replaced."""


def patch(target: str, function: Callable) -> Callable[[], None]:
    """Replaces the target, a dotted name, by `function`. Returns a function that undoes it.

    Raises CourseError where no such module exists, AttributeError or KeyError where it has no such name.
    """
    module_name, _, qualname = split_name(target)
    module = import_module(module_name)
    owner_name, _, name = qualname.rpartition(".")
    if owner_name:
        return _patch_method(getattr(module, owner_name), name, function)
    return _patch_function(getattr(module, name), function)


def _patch_method(owner: type, name: str, function: Callable) -> Callable[[], None]:
    before = owner.__dict__[name]
    stand_in: Any
    if isinstance(before, cached_property):
        stand_in = cached_property(function)
        stand_in.__set_name__(owner, name)
    else:
        stand_in = type(before)(function) if isinstance(before, _WRAPPED) else function
    setattr(owner, name, stand_in)
    kept = _methods.setdefault(owner, {})
    first = name not in kept
    kept.setdefault(name, before)

    def undo() -> None:
        setattr(owner, name, before)
        if first:
            del kept[name]

    return undo


def _patch_function(before: Callable, function: Callable) -> Callable[[], None]:
    def swap(old: Callable, new: Callable) -> None:
        for module in [one for name, one in sys.modules.items() if name.split(".")[0] in ("nanokv", "my")]:
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)

    swap(before, function)
    _replaced[id(function)] = _replaced.get(id(before), before)

    def undo() -> None:
        swap(function, before)
        _replaced.pop(id(function), None)

    return undo


def patch_gaps(exercise: Exercise) -> Callable[[], None]:
    """Replaces the exercise's solution and its faster twins by gaps. Returns a function that undoes it."""
    undo = [patch(target, _gap(exercise)) for target in (exercise.target, *exercise.also)]

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    return undo_all


def _gap(exercise: Exercise) -> Callable:
    """A new function for each target, because `_replaced` knows the replaced function by it."""

    def gap(*args: Any, **kwargs: Any) -> Any:
        raise ExerciseTODO(exercise.id)

    return gap


def reference(thing: Any) -> Any:
    """The engine's own version of a function or class that may be patched right now; for hidden tests.

    It is no secret: a student's file that looks for it finds it. Gaps stop accidents and quick copies, not intent.

    thing     a function of a module, or a class
    Returns   the function; for a class a subclass that has the replaced methods back
    """
    if isinstance(thing, type):
        kept = _methods.get(thing)
        return type(thing.__name__, (thing,), dict(kept)) if kept else thing
    return _replaced.get(id(thing), thing)

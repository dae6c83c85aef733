"""Runs the tests of one exercise in this process, up to the first failure, and describes that one in words."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nanokv.core.errors import ExerciseTODO
from nanokv.learn import expect
from nanokv.learn.course import Exercise
from nanokv.learn.job import Failure


def load_file(path: Path, name: str) -> ModuleType:
    """Runs a file again as the module `name`. Exceptions of the file pass through."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_function(exercise: Exercise, path: Path) -> Callable:
    """The student's function. Exceptions of its file pass through."""
    return getattr(load_file(path, f"my.exercise_{path.stem}"), exercise.function)


def tests_of(exercise: Exercise, module: ModuleType) -> list[tuple[str, Callable[[], None]]]:
    """The tests of an exercise in a test module, in order: the test's name in words, and the function."""
    prefix = exercise.test_prefix
    return [
        (name.removeprefix(prefix).replace("_", " "), function)
        for name, function in vars(module).items()
        if name.startswith(prefix)
    ]


def run_tests(
    exercise: Exercise,
    path: Path,
    seed: int,
    mine: Path | None = None,
    before_each: Callable[[str], Any] = lambda test: None,
) -> Failure | None:
    """Runs an exercise's tests of one file against the engine as it is patched now.

    path          the file of tests
    seed          seed of the random numbers that the tests draw
    mine          the student's file: a failure names its line there
    before_each   called before each test with its name in words
    Returns       the first failure; None where all tests pass
    """
    expect.use_seed(seed)
    module = load_file(path, f"nanokv_{path.parent.name}_{path.stem}")
    for words, test in tests_of(exercise, module):
        before_each(words)
        expect.use_seed(seed)
        try:
            test()
        except Exception as error:
            return describe(error, exercise, mine, words)
    return None


def describe(error: BaseException, exercise: Exercise, mine: Path | None, test: str) -> Failure:
    """An exception as a failure of one line: the finding of a test, or the line where the student's file stopped.

    mine    the student's file, or None
    test    the test in words
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if mine is not None and frame.filename == str(mine)]
    if isinstance(error, ExerciseTODO):
        if error.exercise_id != exercise.id:
            return Failure("needs", f"needs exercise {error.exercise_id} first, which is not written yet", test)
        if not own or own[-1] is frames[-1]:
            return Failure("todo", f"{exercise.function} is not written yet", test)
        reason = f"calls the engine's own {exercise.function}, which is a gap while yours is checked"
        return Failure("error", f"line {own[-1].lineno}: {reason}   <- {own[-1].line}", test)
    if isinstance(error, RecursionError) and len(own) > 2:
        reason = "calls itself without end: yours replaces the engine's own while it is checked"
        return Failure("error", f"line {own[-1].lineno}: {exercise.function} {reason}   <- {own[-1].line}", test)
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and not own:
        return Failure("wrong", text or f"this does not hold: {frames[-1].line}", test)
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if own:
        return Failure("error", f"line {own[-1].lineno}: {said}   <- {own[-1].line}", test)
    return Failure("error", f"{said}   <- {frames[-1].line}" if frames else said, test)

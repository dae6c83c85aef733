"""The course checks itself: `scripts/lessons.py dev-check`, a step of CI.

Nearly all of it runs in this process, patching functions and undoing it, because each of hundreds of processes would
spend most of its time on importing torch.
"""

from __future__ import annotations

import ast
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from course import export, notebooks
from course.mutants import mutants
from nanokv.core.errors import CourseError
from nanokv.learn.course import Course, Exercise, load_course
from nanokv.learn.job import Failure
from nanokv.learn.patching import patch, patch_gaps
from nanokv.learn.running import load_file, load_function, run_tests, tests_of
from nanokv.learn.source import find, look_at, solution_file, split_name, student_file

SEEDS = (0, 2026)
"""Hidden tests must hold for any seed; these are tried."""
TEST_LIMIT = 10
"""Seconds for one run of an exercise's tests in one file."""
LEAST_MUTANTS = 3


def dev_check(without_lessons: bool) -> int:
    """Runs all parts and prints their faults. Returns the number of faults.

    without_lessons   leave out running the lessons
    """
    torch.set_num_threads(1)
    course, faults = load_course(), []
    for title, part in PARTS:
        start = time.monotonic()
        found = list(part(course))
        faults += found
        print(f"{'ok' if not found else 'FAULT':6} {title} ({time.monotonic() - start:.1f} s)", flush=True)
        for fault in found:
            print(f"       {fault}")
    if not without_lessons:
        faults += notebooks.run_and_check()
    if not faults:  # else a mutant may not fit the engine's function
        print(
            f"{len(course.exercises)} exercises, {sum(len(mutants(course, one)) for one in course.exercises)} mutants"
        )
    return len(faults)


def resolved(course: Course) -> Iterator[str]:
    """Every target exists, has a docstring, is named by its lesson, and has tests of both kinds."""
    for exercise in course.exercises:
        yield from target_faults(exercise)
        for path in (course.tests("public", exercise), course.tests("hidden", exercise)):
            if not path.is_file() or not tests_of(exercise, load_file(path, "course_tests")):
                yield f"{exercise.id}: {path} has no test that begins with {exercise.test_prefix}"
    for lesson in course.lessons:
        text = notebooks.LESSONS / f"{lesson.name}.py"
        for exercise in course.of_lesson(lesson.number) if text.is_file() else []:
            if not re.search(rf"[.`]{exercise.function}`", text.read_text("utf-8")):
                yield f"{exercise.id}: {text.name} does not name {exercise.function}"
        if not 3 <= len(course.of_lesson(lesson.number)) <= 6:
            yield f"{lesson.name}: {len(course.of_lesson(lesson.number))} exercises; expected three to six"


def target_faults(exercise: Exercise) -> Iterator[str]:
    """Faults of an exercise's target and of its faster twins."""
    try:
        found = find(exercise.target)
    except CourseError as error:
        yield f"{exercise.id}: {error}"
        return
    if found.is_gap:
        yield f"{exercise.id}: {exercise.target} is a gap in this tree"
    if ast.get_docstring(found.node) is None:
        yield f"{exercise.id}: {exercise.target} has no docstring to say what to write"
    expected = list(signature(function_at(exercise.target)).parameters)
    for target in exercise.also:
        try:
            got = list(signature(function_at(target)).parameters)
        except (CourseError, AttributeError, KeyError) as error:
            yield f"{exercise.id}: also={target!r}: there is no such function ({error})"
            continue
        if got != expected:
            yield f"{exercise.id}: also={target!r} takes ({', '.join(got)}), not ({', '.join(expected)})"


def function_at(target: str) -> Callable:
    """The function that the target, a dotted name, has now, taken out of its property, static or class method."""
    module_name, _, qualname = split_name(target)
    value: Any = import_module(module_name)
    owner_name, _, name = qualname.rpartition(".")
    value = getattr(value, owner_name).__dict__[name] if owner_name else getattr(value, name)
    if isinstance(value, property):
        assert value.fget is not None
        return value.fget
    if isinstance(value, cached_property):
        return value.func
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def engine_passes(course: Course) -> Iterator[str]:
    """The engine as it is passes all tests, for several seeds."""
    for exercise in course.exercises:
        for failure in _runs(course, exercise):
            yield f"{exercise.id}: the engine's function fails: {failure.test}: {failure.message}"


def solved_files_pass(course: Course) -> Iterator[str]:
    """A student's file with the engine's function in it passes: the imports that `start` writes suffice."""
    for exercise in course.exercises:
        with _patched(exercise, solution_file(exercise)) as failed:
            for failure in [failed] if failed else _runs(course, exercise):
                yield f"{exercise.id}: the solved file fails: {failure.test}: {failure.message}"


def fresh_files_are_to_do(course: Course) -> Iterator[str]:
    """A file as `start` writes it fails the public and hidden tests as a gap, not as an error."""
    for exercise in course.exercises:
        with _patched(exercise, student_file(exercise)) as failed:
            for path in (course.tests("public", exercise), course.tests("hidden", exercise)):
                failure = failed or _timed(lambda p=path, e=exercise: run_tests(e, p, 0))
                if failure is None or failure.kind != "todo":
                    yield f"{exercise.id}: {path.parent.name}: a fresh file gives {failure}"


def gaps_leave_others_green(course: Course) -> Iterator[str]:
    """A gap breaks no earlier exercise; the gap of an optional one breaks none.

    A gap breaks its callers. So each exercise's tests run once, with every target recording its calls.
    """
    called: set[str] = set()
    undo = [patch(one.target, _recording(one, called)) for one in course.exercises]
    try:
        for place, exercise in enumerate(course.exercises):
            called.clear()
            failure = _timed(lambda one=exercise: run_tests(one, course.tests("public", one), 0))
            if failure is not None:
                yield f"{exercise.id}: {failure.test}: {failure.message}"
            for later, other in enumerate(course.exercises):
                if other.id in called and (later > place or (other.optional and later != place)):
                    yield f"{exercise.id}: a gap in {other.id} ({other.function}) breaks its tests"
            if exercise.id not in called:
                yield f"{exercise.id}: its tests never call {exercise.function}"
    finally:
        for step in reversed(undo):
            step()


def _recording(exercise: Exercise, called: set[str]) -> Callable:
    function = function_at(exercise.target)

    def recording(*args: Any, **kwargs: Any) -> Any:
        called.add(exercise.id)
        return function(*args, **kwargs)

    return recording


def mutants_are_rejected(course: Course) -> Iterator[str]:
    """The tests reject every mutant; the public ones alone reject two of three."""
    for exercise in course.exercises:
        try:
            found = mutants(course, exercise)
        except CourseError as error:
            yield str(error)
            continue
        if len(found) < LEAST_MUTANTS:
            yield f"{exercise.id}: {len(found)} mutants; at least {LEAST_MUTANTS} are expected"
        by_public = 0
        for mutant in found:
            with _patched(exercise, mutant.text) as failed:
                if failed:
                    yield f"{exercise.id}: the mutant that {mutant.why!r} does not load: {failed.message}"
                elif _timed(lambda one=exercise: run_tests(one, course.tests("public", one), course.variant)):
                    by_public += 1
                elif not any(_runs(course, exercise, hidden_only=True)):
                    yield f"{exercise.id}: a mutant passes: {mutant.why}"
        if 3 * by_public < 2 * len(found):
            yield f"{exercise.id}: public tests reject {by_public} of {len(found)} mutants; at least two of three"


def exported_tree_is_sound(course: Course) -> Iterator[str]:
    """An exported tree has gaps, public tests that fail by them, and no solution text."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "tree")
        export.export(out)
        yield from export.leaks(course, out)
        yield from export.gap_faults(out)


PARTS: list[tuple[str, Callable[[Course], Iterator[str]]]] = [
    ("every target resolves, every exercise has its words and tests", resolved),
    ("the engine passes public and hidden tests", engine_passes),
    ("solved files pass", solved_files_pass),
    ("fresh files are to do", fresh_files_are_to_do),
    ("a gap leaves the exercises before it green, an optional one all", gaps_leave_others_green),
    ("mutants are rejected", mutants_are_rejected),
    ("an exported tree has gaps and no solutions", exported_tree_is_sound),
]


def _runs(course: Course, exercise: Exercise, hidden_only: bool = False) -> Iterator[Failure]:
    """The failures of the engine as it is patched now, over all seeds."""
    runs = [] if hidden_only else [(course.tests("public", exercise), seed) for seed in (0, 7)]
    runs += [(course.tests("hidden", exercise), seed) for seed in SEEDS]
    for path, seed in runs:
        failure = _timed(lambda p=path, s=seed: run_tests(exercise, p, s))
        if failure is not None:
            yield failure


@contextmanager
def _patched(exercise: Exercise, text: str) -> Iterator[Failure | None]:
    """Patches the engine with a student's file of this text; yields why the file cannot be used, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, exercise.file)
        path.write_text(text, "utf-8")
        failed = look_at(exercise, path)
        undo = [patch_gaps(exercise)]
        try:
            if failed is None:
                undo.append(patch(exercise.target, load_function(exercise, path)))
            yield failed
        finally:
            for step in reversed(undo):
                step()
            sys.modules.pop(f"my.exercise_{path.stem}", None)


def _timed(run: Callable[[], Failure | None]) -> Failure | None:
    """The run's failure. A run beyond TEST_LIMIT fails."""

    def expire(signum: int, frame: object) -> None:
        raise TimeoutError(f"longer than {TEST_LIMIT} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(TEST_LIMIT)
    try:
        return run()
    finally:
        signal.alarm(0)

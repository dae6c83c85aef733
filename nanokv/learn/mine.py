"""The engine with the student's functions in it: for `nanokv chat --mine`, and for the gaps of an exported tree."""

from __future__ import annotations

from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.binding import bind
from nanokv.learn.course import Course, Exercise, load_course
from nanokv.learn.progress import Progress
from nanokv.learn.running import load_function
from nanokv.learn.source import find


def bind_passed(folder: Path) -> list[Exercise]:
    """Binds every function that passed its public checks, and its faster twins' places. Returns their exercises.

    Raises CourseError where none has passed: the engine would be ours alone.
    """
    course, progress = load_course(), Progress(folder)
    passed = [exercise for exercise in course.exercises if progress.status(exercise) == "passed"]
    if not passed:
        raise CourseError(f"{folder}: no exercise has passed its checks yet; nanokv learn shows where to start")
    functions = [load_function(exercise, folder / exercise.file) for exercise in passed]
    for exercise, function in zip(passed, functions, strict=True):
        for target in (exercise.target, *exercise.also):
            bind(target, function)
    return passed


def not_passed(folder: Path) -> list[Exercise]:
    """Exercises that are begun, for which the engine's own functions stay."""
    course, progress = load_course(), Progress(folder)
    return [one for one in course.exercises if progress.status(one) in ("started", "changed")]


def fill_gaps(course: Course, folder: Path, but: Exercise) -> None:
    """In an exported tree, binds the student's other functions where the engine has gaps. Elsewhere does nothing."""
    for exercise in course.exercises:
        path = folder / exercise.file
        if exercise is not but and path.is_file() and find(exercise.target).is_gap:
            bind(exercise.target, load_function(exercise, path))

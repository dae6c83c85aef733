"""The engine with the student's functions in it: for `nanokv chat --mine`, and for the gaps of an exported tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.course import Course, Exercise, load_course
from nanokv.learn.patching import patch
from nanokv.learn.progress import Progress
from nanokv.learn.running import describe, load_function
from nanokv.learn.source import find, look_at


def patch_passed(folder: Path, twins: bool = True) -> tuple[list[Exercise], list[Exercise]]:
    """Patches the engine with every function that passed its public checks.

    folder   the student's files and their progress
    twins    whether each also replaces its faster twins, which the engine runs. A lesson compares the two: False there
    Returns  the exercises that are patched in, and the begun exercises that are not: not passed, changed since, or
             passed when the course's function had another name or other parameters
    Raises   CourseError where no exercise has passed, and where a file does not load
    """
    course, progress = load_course(), Progress(folder)
    begun = [exercise for exercise in course.exercises if progress.status(exercise) != "new"]
    passed = [one for one in begun if progress.status(one) == "passed" and look_at(one, folder / one.file) is None]
    if not passed:
        raise CourseError(f"{folder}: no exercise has passed its checks yet; nanokv learn shows where to start")
    functions = [_load(exercise, folder) for exercise in passed]
    for exercise, function in zip(passed, functions, strict=True):
        for target in (exercise.target, *(exercise.also if twins else ())):
            patch(target, function)
    return passed, [exercise for exercise in begun if exercise not in passed]


def fill_gaps(course: Course, folder: Path, but: Exercise) -> None:
    """Patches the gaps of an exported tree with the student's functions, except `but`. In a whole tree does nothing.

    Raises CourseError naming the file that cannot be used.
    """
    for exercise in course.exercises:
        if exercise is not but and (folder / exercise.file).is_file() and find(exercise.target).is_gap:
            patch(exercise.target, _load(exercise, folder))


def _load(exercise: Exercise, folder: Path) -> Callable:
    path = (folder / exercise.file).absolute()  # tracebacks name it so
    failure = look_at(exercise, path)
    if failure is None:
        try:
            return load_function(exercise, path)
        except Exception as error:
            failure = describe(error, exercise, path, "")
    raise CourseError(f"{folder / exercise.file}: {failure.message}")

"""The engine with the student's functions in it: for `nanokv chat --mine`, and for the gaps of an exported tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.binding import bind
from nanokv.learn.course import Course, Exercise, load_course
from nanokv.learn.progress import Progress
from nanokv.learn.running import describe, load_function
from nanokv.learn.source import find, look_at


def bind_passed(folder: Path, twins: bool = True) -> tuple[list[Exercise], list[Exercise]]:
    """Binds every function that passed its public checks.

    twins   whether they take their faster twins' places too: the engine runs those. A lesson compares the two

    Returns the exercises of these, and those that are begun and for which the engine's own functions stay: not passed,
    changed since, or passed when the course's function had another name or other parameters.

    Raises CourseError where none has passed, as the engine would be ours alone, and where a file does not load.
    """
    course, progress = load_course(), Progress(folder)
    begun = [exercise for exercise in course.exercises if progress.status(exercise) != "new"]
    passed = [
        exercise
        for exercise in begun
        if progress.status(exercise) == "passed" and look_at(exercise, folder / exercise.file) is None
    ]
    if not passed:
        raise CourseError(f"{folder}: no exercise has passed its checks yet; nanokv learn shows where to start")
    functions = [_load(exercise, folder) for exercise in passed]
    for exercise, function in zip(passed, functions, strict=True):
        for target in (exercise.target, *(exercise.also if twins else ())):
            bind(target, function)
    return passed, [exercise for exercise in begun if exercise not in passed]


def fill_gaps(course: Course, folder: Path, but: Exercise) -> None:
    """In an exported tree, binds the student's other functions where the engine has gaps. Elsewhere does nothing.

    Raises CourseError naming the file that cannot be used.
    """
    for exercise in course.exercises:
        if exercise is not but and (folder / exercise.file).is_file() and find(exercise.target).is_gap:
            bind(exercise.target, _load(exercise, folder))


def _load(exercise: Exercise, folder: Path) -> Callable:
    path = (folder / exercise.file).absolute()  # as tracebacks name it
    failure = look_at(exercise, path)
    if failure is None:
        try:
            return load_function(exercise, path)
        except Exception as error:
            failure = describe(error, exercise, path, "")
    raise CourseError(f"{folder / exercise.file}: {failure.message}")

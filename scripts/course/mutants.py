"""Mutants: plausible wrong solutions in tests/mutants. Each is a change of the engine's function, so it follows it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.course import Course, Exercise
from nanokv.learn.source import solution, student_file

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "mutants"


@dataclass(frozen=True)
class Mutant:
    """A wrong solution of an exercise: the student's file that holds it, and its fault."""

    exercise: Exercise
    why: str
    text: str


def mutants(course: Course, exercise: Exercise) -> list[Mutant]:
    """All mutants of an exercise. Raises CourseError where one no longer fits the engine's function."""
    (lesson,) = (lesson for lesson in course.lessons if lesson.number == exercise.lesson)
    path = FOLDER / f"{lesson.name}.toml"
    entries = tomllib.loads(path.read_text("utf-8")).get(exercise.id, []) if path.is_file() else []
    return [_mutant(exercise, path, **entry) for entry in entries]


def _mutant(exercise: Exercise, path: Path, why: str, old: str, new: str) -> Mutant:
    source = solution(exercise)
    if source.count(old) != 1:
        count = f"{source.count(old)} times in {exercise.function}"
        raise CourseError(f"{path}: {exercise.id} ({why}): {old!r} occurs {count}, not once")
    return Mutant(exercise, why, student_file(exercise, source.replace(old, new)))

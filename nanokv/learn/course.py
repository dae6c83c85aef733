"""Course: lessons and exercises as lessons/exercises.toml lists them, validated. Reads no code of the engine.

A checkout and an exported tree have the folder `lessons` beside the package; an installed wheel carries exercises.toml
and the public tests inside the package. Hidden tests exist only in a full checkout.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from nanokv.core.check import check_integer
from nanokv.core.errors import CourseError

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package whose functions are the exercises."""


@dataclass(frozen=True)
class Lesson:
    """A lesson. Its exercises share its number and its files of tests."""

    number: int
    name: str
    """The file: lessons/NAME.py; its tests are test_NAME.py in tests_public and in tests_hidden."""
    title: str


@dataclass(frozen=True)
class Exercise:
    """One function to write."""

    id: str
    """"02.1": the first exercise of lesson 2; the student's file is my/02_1.py."""
    target: str
    """Dotted name of the function that is its solution, such as nanokv.cache.pool.PagePool.allocate."""
    title: str
    points: int
    minutes: int
    """An estimate."""
    difficulty: int
    """1 (a formula) to 5 (an evening)."""
    hint: str
    optional: bool = False
    """Whether it may be skipped: no later exercise builds on it."""
    also: tuple[str, ...] = ()
    """Its faster twins: functions of the same signature that it also replaces when the whole engine runs."""

    @property
    def lesson(self) -> int:
        """The number of its lesson."""
        return int(self.id[:2])

    @property
    def file(self) -> str:
        """The name of the student's file."""
        return f"{self.id.replace('.', '_')}.py"

    @property
    def function(self) -> str:
        """The name of the function to write."""
        return self.target.rpartition(".")[2]

    @property
    def test_prefix(self) -> str:
        """How the names of its tests begin."""
        return f"test_{self.id.replace('.', '_')}_"


@dataclass(frozen=True)
class Course:
    """All lessons and exercises, in order.

    folder    the folder of exercises.toml and the tests
    variant   number of this variant of the course; it seeds the random numbers of the public tests
    """

    folder: Path
    variant: int
    lessons: tuple[Lesson, ...]
    exercises: tuple[Exercise, ...]

    def exercise(self, exercise_id: str) -> Exercise:
        """The exercise of this id. Raises CourseError for an unknown one, naming the nearest."""
        for exercise in self.exercises:
            if exercise.id == exercise_id:
                return exercise
        near = get_close_matches(exercise_id, [exercise.id for exercise in self.exercises], n=1, cutoff=0.3)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise CourseError(f"exercise {exercise_id!r}: the course has no such exercise{meant} (nanokv learn list)")

    def of_lesson(self, number: int) -> list[Exercise]:
        """The exercises of a lesson, in order."""
        return [exercise for exercise in self.exercises if exercise.lesson == number]

    def tests(self, kind: str, exercise: Exercise) -> Path:
        """The path of the tests of the exercise's lesson.

        kind   "public", or "hidden": a wheel and an exported tree have no file there
        """
        (lesson,) = (lesson for lesson in self.lessons if lesson.number == exercise.lesson)
        return self.folder / f"tests_{kind}" / f"test_{lesson.name}.py"


@cache
def load_course() -> Course:
    """The course of this checkout, or of the installed package. Raises CourseError."""
    folder = PACKAGE.parent / "lessons"
    if not (folder / "exercises.toml").is_file():
        folder = PACKAGE / "learn" / "course"
    return read_course(folder)


def read_course(folder: Path) -> Course:
    """The course in `folder`. Raises CourseError naming the entry, the field, its value and the allowed ones."""
    path = folder / "exercises.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CourseError(f"{path}: not a readable course ({error})") from None
    for name in data.keys() - {"variant", "lesson", "exercise"}:
        raise CourseError(f"{path}: {name}: expected variant, [[lesson]] and [[exercise]]")
    lessons = tuple(_entry(Lesson, one, path, place) for place, one in enumerate(data.get("lesson", []), 1))
    exercises = tuple(_entry(Exercise, one, path, place) for place, one in enumerate(data.get("exercise", []), 1))
    _check_order(path, lessons, exercises)
    variant = data.get("variant", 0)
    check_integer(CourseError, f"{path}: variant", variant, 0)
    return Course(folder, variant, lessons, exercises)


_KINDS = {"int": int, "str": str, "bool": bool, "tuple[str, ...]": list}


def _entry(kind: type, data: dict[str, Any], path: Path, place: int) -> Any:
    where = f"{path}: {kind.__name__.lower()} {data.get('id', data.get('name', place))}"
    known = {field.name: field for field in fields(kind)}
    for name, value in data.items():
        if name not in known:
            raise CourseError(f"{where}: {name}: unknown field; it has {', '.join(known)}")
        expected = _KINDS[str(known[name].type)]
        if type(value) is not expected:
            raise CourseError(f"{where}: {name}={value!r}: expected {expected.__name__}")
    for name, field in known.items():
        if field.default is MISSING and data.get(name) in (None, ""):
            raise CourseError(f"{where}: {name} is missing")
    entry = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    if isinstance(entry, Exercise):
        _check_exercise(where, entry)
    return entry


def _check_exercise(where: str, exercise: Exercise) -> None:
    if not re.fullmatch(r"\d\d\.\d+", exercise.id):
        raise CourseError(f"{where}: id={exercise.id!r}: expected a lesson's two digits and a number, as 02.1")
    for name in (exercise.target, *exercise.also):
        if not re.fullmatch(r"nanokv(\.\w+){2,}", name):
            raise CourseError(f"{where}: target={name!r}: expected nanokv.module.function")
    for name, most in (("points", 20), ("minutes", 240), ("difficulty", 5)):
        if not 1 <= getattr(exercise, name) <= most:
            raise CourseError(f"{where}: {name}={getattr(exercise, name)}: expected 1 to {most}")


def _check_order(path: Path, lessons: tuple[Lesson, ...], exercises: tuple[Exercise, ...]) -> None:
    numbers = [lesson.number for lesson in lessons]
    if numbers != sorted(set(numbers)):
        raise CourseError(f"{path}: lessons must be in order, each number once; found {numbers}")
    keys = [(exercise.lesson, int(exercise.id[3:])) for exercise in exercises]
    if keys != sorted(set(keys)):
        wrong = next(one.id for one, before, key in zip(exercises[1:], keys, keys[1:], strict=False) if key <= before)
        raise CourseError(f"{path}: exercise {wrong}: exercises must be in order, each id once")
    targets = [exercise.target for exercise in exercises]
    for exercise in exercises:
        if exercise.lesson not in numbers:
            raise CourseError(f"{path}: exercise {exercise.id}: there is no lesson {exercise.lesson}")
        if targets.count(exercise.target) > 1:
            raise CourseError(f"{path}: target={exercise.target!r}: two exercises have it")

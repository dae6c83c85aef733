"""Grading: runs each exercise of a student in a process of its own, over this tree's engine and its hidden tests.

The public tests are worth half of an exercise's points, the hidden ones the other half. The seed of the hidden tests
comes from NANOKV_GRADER_SEED, which a class should not know.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from course.choice import choose
from nanokv.core.errors import CourseError
from nanokv.learn.checking import check
from nanokv.learn.course import Course, Exercise, load_course

AT_ONCE = 2


@dataclass(frozen=True)
class Graded:
    """The result of one exercise. status: "passed", "public" (the hidden tests fail), "failed" or "missing"."""

    id: str
    title: str
    status: str
    score: float
    max_score: int
    message: str
    seconds: float


def grade(folder: Path, as_json: bool, gradescope: Path | None, variant: int | None, numbers: str | None) -> None:
    """Grades, prints a table or JSON, writes the Gradescope file.

    folder             the student's: it, or the folder `my` in it, has the files
    gradescope         path of a results file for Gradescope, or None
    variant, numbers   those of the export; None: all exercises of this tree
    Raises             CourseError where `folder` is none, or the seed, a lesson or the variant is invalid
    """
    if not folder.is_dir():
        raise CourseError(f"{folder}: not a folder")
    course, seed, start = load_course(), grader_seed(), time.monotonic()
    if variant is not None or numbers is not None:
        exercises = tuple(choose(course, variant or 0, numbers))
        course = replace(course, variant=variant or course.variant, exercises=exercises)
    mine = folder / "my" if (folder / "my").is_dir() else folder
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda one: grade_one(course, one, mine, seed), course.exercises))
    score, most = sum(row.score for row in rows), sum(row.max_score for row in rows)
    if gradescope is not None:
        gradescope.write_text(json.dumps(_gradescope(rows), indent=1) + "\n", "utf-8")
    if as_json:
        report = {"command": "grade", "folder": str(folder), "seed": seed, "hidden": _has_hidden(course)}
        report |= {"score": score, "max_score": most, "seconds": round(time.monotonic() - start, 1)}
        click.echo(json.dumps(report | {"rows": [asdict(row) for row in rows]}))
        return
    for row in rows:
        click.echo(f"{row.id}  {row.status:8} {row.score:4g} of {row.max_score:2}  {row.title}  {row.message}".rstrip())
    click.echo(f"{score:g} of {most} points, {time.monotonic() - start:.0f} s")
    if not _has_hidden(course):
        click.echo("this tree has no hidden tests: public points only, half of all")


def grader_seed() -> int:
    """The seed of the hidden tests, from NANOKV_GRADER_SEED. Raises CourseError for a text that is no number."""
    text = os.environ.get("NANOKV_GRADER_SEED", "0")
    if not text.isdecimal():
        raise CourseError(f"NANOKV_GRADER_SEED={text!r}: expected an integer of at least 0")
    return int(text)


def grade_one(course: Course, exercise: Exercise, folder: Path, seed: int) -> Graded:
    """Grades one exercise. Failures and exceptions of the student's file are in the row."""
    if not (folder / exercise.file).is_file():
        return Graded(exercise.id, exercise.title, "missing", 0, exercise.points, "", 0.0)
    hidden = course.tests("hidden", exercise).is_file()
    outcome = check(
        course, exercise, folder, ("public", "hidden") if hidden else ("public",), hidden_seed=seed, offline=True
    )
    public, whole = "public" in outcome.passed, "hidden" in outcome.passed
    status = "passed" if whole or (public and not hidden) else "public" if public else "failed"
    score = exercise.points * (0.5 * public + 0.5 * whole)
    failure = outcome.failure
    message = "" if failure is None else " ".join(filter(None, [failure.test and f"{failure.test}:", failure.message]))
    return Graded(exercise.id, exercise.title, status, score, exercise.points, message, round(outcome.seconds, 2))


def _has_hidden(course: Course) -> bool:
    return all(course.tests("hidden", exercise).is_file() for exercise in course.exercises)


def _gradescope(rows: list[Graded]) -> dict[str, Any]:
    """Two tests per exercise: the public one is visible at once, the hidden one after publication."""
    tests = []
    for row in rows:
        passed_public, half = row.status in ("passed", "public"), row.max_score / 2
        public = {"name": f"{row.id} {row.title}", "score": half if passed_public else 0, "max_score": half}
        public |= {"visibility": "visible", "output": "" if passed_public else row.message or row.status}
        hidden = {"name": f"{row.id} hidden", "score": max(0.0, row.score - half), "max_score": half}
        hidden |= {"visibility": "after_published", "output": row.message if row.status == "public" else ""}
        tests += [public, hidden]
    return {"score": sum(row.score for row in rows), "output": "nanokv course", "tests": tests}

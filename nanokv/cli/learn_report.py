"""Prints the result of a check, the totals and the next exercise, for `nanokv learn` and `nanokv learn watch`."""

from __future__ import annotations

import click

from nanokv.learn.checking import check
from nanokv.learn.course import Course, Exercise, Lesson
from nanokv.learn.job import Failure
from nanokv.learn.progress import MY, Progress
from nanokv.learn.source import find, student_file

FIRST_RUN = "not written yet: a first check fails, and should"
ALL_PASSED = "all public checks passed. Your engine: nanokv chat --mine"


def check_and_report(course: Course, exercise: Exercise) -> bool:
    """Runs the public checks, prints and records their result. Returns whether they passed."""
    progress = Progress(MY)
    outcome = check(course, exercise, MY)
    failure, passed = outcome.failure, outcome.failure is None
    progress.note(exercise, passed)
    if outcome.printed.strip():
        lines = outcome.printed.strip().splitlines()
        more = f"\n  ... and {len(lines) - 10} lines more" if len(lines) > 10 else ""
        click.echo("your file printed:\n" + "\n".join(f"  {line}" for line in lines[:10]) + more)
    if failure is None:
        click.echo(f"{exercise.id} {exercise.title}: public checks passed ({outcome.seconds:.1f} s)")
        if not find(exercise.target).is_gap:
            click.echo(f"the engine's own, to compare: nanokv learn solution {exercise.id}")
        print_next(course, progress)
    else:
        _print_failure(exercise, failure)
    return passed


def _print_failure(exercise: Exercise, failure: Failure) -> None:
    if failure.kind == "todo":
        click.echo(f"{exercise.id} {exercise.title}: {FIRST_RUN}")
        click.echo(f"  your file: {MY / exercise.file}")
    else:
        click.echo(f"{exercise.id} {exercise.title}: not yet")
        if failure.test:
            click.echo(f"  check:  {failure.test}")
        click.echo(f"  found:  {MY / exercise.file}: {failure.message}")
    click.echo(f"  hint:   {exercise.hint}")


def print_totals(course: Course, progress: Progress) -> None:
    """Passed exercises and points of the whole course, as one line."""
    done = [one for one in course.exercises if progress.status(one) == "passed"]
    points = f"{sum(one.points for one in done)} of {sum(one.points for one in course.exercises)} points"
    click.echo(f"{len(done)} of {len(course.exercises)} exercises passed, {points}")


def print_next(course: Course, progress: Progress) -> None:
    """The next exercise and its command, after its lesson where that is new."""
    one = progress.current(course)
    if one is None:
        click.echo(ALL_PASSED)
        return
    (lesson,) = (lesson for lesson in course.lessons if lesson.number == one.lesson)
    if progress.status(one) == "new":
        if one is course.of_lesson(one.lesson)[0]:
            click.echo(f"next lesson: {_how_to_take(lesson, one)}   {lesson.title}")
        click.echo(f"next: nanokv learn start {one.id}   {one.title}, about {one.minutes} minutes")
    else:
        click.echo(f"next: nanokv learn check {one.id}   {one.title}, in {MY / one.file}")


def _how_to_take(lesson: Lesson, first: Exercise) -> str:
    """A lesson runs in a whole engine. In one with gaps it is read first, and runs once they are filled."""
    file = f"lessons/{lesson.name}.py"
    return f"read {file}" if find(first.target).is_gap else f"python {file}"


def write_fresh(exercise: Exercise) -> None:
    """Writes the exercise's file as `nanokv learn start` does, over an existing one."""
    MY.mkdir(exist_ok=True)
    (MY / exercise.file).write_text(student_file(exercise), "utf-8")

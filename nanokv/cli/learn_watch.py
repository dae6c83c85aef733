"""nanokv learn watch: polls the file twice a second, checks it after each save, and reads five keys."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from nanokv.cli.learn_report import ALL_PASSED, check_and_report, write_fresh
from nanokv.core.errors import CourseError
from nanokv.learn.course import Course, Exercise
from nanokv.learn.progress import MY, Progress

POLL_S = 0.5
msvcrt: Any = import_module("msvcrt") if sys.platform == "win32" else None
"""The keyboard of Windows, which has no termios."""
KEYS = "keys: n next, h hint, l list, r run, q quit"


def watch(course: Course, exercise: Exercise | None) -> None:
    """Watches an exercise until the key q. None: every exercise has passed, and nothing is watched.

    Polling works on network drives and in containers too. Raises CourseError where stdin is no terminal, with the
    command that checks by hand.
    """
    if exercise is None:
        click.echo(ALL_PASSED)
        return
    if not sys.stdin.isatty():
        raise CourseError(f"watch needs a terminal; by hand: nanokv learn check {exercise.id}")
    with _single_keys():
        seen = _open(exercise)
        while True:
            key = _key(POLL_S)
            if key == "q":
                return
            if key == "n":
                later = course.exercises[course.exercises.index(exercise) + 1 :]
                if not later:
                    click.echo("this is the last exercise")
                    continue
                exercise = later[0]
                seen = _open(exercise)
            elif key == "h":
                click.echo(f"hint: {exercise.hint}")
            elif key == "l":
                for one in course.of_lesson(exercise.lesson):
                    here = ">" if one is exercise else " "
                    click.echo(f"{here} {one.id}  {one.title}  ({Progress(MY).status(one)})")
            changed = _saved_at(exercise)
            if key == "r" or changed != seen:
                seen = changed
                click.clear()
                _check(course, exercise)


def _open(exercise: Exercise) -> int | None:
    """Starts a new exercise and prints the watched file. Returns the file's time of change."""
    path = MY / exercise.file
    if not path.exists():
        write_fresh(exercise)
    click.echo(f"watching {path}   {exercise.title}\n{KEYS}")
    return _saved_at(exercise)


def _check(course: Course, exercise: Exercise) -> None:
    try:
        check_and_report(course, exercise)
    except CourseError as error:  # an editor may replace the file by removing it first
        click.echo(str(error))
    click.echo(KEYS)


def _saved_at(exercise: Exercise) -> int | None:
    path = MY / exercise.file
    return path.stat().st_mtime_ns if path.exists() else None


def _key(seconds: float) -> str | None:
    """A key pressed within this time, else None."""
    if msvcrt is not None:
        return _key_of_windows(seconds)
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 1).decode("ascii", "ignore").lower() if ready else None


def _key_of_windows(seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    while not msvcrt.kbhit():
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S / 10)
    return msvcrt.getwch().lower()


@contextmanager
def _single_keys() -> Iterator[None]:
    """Inside the block each key arrives without Enter; the terminal's modes are restored afterwards."""
    if msvcrt is not None:
        yield  # keys come one by one in any case
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

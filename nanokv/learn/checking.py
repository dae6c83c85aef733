"""A check: the student's file looked at, then run in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.course import PACKAGE, Course, Exercise
from nanokv.learn.job import CheckJob, Failure
from nanokv.learn.source import look_at

CPU_LIMIT = 10
"""Seconds of processor time that a check may take, imports included; a sound one takes two. What else the machine does
counts for nothing."""
WALL_LIMIT = 120.0
"""Seconds after which a check is ended although it does not compute: it waits for something."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    passed    kinds of tests that passed whole: "public", "hidden"
    failure   the first failure, or None
    printed   what the student's file printed
    """

    passed: tuple[str, ...]
    failure: Failure | None
    printed: str
    seconds: float


def student_path(exercise: Exercise, folder: Path) -> Path:
    """The student's file. Raises CourseError where it was not started."""
    path = folder / exercise.file
    if not path.is_file():
        raise CourseError(f"{path}: not there; nanokv learn start {exercise.id} writes it")
    return path


def check(
    course: Course,
    exercise: Exercise,
    folder: Path,
    kinds: Sequence[str] = ("public",),
    hidden_seed: int = 0,
    offline: bool = False,
    cpu_limit: int = CPU_LIMIT,
) -> Outcome:
    """Runs the tests of `kinds` against the student's file, in this order, up to the first failure.

    Raises CourseError where the file was not started, or this tree has no such tests.
    """
    path, start = student_path(exercise, folder), time.monotonic()
    failure = look_at(exercise, path)
    if failure is not None:
        return Outcome((), failure, "", time.monotonic() - start)
    files = {"public": course.public_tests(exercise), "hidden": course.hidden_tests(exercise)}
    for kind in kinds:
        if not files[kind].is_file():
            raise CourseError(f"{files[kind]}: not there, so exercise {exercise.id} has no {kind} tests here")
    seeds = {"public": course.variant, "hidden": hidden_seed}
    with tempfile.TemporaryDirectory() as scratch:
        result, printed = Path(scratch, "result.json"), Path(scratch, "printed")
        job = CheckJob(
            exercise.id, str(folder.resolve()), [[kind, str(files[kind])] for kind in kinds],
            [seeds[kind] for kind in kinds], offline, cpu_limit, str(result),
        )  # fmt: skip
        ended = _run(job, printed)
        said = printed.read_text("utf-8", "replace")
        state = json.loads(result.read_text("utf-8")) if result.is_file() else {"stage": "start", "passed": []}
    if state["stage"] == "done":
        failure = Failure(**state["failure"]) if state["failure"] else None
    else:
        failure = _cut_short(state["stage"], ended, cpu_limit, said)
    return Outcome(tuple(state["passed"]), failure, said, time.monotonic() - start)


def _run(job: CheckJob, printed: Path) -> int | None:
    """The worker's exit code, or None where it had to be ended. What it started ends with it in any case."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # -P: not from the current folder, which may be a student's tree with another nanokv in it.
    command = [sys.executable, "-P", "-m", "nanokv.learn.check_process", json.dumps(asdict(job))]
    with open(printed, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(WALL_LIMIT)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # ended by itself, and has left nobody behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _cut_short(stage: str, ended: int | None, cpu_limit: int, said: str) -> Failure:
    kind, _, test = stage.partition(": ")
    where = {"start": "before your file was run", "load": "while your file was being loaded"}.get(kind, "")
    if ended == -signal.SIGXCPU:
        spent = f"stopped after {cpu_limit} s of processor time {where}".rstrip()
        return Failure("timeout", f"{spent}: an endless loop?", test)
    if ended is None:
        return Failure("timeout", f"stopped after {WALL_LIMIT:g} s of waiting {where}".rstrip(), test)
    reason = said.strip().splitlines()[-1:] if kind == "start" else []  # of ours: something is not installed
    return Failure("error", ": ".join([f"the process ended with exit code {ended} {where}".rstrip(), *reason]), test)

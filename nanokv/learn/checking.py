"""A check: inspects the student's file, then runs its tests in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanokv.core.errors import CourseError
from nanokv.learn.course import PACKAGE, Course, Exercise
from nanokv.learn.job import CheckJob, Failure, read_record
from nanokv.learn.source import look_at

CPU_LIMIT = 10
"""Seconds of processor time that a check may take, imports included; a sound one takes two. Other load on the machine
does not count."""
WALL_LIMIT = 120.0
"""Seconds after which a check that computes nothing is killed: it waits for something."""


@dataclass(frozen=True)
class Outcome:
    """The result of a check.

    passed    kinds of tests that passed completely: "public", "hidden"
    failure   the first failure, or None
    printed   prints of the student's file
    seconds   wall-clock time of the check
    """

    passed: tuple[str, ...]
    failure: Failure | None
    printed: str
    seconds: float


def student_path(exercise: Exercise, folder: Path) -> Path:
    """The student's file. Raises CourseError where the exercise has not been started."""
    path = folder / exercise.file
    if not path.is_file():
        raise CourseError(f"{path}: no such file; nanokv learn start {exercise.id} writes it")
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

    folder       the student's files
    kinds        "public", "hidden"
    hidden_seed  seed of the hidden tests; public ones take the course's variant
    offline      whether the process may open no connection
    cpu_limit    seconds of processor time
    Raises       CourseError where the exercise has not been started, or this tree has no such tests
    """
    path, start = student_path(exercise, folder), time.monotonic()
    failure = look_at(exercise, path)
    if failure is not None:
        return Outcome((), failure, "", time.monotonic() - start)
    files = {kind: course.tests(kind, exercise) for kind in kinds}
    for kind, file in files.items():
        if not file.is_file():
            raise CourseError(f"{file}: no such file: this tree has no {kind} tests of exercise {exercise.id}")
    seeds = {"public": course.variant, "hidden": hidden_seed}
    with tempfile.TemporaryDirectory() as scratch:
        result, printed = Path(scratch, "result.json"), Path(scratch, "printed")
        job = CheckJob(
            exercise.id, str(folder.resolve()), [[kind, str(file)] for kind, file in files.items()],
            [seeds[kind] for kind in kinds], offline, cpu_limit, str(result), secrets.token_hex(),
        )  # fmt: skip
        ended = _run(job, printed)
        said = printed.read_text("utf-8", "replace")
        state: dict[str, Any] = {"stage": "start", "passed": []}
        if result.is_file():
            state = read_record(job) or {"stage": "forged", "passed": []}
    if state["stage"] == "forged":
        failure = Failure("file", "the result of the check was written by other code than the check")
    elif state["stage"] == "done":
        failure = Failure(**state["failure"]) if state["failure"] else None
    else:
        failure = _cut_short(state["stage"], ended, cpu_limit, said)
    return Outcome(tuple(state["passed"]), failure, said, time.monotonic() - start)


def _run(job: CheckJob, printed: Path) -> int | None:
    """The exit code of the check's process; None where it was killed. Its own child processes end with it."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # -P leaves the current folder out of sys.path: it may be a student's tree with another nanokv in it.
    command = [sys.executable, "-P", "-m", "nanokv.learn.check_process"]
    with open(printed, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(asdict(job)).encode(), WALL_LIMIT)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_group(process)
            process.wait()


def _kill_group(process: subprocess.Popen) -> None:
    """Ends a process and the children that it left behind; on Windows, which has no process groups, the process."""
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with suppress(ProcessLookupError):  # the process has ended and left no child behind
        os.killpg(process.pid, signal.SIGKILL)


def _cut_short(stage: str, ended: int | None, cpu_limit: int, said: str) -> Failure:
    kind, _, test = stage.partition(": ")
    where = {"start": "before your file was run", "load": "while your file was being loaded"}.get(kind, "")
    if ended is not None and -ended == getattr(signal, "SIGXCPU", None):
        spent = f"stopped after {cpu_limit} s of processor time {where}".rstrip()
        return Failure("timeout", f"{spent}: an endless loop?", test)
    if ended is None:
        return Failure("timeout", f"stopped after {WALL_LIMIT:g} s of waiting {where}".rstrip(), test)
    reason = said.strip().splitlines()[-1:] if kind == "start" else []  # the engine's import: a package is missing
    return Failure("error", ": ".join([f"the process ended with exit code {ended} {where}".rstrip(), *reason]), test)

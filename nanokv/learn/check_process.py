"""The process of one check: patches the engine with the student's function, runs the tests, writes a result file.

checking.py starts it as `python -m nanokv.learn.check_process` and writes the fields of `CheckJob` to its stdin, as
JSON. Prints of the student's file go to stdout, up to a limit. Each stage is written to the result file as it begins,
so a process that is killed has said how far it came.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from nanokv.core.errors import CourseError
from nanokv.learn.job import CheckJob, Failure, write_record

MOST_PRINTED = 4000
"""Characters of the student's prints that are kept."""


class _Limited:
    """A text stream that drops what comes after the limit: a print in an endless loop fills no disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._left = stream, MOST_PRINTED

    def write(self, text: str) -> int:
        if self._left > 0:
            self._stream.write(text[: self._left])
            self._stream.flush()
            self._left -= len(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        raise PermissionError("a graded exercise opens no connection")


def _limit_processor_time(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit; there the limit of wall-clock time in checking.py ends a loop
        return
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


def main(job: CheckJob) -> None:
    """Runs the check and writes the result file. Limits processor time of the whole process, and its network."""
    assert sys.__stdout__ is not None  # checking.py opens it
    sys.stdout = sys.stderr = _Limited(sys.__stdout__)
    _limit_processor_time(job.cpu_limit)
    if job.offline:
        sys.addaudithook(_refuse_network)
    state: dict[str, Any] = {"stage": "start", "passed": [], "failure": None}

    def reached(stage: str) -> None:
        state["stage"] = stage
        write_record(job, state)

    gc.disable()  # an import makes no garbage, and looking for it takes a fifth of the import's time
    import torch

    gc.freeze()  # later collections skip what the import made
    gc.enable()
    from nanokv.learn.course import load_course
    from nanokv.learn.mine import fill_gaps
    from nanokv.learn.patching import patch, patch_gaps
    from nanokv.learn.running import describe, load_function, run_tests

    torch.set_num_threads(1)
    course = load_course()
    exercise, folder = course.exercise(job.exercise), Path(job.mine)
    path = folder / exercise.file
    # The gaps come before the student's file is run, so that the file imports gaps and no solutions.
    patch_gaps(exercise)
    reached("load")
    failure: Failure | None = None
    try:
        fill_gaps(course, folder, exercise)
        patch(exercise.target, load_function(exercise, path))
    except CourseError as error:  # another file of the student's, one that fills a gap
        failure = Failure("needs", str(error))
    except BaseException as error:
        failure = describe(error, exercise, path, "")
    else:
        for (kind, tests), seed in zip(job.tests, job.seeds, strict=True):

            def begin(words: str, kind: str = kind) -> None:
                reached(f"{kind}: {words}")

            try:
                failure = run_tests(exercise, Path(tests), seed, path, begin)
            except BaseException as error:  # a SystemExit of the student's file is a failure like any other
                failure = describe(error, exercise, path, state["stage"].partition(": ")[2])
            if failure is not None:
                break
            state["passed"].append(kind)
    state["failure"] = None if failure is None else asdict(failure)
    reached("done")


if __name__ == "__main__":
    main(CheckJob(**json.loads(sys.stdin.read())))
    os._exit(0)  # the result is written: no need to tear modules down or to join threads that the file left behind

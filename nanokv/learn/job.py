"""What a check's process is given, and the failure it gives back. Both travel as JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckJob:
    """The job of one check's process.

    exercise   id of the exercise
    mine       folder of the student's files
    tests      [kind, path] of each test file: kind is "public" or "hidden"
    seeds      the seed of each test file
    offline    whether the process may open no connection
    cpu_limit  seconds of processor time after which the process ends
    result     the file to write to
    """

    exercise: str
    mine: str
    tests: list[list[str]]
    seeds: list[int]
    offline: bool
    cpu_limit: int
    result: str


@dataclass(frozen=True)
class Failure:
    """Why an exercise is not passed.

    kind      "todo": nothing written yet; "needs": another exercise comes first; "wrong": a test disagrees; "error":
              an exception; "file": the student's file cannot be used; "timeout"
    message   one line
    test      what was tested, in words; "" where no test had begun
    """

    kind: str
    message: str
    test: str = ""

"""The job that a check's process receives, and the failure that it returns. Both travel as JSON."""

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
    """Why an exercise has not passed.

    kind      "todo": nothing written yet; "needs": another exercise comes first; "wrong": a test disagrees; "error":
              an exception; "file": the student's file cannot be used; "timeout"
    message   one line
    test      the test in words; "" where none had begun
    """

    kind: str
    message: str
    test: str = ""

"""The job that a check's process receives, and the record that it returns. Both travel as JSON.

The job comes through stdin, with a fresh key, and is nowhere else: not in the command line, not in the environment.
Records are signed with that key, so that a student's file that finds the result file cannot write one. (A file that
searches the memory of its own process still can.)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    key        signs what is written, in hexadecimal
    """

    exercise: str
    mine: str
    tests: list[list[str]]
    seeds: list[int]
    offline: bool
    cpu_limit: int
    result: str
    key: str


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


def write_record(job: CheckJob, record: dict[str, Any]) -> None:
    """Replaces the result file by a signed record, whole or not at all."""
    text, aside = json.dumps(record), Path(f"{job.result}.new")
    aside.write_text(f"{_signature(job, text)}\n{text}", "utf-8")
    os.replace(aside, job.result)


def read_record(job: CheckJob) -> dict[str, Any] | None:
    """The last record of a check; None where the result file holds anything else."""
    signature, _, text = Path(job.result).read_text("utf-8", "replace").partition("\n")
    return json.loads(text) if hmac.compare_digest(signature.encode(), _signature(job, text).encode()) else None


def _signature(job: CheckJob, text: str) -> str:
    return hmac.new(bytes.fromhex(job.key), text.encode(), hashlib.sha256).hexdigest()

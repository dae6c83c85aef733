"""Runs lessons, draws their figures, turns their py:percent source into notebooks. Same source, same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.core.spin import bounded

ROOT = Path(__file__).resolve().parents[2]
LESSONS = ROOT / "lessons"
IMAGES, NOTEBOOKS = LESSONS / "img", LESSONS / "ipynb"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
ROUNDING = 1e-5
"""Points by which a coordinate may differ: the last of its six decimals depends on the CPU's rounding."""
FIRST_CELL = 'import sys\n\nsys.path.insert(0, "..")  # where the lessons\' own helpers lie'


def lessons(names: Sequence[str] = ()) -> list[Path]:
    """The lessons whose files' names begin with one of `names`; all without. Raises CourseError for an unknown one."""
    paths = sorted(LESSONS.glob("[0-9][0-9]_*.py"))
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            raise CourseError(f"lesson {name!r}: expected one of {', '.join(path.stem[:2] for path in paths)}")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def run(path: Path, mine: bool = False, images: Path | None = None, quiet: bool = False) -> str:
    """Runs a lesson from the root of the tree. Returns its output where `quiet`, else "".

    mine     with the student's functions in the engine
    images   folder for its figures, instead of lessons/img
    quiet    collect its output instead of showing it
    Raises   CourseError with its last line where it fails
    """
    command = [sys.executable, *(["-m", "course.with_mine"] if mine else []), str(path)]
    environment = bounded(os.environ) | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    if images is not None:
        environment["NANOKV_LESSONS_IMG"] = str(images)
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if quiet else {}
    ended = subprocess.run(command, cwd=ROOT, env=environment, **out)
    if ended.returncode:
        last = (ended.stdout or "").strip().splitlines()[-1:]
        raise CourseError(f"{path.name} ended with exit code {ended.returncode} {' '.join(last)}".rstrip())
    return ended.stdout or ""


def build() -> None:
    """Runs every lesson, which draws its figures, and writes its notebook."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for path in lessons():
        run(path, quiet=True)
        target = NOTEBOOKS / f"{path.stem}.ipynb"
        target.write_text(notebook(path), "utf-8")
        print(f"{path.name} -> {target.relative_to(ROOT)}", flush=True)


def run_and_check() -> list[str]:
    """Runs every lesson with another folder for figures, compares figures and notebooks. Prints and returns faults."""
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in lessons():
            start, found = time.monotonic(), []
            try:
                run(path, images=Path(scratch), quiet=True)
            except CourseError as error:
                found.append(str(error))
            target = NOTEBOOKS / f"{path.stem}.ipynb"
            if not target.is_file() or target.read_text("utf-8") != notebook(path):
                found.append(f"{target.relative_to(ROOT)} is not current: python scripts/lessons.py build")
            found += other_figures(path.stem, Path(scratch))
            print(f"{'ok' if not found else 'FAULT':6} {path.name} ({time.monotonic() - start:.1f} s)", flush=True)
            for fault in found:
                print(f"       {fault}")
            faults += found
    known = {path.stem for path in lessons()}
    for path in [*NOTEBOOKS.glob("*.ipynb"), *IMAGES.glob("*.svg")]:
        if re.sub(r"-\d+$", "", path.stem) not in known:
            faults.append(f"{path.relative_to(ROOT)} belongs to no lesson")
            print(f"FAULT  {faults[-1]}")
    return faults


def other_figures(lesson: str, drawn: Path) -> list[str]:
    """Figures of a lesson that differ from those in lessons/img, or exist on one side only."""
    names = {path.name for folder in (IMAGES, drawn) for path in folder.glob(f"{lesson}-*.svg")}
    return [
        f"lessons/img/{name} differs from the lesson's figure: python scripts/lessons.py build"
        for name in sorted(names)
        if not (IMAGES / name).is_file()
        or not (drawn / name).is_file()
        or not same_figure((IMAGES / name).read_text("utf-8"), (drawn / name).read_text("utf-8"))
    ]


def same_figure(one: str, other: str) -> bool:
    """Whether two SVG texts are equal but for the rounding of their numbers."""
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=False)
    return NUMBER.split(one) == NUMBER.split(other) and all(abs(float(a) - float(b)) <= ROUNDING for a, b in pairs)


def cells(source: str) -> list[tuple[str, str]]:
    """The cells of a py:percent text: ("markdown" or "code", source)."""
    found: list[tuple[str, list[str]]] = []
    for line in source.splitlines():
        marker = re.fullmatch(r"# %%( \[markdown\])?\s*", line)
        if marker:
            found.append(("markdown" if marker[1] else "code", []))
        elif found:
            found[-1][1].append(line)
    return [(kind, _text(kind, lines)) for kind, lines in found]


def _text(kind: str, lines: list[str]) -> str:
    if kind == "markdown":
        lines = [re.sub(r"^# ?", "", line) for line in lines]
    return "\n".join(lines).strip("\n")


def notebook(path: Path) -> str:
    """The lesson as a notebook without outputs: nbformat 4.5, the same bytes for the same source.

    Links and pictures of a lesson are relative to the folder `lessons`, the parent of the notebooks' folder.
    """
    found = cells(path.read_text("utf-8"))
    found.insert(1, ("code", FIRST_CELL))
    made = []
    for place, (kind, source) in enumerate(found):
        if kind == "markdown":
            source = re.sub(r"\]\((?!https?:|#)", "](../", source)
        cell = {
            "cell_type": kind,
            "id": hashlib.sha1(f"{path.stem} {place}".encode()).hexdigest()[:12],
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    whole = {
        "cells": made,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"

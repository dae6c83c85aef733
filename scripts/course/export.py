"""Export: a tree for a class, with gaps where the exercises are; no solutions, no hidden tests, a fresh history."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from course.choice import choose
from nanokv.core.errors import CourseError
from nanokv.learn.course import Course, Exercise, load_course, read_course
from nanokv.learn.source import body_start, find, function_in

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = (
    ".ci/", ".github/", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "COURSE.md",
    "Makefile", "README.md", "docs/benchmarks", "lessons/STUDENT.md", "lessons/exercises.toml", "lessons/tests_hidden/",
    "tests/",
)  # fmt: skip
FOR_STUDENTS = ("__init__", "choice", "grade", "notebooks", "prefill_with_mine", "with_mine")
SCRIPTS = ("scripts/lessons.py", *(f"scripts/course/{name}.py" for name in FOR_STUDENTS))
GIT_USER = ("-c", "user.name=nanokv course", "-c", "user.email=course@example.invalid")


def export(out: Path, variant: int = 0, numbers: str | None = None) -> str:
    """Writes the tree. Returns a line that sums it up.

    out       the folder to write; it does not exist yet, or is empty
    variant   above 0: three exercises of each lesson, drawn by this number
    numbers   lessons whose functions become gaps, such as "1-4"; None: all
    Raises    CourseError where `out` is not empty, a lesson does not exist, or this tree has gaps itself
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CourseError(f"{out}: exists already; give a folder that does not exist")
    course = load_course()
    chosen = choose(course, variant, numbers)
    for name in _tracked():
        _copy(name, out)
    gaps: dict[Path, dict[str, str]] = defaultdict(dict)
    for exercise in chosen:
        found = find(exercise.target)
        if found.is_gap:
            raise CourseError(f"exercise {exercise.id}: this tree has gaps itself; export from a full one")
        gaps[found.path][found.qualname] = exercise.id
    for path, names in gaps.items():
        (out / path.relative_to(ROOT)).write_text(remove_bodies(path.read_text("utf-8"), names), "utf-8")
    (out / "lessons" / "exercises.toml").write_text(_manifest(chosen, variant), "utf-8")
    (out / "README.md").write_text(_readme(chosen), "utf-8")
    _fresh_history(out)
    points = sum(one.points for one in chosen)
    return f"{out}: {len(chosen)} exercises, {points} points, variant {variant}"


def remove_bodies(source: str, gaps: Mapping[str, str]) -> str:
    """The source with the body of each function in `gaps` (qualname -> exercise id) replaced by a gap.

    The syntax tree finds a body, and whole lines replace it, so everything else stays the same byte for byte, comments
    included:

        def allocate(self, num_pages):          def allocate(self, num_pages):
            \"\"\"What it does.\"\"\"                     \"\"\"What it does.\"\"\"
            pages = [...]                  ->       from nanokv.core.errors import ExerciseTODO
            return pages
                                                    raise ExerciseTODO("02.1")

    Raises CourseError where there is no such function.
    """
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    found = []
    for qualname, exercise_id in gaps.items():
        node = function_in(tree, qualname)
        if node is None:
            raise CourseError(f"{qualname}: there is no such function")
        found.append((node, exercise_id))
    for node, exercise_id in sorted(found, key=lambda one: -one[0].lineno):
        first = body_start(node, lines)
        indent = " " * (node.col_offset + 4)
        lines[first - 1 : node.end_lineno] = [
            f"{indent}from nanokv.core.errors import ExerciseTODO\n",
            "\n",
            f'{indent}raise ExerciseTODO("{exercise_id}")\n',
        ]
    return "".join(lines)


def _tracked() -> list[str]:
    """The files of this checkout that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        raise CourseError(f"{ROOT}: not a git checkout, from which trees are exported ({listed.stderr.strip()})")
    return sorted({name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()})


def _copy(name: str, out: Path) -> None:
    if name.startswith(LEFT_OUT) or (name.startswith("scripts/") and name not in SCRIPTS):
        return
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / name, target)


def _manifest(chosen: list[Exercise], variant: int) -> str:
    """exercises.toml with the chosen exercises and their lessons only, otherwise unchanged."""
    text = (ROOT / "lessons" / "exercises.toml").read_text("utf-8")
    blocks = re.split(r"(?m)^(?=\[\[)", text)
    ids, numbers = {one.id for one in chosen}, {one.lesson for one in chosen}
    kept = [re.sub(r"(?m)^variant = \d+", f"variant = {variant}", blocks[0])]
    for block in blocks[1:]:
        block = re.sub(r"(?m)^# -- .*\n", "", block).rstrip("\n") + "\n\n"
        lesson, exercise = re.search(r"(?m)^number = (\d+)", block), re.search(r'(?m)^id = "([\d.]+)"', block)
        if (lesson and int(lesson[1]) in numbers) or (exercise and exercise[1] in ids):
            kept.append(block)
    return "".join(kept).rstrip("\n") + "\n"


def _readme(chosen: list[Exercise]) -> str:
    table = ["| exercise | what | points | minutes |", "|---|---|---|---|"]
    table += [
        f"| {one.id} | {one.title}{' (may be skipped)' * one.optional} | {one.points} | {one.minutes} |"
        for one in chosen
    ]
    text = (ROOT / "lessons" / "STUDENT.md").read_text("utf-8")
    return text.replace("EXERCISES", "\n".join(table)).replace("FIRST", chosen[0].id)


def _fresh_history(out: Path) -> None:
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "The course"]):
        done = subprocess.run(["git", *GIT_USER, *command], cwd=out, capture_output=True, text=True)
        if done.returncode:
            raise CourseError(f"{out}: git {command[0]} failed: {done.stderr.strip()}")


# -- the checks of dev-check


def _essence(node: ast.FunctionDef) -> str:
    """A digest of a function's body that does not depend on docstring, layout and comments."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return hashlib.sha256("\n".join(ast.dump(one) for one in body).encode()).hexdigest()


def leaks(course: Course, out: Path) -> Iterator[str]:
    """Solutions anywhere in an exported tree, and files that do not belong there, one line each."""
    solutions = {_essence(find(exercise.target).node): exercise.id for exercise in course.exercises}
    for path in sorted(one for kind in ("*.py", "*.ipynb", "*.md") for one in out.rglob(kind)):
        for node in (node for tree in _trees(path) for node in ast.walk(tree)):
            if isinstance(node, ast.FunctionDef) and (leaked := solutions.get(_essence(node))):
                yield f"{path.relative_to(out)}: {node.name} is the solution of {leaked}"
    for name in ("lessons/tests_hidden", "tests", "COURSE.md"):
        if (out / name).exists():
            yield f"{name} is in an exported tree"
    log = subprocess.run(["git", "log", "--oneline"], cwd=out, capture_output=True, text=True, check=True).stdout
    if len(log.splitlines()) != 1:
        yield "an exported tree has more history than one commit"


def _trees(path: Path) -> Iterator[ast.Module]:
    """The Python of a file: a module, a notebook's code cells, and the fenced blocks of Markdown that are Python."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        yield ast.parse(text)
        return
    codes, prose = [], text
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    codes += re.findall(r"(?ms)^ *```[^\n]*\n(.*?)^ *```", prose)
    for code in codes:
        with suppress(SyntaxError):  # a shell command, a drawing, a magic command of IPython
            yield ast.parse(textwrap.dedent(code))


GAPS = """
import json
from nanokv.learn.course import load_course
from nanokv.learn.running import run_tests
course = load_course()
found = {one.id: run_tests(one, course.tests("public", one), course.variant) for one in course.exercises}
print(json.dumps({key: failure and [failure.kind, failure.message] for key, failure in found.items()}))
"""


def gap_faults(out: Path) -> Iterator[str]:
    """Exercises of an exported tree whose public tests do not fail by a gap, one line each."""
    exported = read_course(out / "lessons")
    done = subprocess.run(
        [sys.executable, "-c", GAPS], cwd=out, env=os.environ | {"PYTHONPATH": str(out)}, capture_output=True, text=True
    )
    if done.returncode:
        yield f"an exported tree cannot run its tests: {done.stderr.strip().splitlines()[-1]}"
        return
    for exercise_id, failure in json.loads(done.stdout).items():
        if failure is None or failure[0] not in ("todo", "needs"):
            yield f"{exercise_id}: in an exported tree its tests give {failure}, not a gap"
    if not exported.exercises:
        yield "an exported tree has no exercises"

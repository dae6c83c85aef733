"""The tool of the course: runs and builds lessons, exports a tree for a class, grades submissions, checks the course.

    python scripts/lessons.py run 02            a lesson, top to bottom; --mine: with your functions in the engine
    python scripts/lessons.py build             figures and notebooks; --check: fails where they are out of date
    python scripts/lessons.py export --out DIR --lessons 1-4 --variant 7
    python scripts/lessons.py grade DIR --json
    python scripts/lessons.py dev-check

COURSE.md explains its use for teachers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the engine of this tree, even if another one is installed

from nanokv.core.errors import CourseError, NanokvError  # noqa: E402


def part(name: str) -> ModuleType:
    """A module of scripts/course. Raises CourseError in an exported tree, which has none."""
    if not (ROOT / "scripts" / "course" / f"{name}.py").is_file():
        raise CourseError("this tree was made for a class: it has no scripts/course")
    return import_module(f"course.{name}")


@click.group(epilog="Example: python scripts/lessons.py run 01")
def main() -> None:
    """Run and build lessons, export a tree for a class, grade, and check the course itself."""


@main.command(epilog="Example: python scripts/lessons.py run 02 --mine")
@click.argument("names", metavar="[NN]...", nargs=-1)
@click.option("--mine", is_flag=True, help="Use the functions of my/ that have passed their checks.")
def run(names: tuple[str, ...], mine: bool) -> None:
    """Run lessons from top to bottom; without NN all of them."""
    notebooks = part("notebooks")
    for path in notebooks.lessons(names):
        notebooks.run(path, mine)


@main.command(epilog="Example: python scripts/lessons.py build --check")
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if a figure or a notebook is out of date.")
def build(check: bool) -> None:
    """Run all lessons, draw their figures, write the notebooks."""
    notebooks = part("notebooks")
    if not check:
        notebooks.build()
    elif notebooks.run_and_check():
        sys.exit(1)


@main.command("export", epilog="Example: python scripts/lessons.py export --out ../class --lessons 1-4 --variant 7")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that does not exist yet.")
@click.option(
    "--variant", default=0, show_default=True, help="Above 0: three exercises a lesson, drawn with this seed."
)
@click.option("--lessons", "numbers", metavar="RANGE", help="Lessons whose functions become gaps, such as 1-4 or 2,4.")
def export_(out: Path, variant: int, numbers: str | None) -> None:
    """Write a tree for students: gaps in place of solutions, the grader, a fresh git history."""
    print(part("export").export(out, variant, numbers))


@main.command(
    epilog="Example: NANOKV_GRADER_SEED=4711 python scripts/lessons.py grade mia --lessons 1-4 --variant 7 --json"
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--gradescope", metavar="F", type=click.Path(path_type=Path), help="Write a Gradescope results file.")
@click.option("--variant", type=int, help="The --variant of the export.")
@click.option("--lessons", "numbers", metavar="RANGE", help="The --lessons of the export.")
def grade(folder: Path, as_json: bool, gradescope: Path | None, variant: int | None, numbers: str | None) -> None:
    """Grade the functions in DIR/my, else in DIR: public tests, and the hidden ones where this tree has them."""
    part("grade").grade(folder, as_json, gradescope, variant, numbers)


@main.command("dev-check", epilog="Example: python scripts/lessons.py dev-check --no-lessons")
@click.option("--no-lessons", is_flag=True, help="Do not run the lessons, which takes minutes.")
def dev_check(no_lessons: bool) -> None:
    """Check that the course is consistent. Exit code 1 if it is not."""
    if part("dev_check").dev_check(without_lessons=no_lessons):
        sys.exit(1)


def call(**options: Any) -> None:
    """Runs the command line. An error is one line."""
    try:
        main(**options)
    except NanokvError as error:
        click.echo(f"lessons.py: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    call(prog_name="lessons.py")

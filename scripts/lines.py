"""Counts the lines of nanokv/, a row for each room: how large each part is, and what a change adds.

python scripts/lines.py                     the working tree
python scripts/lines.py --against v0.1.0    and the difference to a git revision
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tokenize
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("files", "lines", "code", "docstrings")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count(source: str) -> tuple[int, int, int, int]:
    """One file, all its lines, its lines of code, and its lines of docstrings.

    A docstring is a string that stands alone, as below a name too. Code is every other line that is neither blank nor
    a comment.
    """
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    return 1, len(source.splitlines()), len(code - docstrings), len(docstrings)


def by_room(files: Iterable[tuple[str, str]]) -> dict[str, tuple[int, ...]]:
    """The counts of each folder below nanokv/ from (path, source) pairs; those of the files beside them under "."."""
    rooms: dict[str, tuple[int, ...]] = defaultdict(lambda: (0, 0, 0, 0))
    for path, source in files:
        parts = PurePosixPath(path).parts
        room = parts[1] if len(parts) > 2 else "."
        rooms[room] = tuple(map(sum, zip(rooms[room], count(source), strict=True)))
    return rooms


def working_tree() -> list[tuple[str, str]]:
    """(path, source) of each Python file of the package."""
    paths = sorted((ROOT / "nanokv").rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def revision(name: str) -> list[tuple[str, str]]:
    """(path, source) of each Python file of the package at a git revision. Exits where git does not know it."""
    archive = subprocess.run(["git", "archive", name, "nanokv"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f"--against {name}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        return [(one.name, tar.extractfile(one).read().decode()) for one in tar if one.name.endswith(".py")]


def table(now: dict[str, tuple[int, ...]], before: dict[str, tuple[int, ...]] | None = None) -> str:
    """A line for each room, the largest first, and the totals; with `before`, what each number has gained since."""
    none, old, width = (0,) * len(COLUMNS), before or {}, 12 if before is None else 20
    rooms = sorted({*now, *old}, key=lambda room: (-now.get(room, none)[1], room))
    lines = [f"{'room':10}" + "".join(f"{name:>{width}}" for name in COLUMNS)]
    for name, parts in [*((room, [room]) for room in rooms), ("total", rooms)]:
        here, there = ([sum(c.get(part, none)[i] for part in parts) for i in range(len(none))] for c in (now, old))
        gains = ["" if before is None else f"{f'({n - o:+,})':>9}" for n, o in zip(here, there, strict=True)]
        lines.append(f"{name:10}" + "".join(f"{f'{n:,}{gain}':>{width}}" for n, gain in zip(here, gains, strict=True)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", metavar="REV", help="show the difference to this git revision")
    against = parser.parse_args().against
    print(table(by_room(working_tree()), None if against is None else by_room(revision(against))))


if __name__ == "__main__":
    main()

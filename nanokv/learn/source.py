"""The source of exercises: found by name, and put into a file for the student. Works on text; imports no engine."""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path

from nanokv.core.errors import CourseError
from nanokv.learn.course import PACKAGE, Exercise
from nanokv.learn.job import Failure

WRAPPERS = ("property", "cached_property", "staticmethod", "classmethod")


@dataclass(frozen=True)
class Found:
    """A function in its file.

    module     dotted name of its module
    path       file of the module
    qualname   "PagePool.allocate", or "expands" for a function of the module
    source     text of the whole file
    node       the function in the syntax tree
    """

    module: str
    path: Path
    qualname: str
    source: str
    node: ast.FunctionDef

    @property
    def owner(self) -> str | None:
        """Name of its class; None for a function of the module."""
        return self.qualname.rpartition(".")[0] or None

    @property
    def wrapper(self) -> str | None:
        """Its decorator: "property", "staticmethod", ..., or None."""
        names = [one.id for one in self.node.decorator_list if isinstance(one, ast.Name) and one.id in WRAPPERS]
        return names[0] if names else None

    @property
    def text(self) -> str:
        """Its source without decorators, dedented."""
        lines = self.source.splitlines(keepends=True)[self.node.lineno - 1 : self.node.end_lineno]
        return textwrap.dedent("".join(lines))

    @property
    def is_gap(self) -> bool:
        """Whether its body is the gap of an exercise, as in an exported tree."""
        last = self.node.body[-1]
        called = last.exc if isinstance(last, ast.Raise) else None
        return isinstance(called, ast.Call) and getattr(called.func, "id", "") == "ExerciseTODO"


def split_name(target: str) -> tuple[str, Path, str]:
    """The module of a dotted name, its file, and the rest. Raises CourseError where no such module exists."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 1, -1):
        stem = PACKAGE.joinpath(*parts[1:end])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return ".".join(parts[:end]), path, ".".join(parts[end:])
    raise CourseError(f"target={target!r}: there is no such module in {PACKAGE}")


def find(target: str) -> Found:
    """The function of a dotted name. Raises CourseError where there is none."""
    module, path, qualname = split_name(target)
    source = path.read_text("utf-8")
    node = function_in(ast.parse(source), qualname)
    if node is None:
        raise CourseError(f"target={target!r}: {path} has no function {qualname}")
    return Found(module, path, qualname, source, node)


def function_in(tree: ast.Module, qualname: str) -> ast.FunctionDef | None:
    """The function of this name in a module's syntax tree, or None."""
    body = tree.body
    *classes, name = qualname.split(".")
    for owner in classes:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner), [])
    return next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's parameters, with * and ** in their places."""
    given = node.args
    names = [one.arg for one in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else ["*"] if given.kwonlyargs else []
    names += [one.arg for one in given.kwonlyargs]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])


def look_at(exercise: Exercise, path: Path) -> Failure | None:
    """The first fault of a student's file, found without running it: syntax, the function's name, its parameters.

    None where it has no such fault.
    """
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        return Failure("file", f"{line}not valid Python ({getattr(error, 'msg', error)})")
    functions = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    node = functions.get(exercise.function)
    if node is None:
        others = f"; it has {', '.join(functions)}" if functions else ""
        return Failure("file", f"there is no function {exercise.function}{others}")
    got, expected = parameters(node), parameters(find(exercise.target).node)
    if got != expected:
        return Failure(
            "file",
            f"{exercise.function} takes ({', '.join(got)}), the course has ({', '.join(expected)}): "
            f"change the line, or begin again with nanokv learn reset {exercise.id}, which keeps your file",
        )
    return None


def body_start(node: ast.FunctionDef, lines: list[str]) -> int:
    """The first line of the body, counted from 1: after the docstring, with comments before the first statement."""
    if ast.get_docstring(node, clean=False) is not None:
        end = node.body[0].end_lineno
        assert end is not None  # ast.parse sets it
        return end + 1
    line = node.body[0].lineno
    while lines[line - 2].lstrip().startswith("#"):
        line -= 1
    if line == node.lineno:
        raise CourseError(f"{node.name}: a function on one line cannot be an exercise")
    return line


def student_file(exercise: Exercise, body: str | None = None) -> str:
    """The text of a student's file: imports, then `body`.

    body   source of the function; None: its signature and docstring with a TODO, as `nanokv learn start` writes it
    """
    found = find(exercise.target)
    kind = {"property": "a property", "cached_property": "a cached property", "staticmethod": "a static method"}
    what = kind.get(found.wrapper or "", "a method" if found.owner else "a function")
    me = f"; self is a {found.owner}" if found.owner and parameters(found.node)[:1] == ["self"] else ""
    points = "1 point" if exercise.points == 1 else f"{exercise.points} points"
    header = (
        f'"""Exercise {exercise.id}: {exercise.title} ({points}, about {exercise.minutes} minutes).\n\n'
        f"Write {exercise.function}, {what} of {found.module}{me}. Then:\n\n"
        f"    nanokv learn check {exercise.id}\n"
        '"""\n'
    )
    if body is None:
        node, lines = function_in(ast.parse(found.text), found.node.name), found.text.splitlines(keepends=True)
        assert node is not None
        kept = "".join(lines[: body_start(node, lines) - 1])
        body = f'{kept}    # TODO: replace the next line by yours.\n    raise ExerciseTODO("{exercise.id}")\n'
    return f"{header}\nfrom __future__ import annotations\n\n{_imports(found)}\n\n{body}"


def solution_file(exercise: Exercise) -> str:
    """The student's file with the engine's function in it. Raises CourseError where this tree has a gap instead."""
    return student_file(exercise, solution(exercise))


def solution(exercise: Exercise) -> str:
    """Source of the engine's function. Raises CourseError where this tree has a gap instead."""
    found = find(exercise.target)
    if found.is_gap:
        raise CourseError(f"exercise {exercise.id}: this tree holds no solutions")
    return found.text


def _imports(found: Found) -> str:
    """The module's own imports, and imports of the other names that it defines, for the student's file."""
    tree = ast.parse(found.source)
    blocks, names = [], []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (
            isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        ):
            text = ast.get_source_segment(found.source, node)
            assert text is not None  # the node is from this source
            blocks.append(text)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = [one for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
            names += [one.id for one in stored if isinstance(one.ctx, ast.Store) and not one.id.startswith("__")]
    wanted = [name for name in names if name != found.qualname]
    if wanted:
        joined = ", ".join(wanted)
        line = f"from {found.module} import {joined}"
        if len(line) > 120:
            line = f"from {found.module} import (\n" + "".join(f"    {name},\n" for name in wanted) + ")"
        blocks.append(line)
    if "ExerciseTODO" not in found.source or found.is_gap:
        blocks.append("from nanokv.core.errors import ExerciseTODO")
    return "\n".join(blocks) + "\n"

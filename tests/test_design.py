"""The documentation speaks of things that exist."""

import ast
import pkgutil
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DESIGN = (ROOT / "docs/design.md").read_text()
TREE = DESIGN[DESIGN.index("## 2. ") : DESIGN.index("**The law of the stairs.**")]
STAIRS = DESIGN[DESIGN.index("**The law of the stairs.**") : DESIGN.index("## 3. ")]
WALK = DESIGN[DESIGN.index("## 4. ") : DESIGN.index("There is no prefill mode")]
LISTED = ("core", "kernels", "codecs", "codecs/papers", "cache", "models", "engine", "disagg")
"""Rooms whose files the tree names one by one."""
PAGES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "COURSE.md", "lessons/README.md",
    *(f"docs/{name}.md" for name in ("design", "reading", "glossary", "stats", "benchmarks")),
)  # fmt: skip


def named_places(text: str) -> list[tuple[str, str]]:
    """The (file, name) pairs of a text: `file.py:Name`."""
    return sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", text)))


def defined_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef))
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


@cache
def identifiers() -> set[str]:
    """Every identifier in the code of the package."""
    nodes = [node for path in (ROOT / "nanokv").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {getattr(node, field, None) for node in nodes for field in ("name", "id", "attr", "arg")}
    return {name for name in names if isinstance(name, str)}


@pytest.mark.parametrize(("file", "name"), named_places(DESIGN))
def test_the_design_names_existing_functions(file, name):
    paths = [path for path in (ROOT / "nanokv").rglob("*.py") if f"/{path.relative_to(ROOT)}".endswith(f"/{file}")]
    assert any(name in defined_names(ast.parse(path.read_text())) for path in paths)


def test_the_walk_is_not_empty():
    assert len(named_places(WALK)) > 20


def test_each_folder_of_the_package_is_in_the_plan():
    for folder in sorted(path for path in (ROOT / "nanokv").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"{folder.name}/" in TREE, folder


def test_the_plan_names_the_files_that_exist():
    named = set(re.findall(r"\w+\.py", TREE)) - {"NN_name.py", "__init__.py"}
    rooms = {path.name for room in LISTED for path in (ROOT / "nanokv" / room).glob("*.py")} - {"__init__.py"}
    files = {path.name for folder in ("nanokv", "lessons", "scripts") for path in (ROOT / folder).rglob("*.py")}
    assert sorted(rooms - named) == [] and sorted(named - files) == []


def test_the_stairs_are_those_that_import_linter_holds():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    stairs = [line.strip() for line in STAIRS.splitlines() if line.startswith("    ")]
    assert stairs == [layer.replace("nanokv.", "") for layer in contracts[0]["layers"]]


@pytest.mark.parametrize(("page", "rows"), [("glossary", r"^\| (.*?) \|"), ("reading", r"^(.*)$")])
def test_names_in_glossary_and_reading_guide_are_names_in_code(page, rows):
    cells = re.findall(rows, (ROOT / f"docs/{page}.md").read_text(), re.M)
    names = {name for cell in cells for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", cell)}
    parts = {part for name in names if not name.endswith(".py") for part in name.split(".")}
    assert len(parts) > 10 and sorted(parts - identifiers()) == []


def test_every_breakpoint_of_the_reading_guide_is_a_function():
    places = re.findall(r"^b ([\w.]+)$", (ROOT / "docs/reading.md").read_text(), re.M)
    assert len(places) > 10 and all(callable(pkgutil.resolve_name(place)) for place in places)


@pytest.mark.parametrize("page", PAGES)
def test_the_targets_of_relative_links_and_anchors_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors, anchor

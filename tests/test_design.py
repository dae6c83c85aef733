"""Functions, folders and links in docs/design.md and the README exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WALK = re.findall(r"`(nanokv/[\w/]+\.py):([\w.]+)`", (ROOT / "docs/design.md").read_text())


def defined_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef))
    return names


@pytest.mark.parametrize(("file", "name"), WALK)
def test_the_walk_of_one_request_names_existing_functions(file, name):
    assert name in defined_names(ast.parse((ROOT / file).read_text()))


def test_the_walk_is_not_empty():
    assert len(WALK) > 12


def test_each_folder_of_the_package_is_in_the_plan():
    plan = (ROOT / "docs/design.md").read_text()
    for folder in sorted(path for path in (ROOT / "nanokv").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"{folder.name}/" in plan, folder


@pytest.mark.parametrize("page", ["README.md", "docs/design.md", "docs/benchmarks.md", "COURSE.md"])
def test_the_targets_of_relative_links_and_anchors_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors, anchor

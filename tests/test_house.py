"""The shape of the package: the spine of one request, the size of files, and imports without circles."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanokv
from nanokv import SamplingParams
from nanokv.llm import LLM

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanokv"
FILES = sorted(PACKAGE.rglob("*.py"))
SPINE = re.findall(r"^\| \[(nanokv/[\w/]+\.py)\]", (ROOT / "docs/reading.md").read_text(), re.M)
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FILE = 45, 5500, 300


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports: at its top, in a function, or for the type checker alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            children = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (child if child in MODULES else node.module for child in children)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules in which each reaches every other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_the_finder_of_circles_finds_them():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "d"}, "e": {"a"}}
    assert circles(graph) == [["a", "b", "c"], ["d"]]


def test_no_import_circle_exists():
    assert circles({name: set(imports(path)) - {name} for name, path in MODULES.items()}) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_one_idea_of_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES_OF_A_FILE


def test_the_spine_is_small():
    assert len(SPINE) == len(set(SPINE)) <= MOST_FILES
    assert sum(len((ROOT / name).read_text().splitlines()) for name in SPINE) <= MOST_LINES


def test_a_request_with_the_reference_kernels_enters_files_of_the_spine_only():
    """From the text of a prompt to the last token of the answer; twice, so that the second finds the first's pages."""
    entered: set[str] = set()

    def trace(frame, event, _argument) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, stop="no such text")
    with LLM(ROOT / "weights/tiny-gqa", kernels="reference", device="cpu", num_pages=64) as llm:
        sys.setprofile(trace)
        try:
            outputs = [llm.generate("There is a red ball. Omar owns it. " * 4, greedy)[0] for _ in range(2)]
        finally:
            sys.setprofile(None)
    assert outputs[1].cached_tokens > 0 and outputs[0].token_ids == outputs[1].token_ids
    home = Path(nanokv.__file__).parents[1]  # the package may be installed elsewhere
    own = {str(Path(name).relative_to(home)) for name in entered if Path(name).is_relative_to(home / "nanokv")}
    assert sorted(own - set(SPINE)) == []
    assert sorted(set(SPINE) - own) == sorted(READ_NOT_RUN)


READ_NOT_RUN = {
    "nanokv/cache/contract.py",
    "nanokv/kernels/planes.py",
}
"""Files of the spine that such a request does not run: contracts and data, and the family that has built the layers."""


WRITES_HELD = re.compile(r"\.held(\.\w+)?(, [\w.]+)* (=|\+=) |held\.pages\.(append|extend|pop)\(|held\.pages\[.*\] = ")


def test_only_an_implementation_of_the_cache_writes_what_a_request_holds():
    writers = {str(path.relative_to(ROOT)) for path in FILES if WRITES_HELD.search(path.read_text())}
    caches = {"nanokv/disagg/granted_cache.py"} | {name for name in writers if name.startswith("nanokv/cache/")}
    assert writers - caches == {"nanokv/core/request.py"}  # where a request begins: it holds nothing


def test_only_the_driver_steps_an_engine():
    steps = {
        str(path.relative_to(ROOT))
        for path in [*FILES, *(ROOT / "lessons").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
        if re.search(r"engine\.(step|advance)\(", path.read_text())
    }
    assert steps == set()

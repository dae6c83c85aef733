"""scripts/lines.py: what counts as code and as a docstring, and the table."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import lines  # noqa: E402

SOURCE = '''"""A module
of two lines."""

# a comment
NAME = "code"  # behind code
"""What the name means."""


def add(a, b):
    """One line."""
    return (
        a + b

        # a comment inside
    )
'''


def test_code_is_what_is_neither_docstring_nor_comment_nor_blank():
    assert lines.count(SOURCE) == (1, 15, 5, 4)
    assert lines.count("") == (1, 0, 0, 0)


def test_files_are_summed_by_room():
    rooms = lines.by_room([("nanokv/a/x.py", "1\n"), ("nanokv/a/b/y.py", "1\n2\n"), ("nanokv/llm.py", "# no\n")])
    assert rooms == {"a": (2, 3, 3, 0), ".": (1, 1, 0, 0)}


def test_the_table_shows_totals_and_what_each_room_gained():
    now, before = {"a": (1, 1500, 9, 1), "b": (1, 20, 2, 0)}, {"a": (1, 1490, 12, 1), "gone": (1, 5, 5, 0)}
    assert [row.split() for row in lines.table(now).splitlines()] == [
        ["room", "files", "lines", "code", "docstrings"],
        ["a", "1", "1,500", "9", "1"],
        ["b", "1", "20", "2", "0"],
        ["total", "2", "1,520", "11", "1"],
    ]
    rows = {row.split()[0]: row.split()[1:] for row in lines.table(now, before).splitlines()[1:]}
    assert rows["a"] == ["1", "(+0)", "1,500", "(+10)", "9", "(-3)", "1", "(+0)"]
    assert rows["b"] == ["1", "(+1)", "20", "(+20)", "2", "(+2)", "0", "(+0)"]
    assert rows["gone"] == ["0", "(-1)", "0", "(-5)", "0", "(-5)", "0", "(+0)"]
    assert rows["total"] == ["2", "(+0)", "1,520", "(+25)", "11", "(-6)", "1", "(+0)"]


def test_the_working_tree_and_a_revision_are_counted_alike():
    now = lines.by_room(lines.working_tree())
    assert {"core", "cache", "engine", "."} <= set(now)
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this tree has no history")
    assert {"core", "cache", "engine", "."} <= set(lines.by_room(lines.revision("HEAD")))
    with pytest.raises(SystemExit, match="--against no-such-name: "):
        lines.revision("no-such-name")

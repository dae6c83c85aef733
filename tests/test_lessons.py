"""The lessons as files: their pictures, links and names exist. scripts/lessons.py runs them."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
SECTIONS = ("## Read now", "## Exercises", "## What you can now explain", "## Where it loses")


def prose(lesson: Path) -> str:
    """The Markdown cells of a lesson."""
    cells = re.split(r"^# %%", lesson.read_text(encoding="utf-8"), flags=re.M)
    texts = [cell.removeprefix(" [markdown]\n") for cell in cells if cell.startswith(" [markdown]\n")]
    return "\n".join(re.sub(r"^# ?", "", text, flags=re.M) for text in texts)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
class TestALesson:
    def test_asks_a_question_and_has_its_sections_in_order(self, lesson):
        text = prose(lesson)
        assert text.startswith("# ") and "\n> " in text
        places = [text.index(section) for section in SECTIONS]
        assert places == sorted(places)
        walk = re.findall(r"^\d+\. ", text[places[0] : places[1]], flags=re.M)
        assert 1 <= len(walk) <= 5

    def test_shows_every_picture_it_draws(self, lesson):
        shown = re.findall(r"\]\(img/([\w-]+)\.svg\)", prose(lesson))
        drawn = re.findall(r'figures\.save\(\w+, "([\w-]+)"\)', lesson.read_text(encoding="utf-8"))
        assert shown == drawn == [f"{lesson.stem}-{number}" for number in range(1, len(drawn) + 1)]
        assert all((ROOT / "lessons" / "img" / f"{name}.svg").is_file() for name in drawn)

    def test_links_to_files_that_exist(self, lesson):
        links = re.findall(r"\]\((\.\./[^)]+)\)", prose(lesson))
        assert links
        assert [link for link in links if not (lesson.parent / link).is_file()] == []

    def test_names_functions_that_exist_as_exercises(self, lesson):
        text = prose(lesson)
        lines = text[text.index("## Exercises") : text.index("## What you can now explain")].splitlines()
        names = []
        for line in lines:
            for name in re.findall(r"`([\w.]+)`", line):
                if name.startswith("nanokv."):
                    names.append(name)
                elif name.startswith("."):  # another method of the class named before
                    names.append(names[-1].rsplit(".", 1)[0] + name)
        assert len(names) >= 3
        assert [name for name in names if not resolves(name)] == []

    def test_has_at_least_ten_assertions(self, lesson):
        tree = ast.parse(lesson.read_text(encoding="utf-8"))
        assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree)) >= 10


def resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_a_figure_has_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOKV_LESSONS_IMG", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "lessons"))
    figures = import_module("figures")
    written = []
    for _ in range(2):
        figure, axes = figures.new(4, 2)
        axes.plot([1, 2, 3], [1, 4, 9], "o-", label="squares")
        axes.legend()
        figures.box(axes, 1, 1, 1, 1, figures.BLUE, "box")
        written.append(figures.save(figure, "00_test-1").read_bytes())
    sys.modules.pop("figures")
    assert written[0] == written[1]
    assert b"<dc:date>" not in written[0] and b"Matplotlib v" not in written[0]

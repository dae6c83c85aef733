"""The lessons as files: their pictures, links and names exist. scripts/lessons.py runs them."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
from course import notebooks  # noqa: E402

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

    def test_reads_names_that_its_files_define(self, lesson):
        text = prose(lesson)
        walk = text[text.index("## Read now") : text.index("## Exercises")]
        stops = re.findall(r"\]\(\.\./([^)]+)\)([^\[]*)", walk)
        named = [(file, name) for file, words in stops for name in re.findall(r"`(?:\w+\.)*(\w+)`", words)]
        sources = {file: (ROOT / file).read_text(encoding="utf-8") for file, _ in named}
        assert [one for one in named if not re.search(rf"(def|class) {one[1]}\b", sources[one[0]])] == []

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


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a figure with a line through points at these heights into `tmp_path`. Returns its path."""
    monkeypatch.setenv("NANOKV_LESSONS_IMG", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "lessons"))
    figures = import_module("figures")

    def drawn(*heights: float) -> Path:
        figure, axes = figures.new(4, 2)
        axes.plot([1, 2, 3], heights, "o-", label="squares")
        axes.fill_between([1, 2, 3], heights)
        axes.legend()
        figures.box(axes, 1, 1, 1, 1, figures.BLUE, "box")
        return figures.save(figure, "00_test-1")

    yield drawn
    sys.modules.pop("figures")


def test_a_figure_is_the_same_bytes_each_time(draw):
    written = draw(1, 4, 9).read_bytes()
    assert draw(1, 4, 9).read_bytes() == written
    assert b"<dc:date>" not in written and b"Matplotlib v" not in written
    ids, uses = (re.findall(pattern, written.decode()) for pattern in (r'id="(id\d+)"', r'#(id\d+)[")]'))
    assert len(ids) == len(set(ids)) >= 3 and set(uses) <= set(ids)


def test_a_changed_figure_is_found_and_a_rounded_one_is_not(draw, tmp_path, monkeypatch):
    committed = tmp_path / "img"
    committed.mkdir()
    monkeypatch.setattr(notebooks, "IMAGES", committed)
    text = draw(1, 4, 9).read_text()
    (committed / "00_test-1.svg").write_text(text)
    assert notebooks.other_figures("00_test", tmp_path) == []
    x = re.search(r"\d+\.\d{6}", text)[0]
    (committed / "00_test-1.svg").write_text(text.replace(x, f"{float(x) + 1e-6:.6f}"))
    assert notebooks.other_figures("00_test", tmp_path) == []
    draw(1, 4.01, 9)
    (fault,) = notebooks.other_figures("00_test", tmp_path)
    assert fault.startswith("lessons/img/00_test-1.svg differs")


@pytest.mark.parametrize(
    ("old", "new"), [("12.000000", "12.0001"), ("#0072b2", "#0073b2"), (" L 3 4", ""), ("id1", "id2")]
)
def test_figures_differ_by_a_number_a_colour_a_stroke_and_an_id(old, new):
    text = '<path id="id1" d="M 12.000000 -7 L 3 4" style="fill: #0072b2"/>'
    assert notebooks.same_figure(text, text.replace("-7", "-7.000001"))
    assert not notebooks.same_figure(text, text.replace(old, new))
    assert not notebooks.same_figure(text.replace(old, new), text)

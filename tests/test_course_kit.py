"""The tools of a teacher: the list of exercises, gaps, exported trees, grades, notebooks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanokv.core.errors import CourseError
from nanokv.learn.course import load_course, read_course
from nanokv.learn.progress import Progress
from nanokv.learn.source import find, solution, solution_file, student_file

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
from course import dev_check, export, notebooks  # noqa: E402
from course.choice import choose  # noqa: E402
from course.mutants import mutants  # noqa: E402

LESSON = '[[lesson]]\nnumber = 1\nname = "01_a"\ntitle = "t"\n'
EXERCISE = (
    '[[exercise]]\nid = "01.1"\ntarget = "nanokv.core.spec.PageLayout.pages_for"\ntitle = "t"\n'
    'points = 1\nminutes = 5\ndifficulty = 1\nhint = "h"\n'
)


def test_the_course_has_enough_exercises_and_mutants():
    course = load_course()
    assert len(course.exercises) >= 36
    assert all(3 <= len(course.of_lesson(lesson.number)) <= 6 for lesson in course.lessons)
    assert sum(len(mutants(course, one)) for one in course.exercises) >= 3 * len(course.exercises)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LESSON + EXERCISE + "colour = 1\n", "colour: unknown field"),
        (LESSON + EXERCISE.replace("points = 1", 'points = "1"'), "points='1': expected int"),
        (LESSON + EXERCISE.replace('hint = "h"\n', ""), "hint is missing"),
        (LESSON + EXERCISE.replace("difficulty = 1", "difficulty = 9"), "difficulty=9: expected 1 to 5"),
        (LESSON + EXERCISE.replace("01.1", "1.1"), "expected a lesson's two digits"),
        (LESSON + EXERCISE.replace("01.1", "02.1"), "there is no lesson 2"),
        (LESSON + EXERCISE + EXERCISE, "each id once"),
        (LESSON + EXERCISE + EXERCISE.replace("01.1", "01.2"), "two exercises have it"),
        ("[[lesson\n", "not a readable course"),
        ("variants = 1\n", "variants: expected variant"),
    ],
)
def test_an_invalid_list_is_refused_with_entry_field_and_value(tmp_path, text, words):
    (tmp_path / "exercises.toml").write_text(text)
    with pytest.raises(CourseError, match=words.replace("(", r"\(")):
        read_course(tmp_path)


def test_a_gap_changes_no_other_byte():
    source = (
        "import os  # why\n\n\nclass A:\n    # above\n    @property\n    def f(self):\n"
        '        """Doc.\n\n        More.\n        """\n        # inside\n        x = 1  # one\n        return x\n\n'
        "    # between\n    def g(self): return 2  # kept\n"
    )
    cut = export.remove_bodies(source, {"A.f": "09.1"})
    gap = '        from nanokv.core.errors import ExerciseTODO\n\n        raise ExerciseTODO("09.1")\n'
    assert cut == source.replace("        # inside\n        x = 1  # one\n        return x\n", gap)


def test_a_comment_before_the_first_statement_belongs_to_the_body():
    cut = export.remove_bodies("def f(\n    a,\n):\n    # the trick\n    return a\n", {"f": "09.1"})
    assert "trick" not in cut and cut.startswith("def f(\n    a,\n):\n    from nanokv")


def test_a_missing_function_is_named():
    with pytest.raises(CourseError, match="has no function PagePool.alocate"):
        find("nanokv.cache.pool.PagePool.alocate")
    with pytest.raises(CourseError, match="no such module"):
        find("nanokv.cash.pool.PagePool.allocate")


def test_a_students_file_has_signature_docstring_and_imports_but_no_body():
    exercise = load_course().exercise("04.6")
    text = student_file(exercise)
    assert "def common_prefix(request: Request, other: Request) -> int:" in text
    assert "Tokens that both begin with" in text and "import numpy as np" in text and "MIN_SHARED" in text
    assert "argmax" not in text and "argmax" in solution_file(exercise)


def lessons(*words: object, seed: str = "0") -> subprocess.CompletedProcess:
    """scripts/lessons.py of this checkout, whichever nanokv is installed."""
    command = [sys.executable, str(ROOT / "scripts" / "lessons.py"), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"NANOKV_GRADER_SEED": seed, "PYTHONPATH": ""}
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A tree for a class: lessons 2 and 4, all of their exercises."""
    out = tmp_path_factory.mktemp("class") / "tree"
    if not (ROOT / ".git").exists():
        pytest.skip("trees are exported from a git checkout")
    done = lessons("export", "--out", out, "--lessons", "2,4")
    assert done.returncode == 0, done.stderr
    return out


def test_an_exported_tree_has_the_gaps_of_its_lessons_and_no_others(tree):
    assert 'raise ExerciseTODO("02.3")' in (tree / "nanokv/cache/pool.py").read_text()
    assert (tree / "nanokv/engine/runner.py").read_text() == (ROOT / "nanokv/engine/runner.py").read_text()
    assert [lesson.number for lesson in read_course(tree / "lessons").lessons] == [2, 4]
    assert list(export.leaks(load_course_of(tree), tree)) == []


def test_a_solution_in_a_notebook_or_in_prose_is_a_leak(tree):
    course = load_course_of(tree)
    cell = {"cell_type": "code", "source": solution_file(course.exercise("02.3")).splitlines(keepends=True)}
    notebook, page = tree / "lessons" / "ipynb" / "leak.ipynb", tree / "docs" / "leak.md"
    notebook.write_text(json.dumps({"cells": [cell, {"cell_type": "code", "source": "%time x"}]}))
    page.write_text(f"How:\n\n```python\n{solution(course.exercise('02.4'))}```\n\n```console\n$ nanokv learn\n```\n")
    found = list(export.leaks(course, tree))
    notebook.unlink()
    page.unlink()
    assert found == [
        "docs/leak.md: release is the solution of 02.4", "lessons/ipynb/leak.ipynb: allocate is the solution of 02.3"
    ]  # fmt: skip


def load_course_of(tree: Path):
    """The exercises that a tree has gaps for, with the tests of this checkout."""
    ids = {one.id for one in read_course(tree / "lessons").exercises}
    course = load_course()
    return type(course)(
        course.folder, course.variant, course.lessons, tuple(one for one in course.exercises if one.id in ids)
    )


def in_tree(tree: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "nanokv.cli.main", "learn", *words]
    return subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)


@pytest.mark.slow
def test_an_exported_tree_names_other_gaps_and_the_students_functions_fill_them(tree):
    course = load_course()
    (tree / "my").mkdir(exist_ok=True)
    (tree / "my" / "02_5.py").write_text(solution_file(course.exercise("02.5")))
    assert "needs exercise 02.2 first" in in_tree(tree, "check", "02.5").stdout
    (tree / "my" / "02_2.py").write_text(solution_file(course.exercise("02.2")))
    passed = in_tree(tree, "check", "02.5").stdout
    assert "public checks passed" in passed and "nanokv learn solution" not in passed  # there is none to compare with
    shown = in_tree(tree, "solution", "02.5", "--give-up")
    assert shown.returncode == 1 and "holds no solutions" in shown.stderr


def test_an_exported_tree_names_a_broken_file_that_fills_a_gap(tree):
    course = load_course()
    path = tree / "my" / "04_1.py"
    (tree / "my").mkdir(exist_ok=True)
    (tree / "my" / "04_2.py").write_text(solution_file(course.exercise("04.2")))
    path.write_text(solution_file(course.exercise("04.1")) + "\nbroken = nowhere\n")
    said = in_tree(tree, "check", "04.2").stdout
    path.unlink()
    assert "04_1.py: line" in said and "NameError: name 'nowhere'" in said


def test_a_lesson_is_read_before_it_runs_where_the_engine_has_gaps(tree):
    (tree / "empty").mkdir()
    said = subprocess.run(
        [sys.executable, "-m", "nanokv.cli.main", "learn"],
        cwd=tree / "empty", env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "next lesson: read lessons/02_pages.py" in said


def test_an_exported_tree_refuses_dev_check(tree):
    done = subprocess.run([sys.executable, "scripts/lessons.py", "dev-check"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1 and "was made for a class" in done.stderr


@pytest.mark.slow
def test_a_lesson_with_mine_patches_its_own_and_the_prefill_process(tmp_path):
    exercise, folder = load_course().exercise("02.1"), tmp_path / "my"
    folder.mkdir()
    (folder / exercise.file).write_text(solution_file(exercise) + "\nprint('mine is in')\n")
    Progress(folder).note(exercise, passed=True)
    (tmp_path / "lesson.py").write_text(
        "import subprocess, sys\nfrom nanokv.disagg import process\n"
        "subprocess.run([sys.executable, '-m', process.ENTRY])  # without a job: ends after patching\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "course.with_mine", "lesson.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("mine is in") == 2, done.stderr
    assert "nanokv/disagg/worker.py" in done.stderr


def test_each_variant_draws_three_other_exercises_per_lesson():
    course = load_course()
    chosen = {variant: [one.id for one in choose(course, variant, None)] for variant in (1, 2, 3)}
    assert all(len(ids) == 3 * len(course.lessons) for ids in chosen.values())
    assert len({tuple(ids) for ids in chosen.values()}) == 3
    assert chosen[1] == [one.id for one in choose(course, 1, None)]


def test_an_export_never_writes_over_a_folder(tmp_path):
    (tmp_path / "mine").write_text("x")
    done = lessons("export", "--out", tmp_path)
    assert done.returncode == 1 and "exists already" in done.stderr
    with pytest.raises(CourseError, match="expected numbers and ranges"):
        choose(load_course(), 0, "one")


def test_a_grade_runs_this_engine_even_inside_another_tree(tmp_path):
    course = load_course()
    for name in ("nanokv", "my"):
        (tmp_path / name).mkdir()
    (tmp_path / "nanokv" / "__init__.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "my" / "01_2.py").write_text(solution_file(course.exercise("01.2")))
    command = [sys.executable, str(ROOT / "scripts" / "lessons.py"), "grade", ".", "--lessons", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert "01.2  passed" in done.stdout, done.stdout + done.stderr


def test_a_grade_separates_passed_public_failed_and_missing(tmp_path):
    course, folder = load_course(), tmp_path / "mia" / "my"
    folder.mkdir(parents=True)
    (folder / "02_1.py").write_text(solution_file(course.exercise("02.1")))
    # Passes the public checks, whose pools have at most five pages, and no others.
    narrow = solution_file(course.exercise("02.3")).replace("if num_pages >", "if self.num_pages > 5 or num_pages >")
    (folder / "02_3.py").write_text(narrow)
    network = "import socket\n    socket.create_connection(('127.0.0.1', 9))"
    (folder / "02_4.py").write_text(
        student_file(course.exercise("02.4")).replace('raise ExerciseTODO("02.4")', network)
    )
    results = tmp_path / "results.json"
    done = lessons("grade", tmp_path / "mia", "--json", "--gradescope", results, seed="4711")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["id"]: row for row in report["rows"]}
    assert [rows[one]["status"] for one in ("02.1", "02.3", "02.4", "02.5")] == [
        "passed",
        "public",
        "failed",
        "missing",
    ]
    assert [rows[one]["score"] for one in ("02.1", "02.3", "02.4", "02.5")] == [1, 1.5, 0, 0]
    assert "opens no connection" in rows["02.4"]["message"]
    assert (report["seed"], report["score"]) == (4711, 2.5)
    written = json.loads(results.read_text())
    assert written["score"] == 2.5 and len(written["tests"]) == 2 * len(course.exercises)
    (hidden,) = (one for one in written["tests"] if one["name"] == "02.3 hidden")
    assert hidden["visibility"] == "after_published" and hidden["score"] == 0


def test_a_class_is_graded_on_its_own_exercises(tmp_path):
    done = lessons("grade", tmp_path, "--json", "--lessons", "2", "--variant", "7")
    ids = [row["id"] for row in json.loads(done.stdout)["rows"]]
    assert ids == [one.id for one in choose(load_course(), 7, "2")] and len(ids) == 3


def test_a_seed_that_is_no_number_is_refused(tmp_path):
    done = lessons("grade", tmp_path, seed="spring")
    assert done.returncode == 1 and "NANOKV_GRADER_SEED='spring'" in done.stderr


def test_a_notebook_is_the_same_bytes_each_time_and_shows_the_figures(tmp_path):
    path = tmp_path / "01_a.py"
    path.write_text("# %% [markdown]\n# # Title\n#\n# ![a](img/01_a-1.svg)\n\n# %%\nx = 1\nprint(x)\n")
    first = notebooks.notebook(path)
    assert first == notebooks.notebook(path)
    cells = json.loads(first)["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code"]
    assert "".join(cells[0]["source"]) == "# Title\n\n![a](../img/01_a-1.svg)"
    assert "".join(cells[2]["source"]) == "x = 1\nprint(x)" and cells[2]["outputs"] == []
    assert len({cell["id"] for cell in cells}) == 3


def test_a_twin_that_is_missing_or_has_other_parameters_is_a_fault():
    exercise = load_course().exercise("08.2")
    assert list(dev_check.target_faults(exercise)) == []
    wrong = {"nothing": "there is no such function", "rms_norm": "takes (x, weight, eps), not (gate_up)"}
    for twin, words in wrong.items():
        (fault,) = dev_check.target_faults(replace(exercise, also=(f"nanokv.kernels.cpu.{twin}",)))
        assert words in fault


@pytest.mark.parametrize(
    ("text", "part"),
    [("2,77", "77"), ("4-1,2", "4-1"), ("1-99999999999", "1-99999999999"), ("0-3", "0-3"), ("1,9-3", "9-3")],
)
def test_unknown_lessons_are_named(text, part):
    with pytest.raises(CourseError, match=f": {part}: expected a lesson, .*there are the lessons 1, 2"):
        choose(load_course(), 0, text)


def test_lessons_are_chosen_by_numbers_and_ranges_each_once():
    chosen = choose(load_course(), 0, "4,1-2,2")
    assert [one.lesson for one in chosen] == [one.lesson for one in load_course().exercises if one.lesson in (1, 2, 4)]

"""nanokv learn, from the first file to the whole engine. No command loses a student's file."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner

from nanokv.cli.main import main
from nanokv.core.errors import ExerciseTODO
from nanokv.learn import check_process, checking
from nanokv.learn.cards import load_cards
from nanokv.learn.course import PACKAGE, load_course
from nanokv.learn.job import CheckJob
from nanokv.learn.mine import patch_passed
from nanokv.learn.patching import patch, patch_gaps, reference
from nanokv.learn.progress import Progress
from nanokv.learn.source import solution, solution_file, split_name, student_file

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from course.dev_check import function_at

ALLOCATE = "02.3"
NEW_PROCESS = checking._run


@pytest.fixture
def new_process(monkeypatch) -> None:
    """Lets checks of a `workspace` run as a user's do."""
    monkeypatch.setattr(checking, "_run", NEW_PROCESS)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """The current folder; `my` is inside it. Checks run in copies of this process, which has imported torch already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checking, "_run", in_a_copy)
    return tmp_path


def in_a_copy(job: CheckJob, printed: Path) -> int:
    """A check as `checking._run` does it, without the import of torch."""
    pid = os.fork()
    if not pid:
        try:
            with open(printed, "w", encoding="utf-8") as sys.__stdout__:
                check_process.main(job)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def learn(*words: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    result = CliRunner().invoke(main, ["learn", *words])
    return result.exit_code, result.output


def write(exercise_id: str, body: str) -> Path:
    """my/ID.py as `start` writes it, with this text in the place of the gap."""
    exercise = load_course().exercise(exercise_id)
    path = Path("my", exercise.file)
    path.parent.mkdir(exist_ok=True)
    fresh = student_file(exercise)
    path.write_text(fresh.replace(f'raise ExerciseTODO("{exercise_id}")', body))
    return path


def solve(exercise_id: str) -> None:
    exercise = load_course().exercise(exercise_id)
    Path("my").mkdir(exist_ok=True)
    Path("my", exercise.file).write_text(solution_file(exercise))


def test_the_next_exercise_follows_the_last_pass_and_skipped_ones_come_last(workspace):
    course, progress = load_course(), Progress(Path("my"))
    first, *_, last = course.exercises

    def passes(exercise):
        solve(exercise.id)
        progress.note(exercise, passed=True)

    assert progress.current(course) is first
    passes(course.exercise("02.2"))
    assert progress.current(course).id == "02.3"
    write("01.2", "return 1")
    assert progress.current(course).id == "01.2"  # a started exercise comes first
    Path("my/01_2.py").unlink()
    passes(last)
    assert progress.current(course) is first


def test_a_check_that_cannot_begin_names_the_missing_package(workspace, new_process, monkeypatch):
    Path("sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")  # as if it were not installed
    monkeypatch.setenv("PYTHONPATH", str(workspace))
    solve(ALLOCATE)
    code, said = learn("check", ALLOCATE)
    assert code == 1 and "before your file was run: ModuleNotFoundError: import of torch halted" in said


def test_a_patched_function_replaces_no_other_name():
    for exercise in load_course().exercises:
        names = [split_name(target) for target in (exercise.target, *exercise.also)]
        for module, _, qualname in names:
            if "." not in qualname:
                known = [
                    name
                    for name, value in vars(import_module(module)).items()
                    if value is function_at(f"{module}.{qualname}")
                ]
                assert known == [qualname], f"{exercise.id}: one function under the names {known}"


def test_the_first_call_says_where_to_start(workspace):
    code, said = learn()
    assert code == 0
    assert "python lessons/01_one_request.py" in said and "nanokv learn start 01.1" in said
    assert not Path("my").exists()


def test_a_first_check_fails_says_that_it_should_and_gives_one_hint(workspace):
    assert learn("start", ALLOCATE)[0] == 0
    code, said = learn("check", ALLOCATE)
    assert code == 1
    assert "a first check fails, and should" in said
    assert load_course().exercise(ALLOCATE).hint in said


def test_a_solved_exercise_passes_its_public_checks(workspace, new_process):
    solve(ALLOCATE)
    code, said = learn("check", ALLOCATE)
    assert code == 0 and "public checks passed" in said and "all tests" not in said
    assert Progress(Path("my")).status(load_course().exercise(ALLOCATE)) == "passed"


def test_a_wrong_answer_shows_the_expected_and_the_given_value(workspace):
    write(ALLOCATE, "return self._free[:num_pages]")
    code, said = learn("check", ALLOCATE)
    assert code == 1
    assert "the first three of five pages" in said and "expected [0, 1, 2], got [4, 3, 2]" in said


def test_a_wrong_tensor_is_located_by_row_and_column(workspace):
    write("08.2", "return gate_up.float().chunk(2, dim=-1)[1]")
    said = learn("check", "08.2")[1]
    assert "at row 0, dim 0: expected 0, got 5" in said


def test_an_exception_points_at_the_line_of_the_students_file(workspace):
    path = write(ALLOCATE, "return self._fre.pop()")
    line = path.read_text().splitlines().index("    return self._fre.pop()") + 1
    said = learn("check", ALLOCATE)[1]
    assert f"line {line}: AttributeError" in said and "<- return self._fre.pop()" in said


def test_a_forgotten_return_is_suspected(workspace):
    write("01.3", "(ttft_s - tpot_s) / total_s")
    assert "is a return missing?" in learn("check", "01.3")[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def allocate(self, num_pages:\n", "not valid Python"),
        ("def alocate(self, num_pages):\n    return []\n", "no function allocate; it has alocate"),
        ("def allocate(self, n):\n    return []\n", "takes (self, n), the course has (self, num_pages)"),
        ("import nowhere_at_all\ndef allocate(self, num_pages):\n    return []\n", "No module named 'nowhere_at_all'"),
    ],
)
def test_an_unusable_file_is_one_line_and_stays_unchanged(workspace, text, words):
    path = write(ALLOCATE, "")
    path.write_text(text)
    code, said = learn("check", ALLOCATE)
    assert code == 1 and words in said and "Traceback" not in said
    assert path.read_text() == text


@pytest.mark.slow
def test_an_endless_loop_is_stopped_and_its_prints_are_cut(workspace, new_process):
    write(ALLOCATE, "while True:\n        print('round and round')")
    outcome = checking.check(load_course(), load_course().exercise(ALLOCATE), Path("my"), cpu_limit=6)
    assert outcome.failure.kind == "timeout" and "an endless loop?" in outcome.failure.message
    assert outcome.failure.test == "the first pages are the lowest"
    assert 0 < len(outcome.printed) <= 5000


def test_processes_and_threads_of_a_students_file_end_with_the_check(workspace, new_process):
    path = write(ALLOCATE, "pass")
    path.write_text(
        solution_file(load_course().exercise(ALLOCATE))
        + "\n\nimport subprocess, threading, time\n\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
        + "print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)\n"
    )
    outcome = checking.check(load_course(), load_course().exercise(ALLOCATE), Path("my"))
    assert outcome.failure is None and outcome.seconds < 60
    child, deadline = int(outcome.printed), time.monotonic() + 60
    while _lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_prints_are_shown_beside_the_result(workspace, new_process):
    heavy = "print('heavy:', {'numba', 'transformers', 'triton', 'matplotlib', 'tokenizers'} & {*sys.modules})"
    write(ALLOCATE, f"print('free:', self._free)\n    import sys; {heavy}\n    {_body(ALLOCATE)}")
    code, said = learn("check", ALLOCATE)
    assert code == 0 and "your file printed:" in said and "free: [4, 3, 2, 1, 0]" in said
    assert "heavy: set()" in said  # a check takes about as long as the import of torch


CHEAT = """
import json, os, sys

for place in (
    lambda: json.loads(sys.argv[1])["result"],
    lambda: json.loads(sys.stdin.read())["result"],
    lambda: os.path.join(os.path.dirname(os.readlink("/proc/self/fd/1")), "result.json"),
):
    try:
        path = place()
        open(path, "w").write(json.dumps({"stage": "done", "passed": ["public", "hidden"], "failure": None}))
        print("wrote", path)
    except Exception as error:
        print(type(error).__name__)
os._exit(0)
"""


def test_a_file_cannot_pass_itself_by_writing_the_result(workspace, new_process):
    path = write(ALLOCATE, "return []")
    path.write_text(path.read_text().replace("def allocate", f"{CHEAT}\n\ndef allocate"))
    code, said = learn("check", ALLOCATE)
    assert code == 1 and "public checks passed" not in said
    assert "IndexError" in said and "JSONDecodeError" in said  # neither argv nor stdin names the file
    assert "wrote /" in said and "written by other code than the check" in said  # found by another way: not believed


def _body(exercise_id: str) -> str:
    lines = solution(load_course().exercise(exercise_id)).splitlines()
    return "\n".join(lines[2:]).strip()


def test_a_call_of_the_solution_meets_a_gap_and_its_line_is_shown(workspace):
    write(ALLOCATE, "return SOLUTION(self, num_pages)")
    path = Path("my/02_3.py")
    path.write_text(path.read_text().replace("def allocate", "SOLUTION = PagePool.allocate\n\n\ndef allocate"))
    code, said = learn("check", ALLOCATE)
    assert code == 1 and "calls the engine's own allocate, which is a gap" in said
    assert "<- return SOLUTION(self, num_pages)" in said and "a first check fails" not in said


def test_a_call_of_the_solution_by_name_recurses_and_is_explained(workspace):
    write(ALLOCATE, "return PagePool.allocate(self, num_pages)")
    code, said = learn("check", ALLOCATE)
    assert code == 1 and "allocate calls itself without end" in said and "RecursionError" not in said


def test_a_faster_twin_of_the_solution_is_a_gap_too(workspace):
    write("08.2", "from nanokv.kernels.ops import AUTO\n    return AUTO.silu_mul(gate_up)")
    code, said = learn("check", "08.2")
    assert code == 1 and "calls the engine's own silu_mul, which is a gap" in said


def test_a_check_hides_solution_and_twins_but_hidden_tests_reach_the_reference():
    for exercise in load_course().exercises:
        places = [exercise.target, *exercise.also]
        before = [function_at(target) for target in places]
        undo = patch_gaps(exercise)
        try:
            for target, function in zip(places, before, strict=True):
                with pytest.raises(ExerciseTODO, match=exercise.id):
                    function_at(target)()
                if "." not in split_name(target)[2]:
                    assert reference(function_at(target)) is function
        finally:
            undo()
        assert [function_at(target) for target in places] == before


def test_start_never_writes_over_a_file_and_reset_keeps_it(workspace):
    path = write(ALLOCATE, "return []  # mine")
    code, said = learn("start", ALLOCATE)
    assert code == 1 and "exists already" in said and "# mine" in path.read_text()
    for number in (1, 2):
        assert learn("reset", ALLOCATE)[0] == 0
        assert path.with_suffix(f".py.{number}").exists()
    assert "# mine" in path.with_suffix(".py.1").read_text() and "TODO" in path.read_text()


def test_an_unknown_id_names_the_nearest(workspace):
    code, said = learn("check", "02.33")
    assert code == 1 and "did you mean 02.3?" in said and len(said.strip().splitlines()) == 1


def test_a_file_of_an_older_course_stays_unchanged(workspace):
    Path("my").mkdir()
    Path("my/02_99.py").write_text("mine")
    assert "02_99.py: this course has no such exercise" in learn("list")[1]
    assert Path("my/02_99.py").read_text() == "mine"


def test_a_pass_belongs_to_the_content_of_the_file(workspace):
    solve(ALLOCATE)
    assert learn("check", ALLOCATE)[0] == 0
    with open("my/02_3.py", "a") as file:
        file.write("# more\n")
    assert Progress(Path("my")).status(load_course().exercise(ALLOCATE)) == "changed"


def test_damaged_progress_is_one_line(workspace):
    Path("my").mkdir()
    Path("my/progress.json").write_text("{")
    code, said = learn("progress")
    assert code == 1 and "my/progress.json: not readable" in said


def test_the_solution_needs_a_pass_or_give_up(workspace):
    assert learn("solution", ALLOCATE)[0] == 1
    code, said = learn("solution", ALLOCATE, "--give-up")
    assert code == 0 and "def allocate(self, num_pages: int)" in said


def test_progress_counts_by_lesson(workspace):
    solve(ALLOCATE)
    learn("check", ALLOCATE)
    said = learn("progress")[1]
    assert "1 of 6" in next(line for line in said.splitlines() if line.startswith("02_pages"))


def test_chat_answers_with_the_students_functions_in_the_engine(workspace, smollm2):
    solve(ALLOCATE)
    solve("08.4")
    write("02.4", "return []")
    folder, course = Path("my"), load_course()
    for exercise_id in (ALLOCATE, "08.4"):
        Progress(folder).note(course.exercise(exercise_id), passed=True)
    # The student's pool says when it is asked: so the answer came through it.
    path = folder / "02_3.py"
    path.write_text(path.read_text() + "\n\nprint('my pool is in')\n")
    Progress(folder).note(course.exercise(ALLOCATE), passed=True)
    command = [sys.executable, "-m", "nanokv.cli.main", "chat", "--mine", "-p", "What is the capital of France?"]
    done = subprocess.run(
        [*command, "--temperature", "0", "--max-tokens", "12"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "my pool is in" in done.stdout and "Paris" in done.stdout
    assert "with your 02.3 allocate, 08.4 paged_attention" in done.stderr
    assert "without 02.4" in done.stderr


def test_chat_with_nothing_passed_says_so(workspace):
    result = CliRunner().invoke(main, ["chat", "--mine", "-p", "hello"])
    assert result.exit_code == 1 and "no exercise has passed" in result.output


def test_chat_leaves_out_a_function_whose_parameters_a_newer_course_changed(workspace):
    folder, course = Path("my"), load_course()
    for exercise_id, text in (("02.1", None), (ALLOCATE, "def give(self, n):\n    return []\n")):
        solve(exercise_id)
        if text is not None:
            Path("my", course.exercise(exercise_id).file).write_text(text)
        Progress(folder).note(course.exercise(exercise_id), passed=True)
    before = function_at(course.exercise("02.1").target)
    patched, waiting = patch_passed(folder)
    patch(course.exercise("02.1").target, before)
    assert [one.id for one in patched] == ["02.1"] and [one.id for one in waiting] == [ALLOCATE]


def test_chat_names_the_file_that_a_newer_engine_cannot_load(workspace):
    solve("02.1")
    path = Path("my/02_1.py")
    path.write_text("from nanokv.core.spec import Sheet\n" + path.read_text().replace("from __future__", "# from"))
    Progress(Path("my")).note(load_course().exercise("02.1"), passed=True)
    result = CliRunner().invoke(main, ["chat", "--mine", "-p", "hello"])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "my/02_1.py: line 1: ImportError: cannot import name 'Sheet'" in result.output


def test_chat_mine_refuses_a_prefill_process_without_the_students_functions(workspace):
    result = CliRunner().invoke(main, ["chat", "--mine", "--disagg", "-p", "hello"])
    assert result.exit_code == 2 and "--mine and --disagg: prefill processes run the engine's own" in result.output


def test_a_lesson_keeps_the_faster_twin_for_comparison(workspace):
    exercise = load_course().exercise("08.2")
    solve(exercise.id)
    Progress(Path("my")).note(exercise, passed=True)
    engine, twin = function_at(exercise.target), function_at(exercise.also[0])
    patch_passed(Path("my"), twins=False)
    mine = function_at(exercise.target)
    patch(exercise.target, engine)
    assert mine is not engine and function_at(exercise.also[0]) is twin


def test_watch_checks_saved_files_and_reads_keys(workspace):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "TERM": "dumb"}
    with pexpect.spawn(
        sys.executable, ["-m", "nanokv.cli.main", "learn", "watch", ALLOCATE], env=environment, encoding="utf-8",
        timeout=60,
    ) as child:  # fmt: skip
        child.expect("watching my/02_3.py")
        child.send("h")
        child.expect("hint: Free pages are a stack")
        child.send("r")
        child.expect("a first check fails")
        child.expect("keys:")
        solve(ALLOCATE)
        child.expect("public checks passed")
        child.expect("keys:")
        child.send("n")
        child.expect("watching my/02_4.py")
        child.send("q")
        child.expect(pexpect.EOF)
    assert Path("my/02_4.py").exists()


def test_watch_writes_the_file_of_start_and_ends_when_all_have_passed(workspace, monkeypatch):
    from nanokv.cli import learn_watch

    exercise = load_course().exercise(ALLOCATE)
    learn("start", ALLOCATE)
    written = Path("my", exercise.file).read_bytes()
    Path("my", exercise.file).unlink()
    learn_watch._open(exercise)
    assert Path("my", exercise.file).read_bytes() == written
    monkeypatch.setattr(Progress, "current", lambda self, course: None)
    assert learn("watch") == (0, "all public checks passed. Your engine: nanokv chat --mine\n")
    assert learn()[1].endswith(learn("watch")[1])


def test_watch_without_a_terminal_names_the_command_to_check_by_hand(workspace):
    code, said = learn("watch", ALLOCATE)
    assert code == 1 and f"by hand: nanokv learn check {ALLOCATE}" in said


def test_the_wheel_carries_the_course(workspace):
    root = Path(__file__).parents[1]
    names = (root / "pyproject.toml").read_text()
    packed = workspace / "site" / "nanokv"
    shutil.copytree(PACKAGE, packed, ignore=shutil.ignore_patterns("__pycache__", "course"))
    folder = load_course().folder
    for name in ("exercises.toml", "tests_public", "interview"):
        assert f'"lessons/{name}" = "nanokv/learn/course/{name}"' in names
        target = packed / "learn" / "course" / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, target)
    code = (
        "from nanokv.learn.course import load_course as c; from nanokv.learn.cards import load_cards as l;"
        "print(c().folder, len(c().exercises), len(l()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(workspace / "site")},
    )
    said = [str(packed / "learn" / "course"), str(len(load_course().exercises)), str(len(load_cards()))]
    assert done.stdout.split() == said, done.stderr


def test_progress_json_is_small_and_plain(workspace):
    solve(ALLOCATE)
    Progress(Path("my")).note(load_course().exercise(ALLOCATE), passed=True)
    assert list(json.loads(Path("my/progress.json").read_text())["passed"]) == [ALLOCATE]

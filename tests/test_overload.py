"""The line of a chat about other programs that take the processors, from counters such as the kernel shows them."""

import subprocess
import sys

import pytest

from nanokv.cli.repl.overload import Overload, since, thread_times

SECOND = 10**9


def threads(root, *times: tuple[float, float]) -> None:
    """Each thread has run and waited for so many seconds."""
    for number, (ran, waited) in enumerate(times):
        path = root / f"proc/self/task/{number}/schedstat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{int(ran * SECOND)} {int(waited * SECOND)} 7\n")


def lines(overload: Overload, root, *answers: tuple[float, float]) -> list[str]:
    """What is said after answers in which the threads together ran and waited for so many seconds."""
    said, ran, waited = [], 0.0, 0.0
    for one, other in answers:
        overload.begin()
        ran, waited = ran + one, waited + other
        threads(root, (ran / 2, waited / 2), (ran / 2, waited / 2))
        said.append(overload.line())
    return said


@pytest.fixture
def root(tmp_path):
    threads(tmp_path, (0, 0), (0, 0))
    return tmp_path


def test_times_of_threads_add_up(root):
    threads(root, (1, 0.5), (2, 0.25))
    assert since({}, thread_times(str(root))) == (3.0, 0.75)


def test_an_answer_that_waits_for_processors_says_so_with_the_share(root):
    (line,) = lines(Overload(2, 2, str(root)), root, (2, 3))
    assert line == "other programs take about 60 % of the processors' time: answers are slower"


def test_it_is_said_once_until_the_overload_has_ended_and_returns(root):
    said = lines(Overload(2, 2, str(root)), root, (2, 2), (2, 2), (2, 0.3), (2, 0), (2, 0.3), (2, 2), (2, 2))
    assert [bool(line) for line in said] == [True, False, False, False, False, True, False]


def test_a_short_answer_and_threads_that_wait_for_each_other_say_nothing(root):
    assert lines(Overload(2, 2, str(root)), root, (0.1, 0.5)) == [""]
    assert lines(Overload(4, 2, str(root)), root, (2, 3)) == [""]


def test_a_system_that_does_not_count_waiting_says_nothing(tmp_path):
    overload = Overload(2, 2, str(tmp_path / "nothing"))
    overload.begin()
    assert overload.line() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts")
def test_linux_counts_the_waiting_of_programs_that_share_a_processor():
    """Two programs on one processor: each runs for about half of the time, and waits for the rest."""
    program = (
        "import os, sys, time; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from nanokv.cli.repl.overload import since, thread_times\n"
        "print(flush=True); input(); before, end = thread_times(), time.monotonic() + 0.6\n"
        "while time.monotonic() < end: pass\n"
        "print(*since(before, thread_times()))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", program], **pipes) for _ in range(2)]
    for process in both:
        process.stdout.readline()
    for process in both:  # both are ready, and begin
        process.stdin.write("\n")
        process.stdin.flush()
    shares = []
    for process in both:
        ran, waited = map(float, process.communicate(timeout=60)[0].split())
        shares.append(waited / (ran + waited))
    assert max(shares) > 0.2

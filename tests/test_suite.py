"""The suite itself: it runs on any machine, with other work beside it, in the foreground and in the background."""

import ast
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
CLOCKS = {"perf_counter", "monotonic", "process_time", "thread_time", "time"}
LEAST_S = 20
"""Of a bound against a hang: a busy machine may take so long for anything."""


def test_ctrl_c_reaches_the_tests_of_a_background_job():
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    program = f"{ignored}; import conftest; signal.raise_signal(signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True)
    assert done.stderr.strip().endswith("KeyboardInterrupt")


def is_short(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value < LEAST_S


def reads_a_clock(node: ast.expr) -> bool:
    calls = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
    return any(isinstance(func, ast.Attribute) and func.attr in CLOCKS for func in calls)


def seconds_of(node: ast.AST) -> list[ast.expr]:
    """The bounds that a call, a deadline or an assertion sets on a time."""
    match node:
        case ast.BinOp(left, ast.Add(), right) if reads_a_clock(left):  # time.monotonic() + SECONDS
            return [right]
        case ast.Call(ast.Attribute(attr="wait" | "join"), args, keywords):
            return args[:1] + [one.value for one in keywords if one.arg == "timeout"]
        case ast.Call(_, _, keywords):
            return [one.value for one in keywords if one.arg == "timeout"]
        case ast.Assert(ast.Compare(ast.BinOp() as took, [ast.Lt() | ast.LtE()], [bound])) if reads_a_clock(took):
            return [bound]
    return []


def test_no_time_that_a_test_sets_is_too_short_for_a_busy_machine():
    short = []
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            short += [f"{path.name}:{one.lineno}: {one.value} s" for one in seconds_of(node) if is_short(one)]
    assert short == []

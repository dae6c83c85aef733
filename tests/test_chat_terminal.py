"""What a chat shows: words whole, lines that move and vanish, compiled kernels, control characters."""

import io
import signal
import threading
import time

import pytest
from fake_terminal import FakeTerminal, ScriptedLLM, Tty

import nanokv.cli.repl.stop_key as stop_key
import nanokv.cli.repl.terminal as terminal_module
from nanokv import EngineConfig
from nanokv.cli.repl.compiling import Compilations
from nanokv.cli.repl.terminal import Terminal
from nanokv.cli.repl.turn import _turn, stats_line
from nanokv.cli.repl.wrapping import WordWrap, wrapped
from nanokv.core.metrics import RequestMetrics
from nanokv.core.request import RequestOutput


@pytest.fixture(autouse=True)
def colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def in_pieces(text: str, columns: int, size: int) -> str:
    wrap = WordWrap()
    pieces = [wrap.feed(text[start : start + size], columns) for start in range(0, len(text), size)]
    return "".join(pieces) + wrap.rest(columns)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_no_word_is_broken_at_the_edge_however_it_is_streamed(size):
    text = "Once upon a time there was a fox, and  two  ducks.\n\n    indented code = 1\nend "
    shown = in_pieces(text, 12, size)
    assert all(len(line) <= 12 for line in shown.split("\n"))
    assert shown.split() == text.split()
    assert "\n\n    indented" in shown and shown == wrapped(text, 12)


def test_wide_characters_break_anywhere_and_count_as_two_columns():
    assert wrapped("日本語日本語", 8) == "日本語日\n本語"
    assert wrapped("ab 日本", 6) == "ab 日\n本"
    assert wrapped("x" * 25, 10) == "x" * 25  # no place to break: the terminal does


def test_text_that_goes_to_a_file_is_not_wrapped():
    out = io.StringIO()
    Terminal(out, io.StringIO()).say("word " * 100)
    assert out.getvalue() == "word " * 100


def test_the_last_word_of_an_answer_is_shown(monkeypatch):
    out = Tty()
    terminal = Terminal(out, io.StringIO())
    terminal.say("The end")
    assert out.getvalue() == "The"
    terminal.end_answer()
    assert out.getvalue() == "The end\n"


def test_lines_of_numbers_and_commands_break_between_words():
    out, err = Tty(), Tty()
    terminal = Terminal(out, err)
    terminal.note("word " * 30)
    terminal.line("word " * 30)
    for shown in (err.getvalue(), out.getvalue()):
        assert "word\nword" in shown and "wor\n" not in shown


def test_escape_codes_of_a_file_do_not_reach_the_terminal_by_any_way():
    out, err = Tty(), Tty()
    terminal = Terminal(out, err)
    for show in (terminal.line, terminal.note, terminal.error, terminal.say):
        show("a\x1b]0;title\x07b ")
    assert "\x1b]" not in out.getvalue() + err.getvalue() and "\x07" not in out.getvalue() + err.getvalue()


def test_a_busy_line_moves_and_makes_room_for_all_other_output():
    err = Tty()
    terminal = Terminal(io.StringIO(), err)
    seen = threading.Event()
    numbers = iter(range(1000))

    def text() -> str:
        number = next(numbers)
        if number == 3:
            seen.set()
        return f"step {number}"

    with terminal.busy(text):
        assert seen.wait(30)
        terminal.note("a note")
    shown = err.getvalue()
    assert "step 0" in shown and "step 2" in shown
    before = shown[: shown.index("a note")]
    assert before.endswith("\r\x1b[K\x1b[2m"), "the line is erased before the note"
    assert shown.endswith("\r\x1b[K") or shown.endswith("a note\x1b[0m\n")


def test_a_busy_line_is_gone_before_the_answer_begins_and_stays_away():
    class Both(Tty):
        pass

    screen = Both()
    terminal = Terminal(screen, screen)
    drawn = threading.Event()
    with terminal.busy(lambda: drawn.set() or "prefill"):
        assert drawn.wait(30)
        terminal.say("Hello ")
        drawn.clear()
        time.sleep(3 * terminal_module.REDRAW_S)
        assert not drawn.is_set()
        terminal.say("you ")
    assert screen.getvalue().rpartition("\x1b[K")[2] == "Hello you"


def test_a_long_prompt_shows_how_much_of_it_is_computed(monkeypatch):
    terminal = FakeTerminal(ScriptedLLM(EngineConfig(num_pages=200, max_step_tokens=64)))
    screen = terminal.session.terminal.err = Tty()
    monkeypatch.setattr(terminal_module, "REDRAW_S", 0.01)

    def wait_for_the_line(step: int) -> None:
        deadline = time.monotonic() + 60
        while step == 3 and "prefill 128 / 719\x1b[0m" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)

    terminal.llm.model.before_step = wait_for_the_line
    terminal.enter("x" * 700, "ok")
    assert "prefill 128 / 719\x1b[0m" in screen.getvalue()
    terminal.enter("y", "ok")  # a short one shows nothing
    assert " / 7" not in screen.getvalue().rpartition(" tok · ")[2]


def test_compiling_counts_outer_spans_and_is_announced_once():
    told = []
    compiled = Compilations(lambda: told.append(1))
    with compiled.silent():
        compiled._on_start()
        compiled._on_start()
        assert compiled.line().startswith("compiling kernels: 0 done") and not told
    compiled.announce()
    compiled._on_end()
    assert compiled.line().startswith("compiling kernels: 1 done")
    compiled._on_end()
    assert compiled.line() == "" and told == [1] and compiled.count == 2
    (first, last) = compiled._spans[0]
    assert compiled.seconds_between(first - 1, last + 1) == last - first
    assert compiled.seconds_between(last, last + 1) == 0
    compiled._on_start()
    compiled._on_end()
    assert told == [1]


def test_functions_that_numba_compiles_are_heard():
    numba = pytest.importorskip("numba")
    compiled = Compilations()
    compiled.watch()
    numba.njit(lambda x: x + 1)(1)
    assert compiled.count >= 1 and compiled.line() == "" and compiled.seconds_between(0, time.perf_counter()) > 0


def test_time_of_compiling_is_neither_in_tok_s_nor_in_ttft():
    terminal = FakeTerminal()
    compiled = terminal.session.compiled

    def compile_in(step: int) -> None:
        if step in (1, 3):
            compiled._on_start()
            compiled._on_end()

    terminal.llm.model.before_step = compile_in
    assert " · compiling " in terminal.enter("Hi", "abcdef")[1]
    compiled._spans = [(98.0, 99.0), (101.5, 102.5), (200.0, 201.0)]
    metrics = RequestMetrics(arrival=97.0, token_times=[101.0, 102.0, 104.0])
    output = RequestOutput("r", 0, [1, 2], [3, 4, 5], "abc", "abc", "length", None, 0, 0, None, metrics)
    turn = _turn(output, 4, 97.0, compiled)
    assert (turn.first_s, turn.decode_s, turn.compiling_s) == (3.0, 2.0, 2.0)
    numbers = stats_line(turn, 16, 64)
    assert "1.0 tok/s · TTFT 3.00 s" in numbers and numbers.endswith("compiling 2.00 s apart")


def test_a_question_waits_for_the_kernels_and_ctrl_c_ends_the_wait(monkeypatch):
    monkeypatch.setattr(stop_key, "SAME_GENERATION_S", 0.0)
    terminal = FakeTerminal()
    is_ready = threading.Event()
    monkeypatch.setattr("nanokv.engine.warm_up.warm_up", lambda engine: is_ready.wait(60))
    terminal.session.warm_up.start(terminal.llm)
    wait = terminal.session.stop.wait

    def signalled(is_done, *look):
        if not look:  # the wait for the kernels
            signal.raise_signal(signal.SIGINT)
        wait(is_done, *look)

    monkeypatch.setattr(terminal.session.stop, "wait", signalled)
    assert "stopped before the answer began" in terminal.enter("Hi")[1]
    assert terminal.said == []
    monkeypatch.setattr(terminal.session.stop, "wait", wait)
    threading.Timer(0.2, is_ready.set).start()
    assert terminal.enter("Hi", "Hello")[0] == "Hello\n"


def test_a_warm_up_compiles_all_that_a_turn_needs(tmp_path):
    import oracles

    from nanokv import LLM, SamplingParams
    from nanokv.engine.warm_up import warm_up

    folder = oracles.llama(tmp_path, head_dim=64)
    for codec in ("raw", "tq4", "kivi4"):
        with LLM(folder, codec=codec, num_pages=16) as llm:
            before = llm.stats()
            warm_up(llm.engine)
            assert llm.stats() == before
            compiled = Compilations()
            compiled.watch()
            llm.generate([oracles.prompt(100)], SamplingParams(max_tokens=4, ignore_eos=True))
            llm.generate([oracles.prompt(100)], SamplingParams(max_tokens=4, ignore_eos=True))
            assert compiled.count == 0

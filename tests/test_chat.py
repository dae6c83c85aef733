"""nanokv chat: answers, Ctrl-C, typed lines, and the command itself, on the scripted model of fake_terminal.py."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fake_terminal import VOCABULARY, FakeTerminal, ScriptedLLM, Tty

import nanokv.cli.repl.stop_key as stop_key
from nanokv import EngineConfig, SamplingParams
from nanokv.cli.main import main
from nanokv.cli.repl import reader
from nanokv.cli.repl.commands import COMMANDS, completions
from nanokv.cli.repl.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
STATS = (
    r"(\d+ tok|\^C after \d+ tok)( · [\d.]+ tok/s)?( · TTFT [\d.]+ m?s)? · prompt \d+ \(cached \d+\)"
    r" · KV \d+ tok / \d+ pages? / [\d.]+ ([KMG]i)?B"
)


@pytest.fixture
def terminal() -> FakeTerminal:
    return FakeTerminal()


# ---- answers ----------------------------------------------------------------------------------------------------


def test_an_answer_goes_to_stdout_and_its_numbers_to_stderr(terminal):
    out, err = terminal.enter("Hi", "Hello, you.")
    assert out == "Hello, you.\n"
    assert err.startswith("12 tok · ") and " · TTFT " in err and err.count("\n") == 1
    assert err.endswith(
        " · prompt 21 (cached 0) · KV 32 tok / 2 pages / 512 B\n"
    )  # 32, not 33: the last token has no K and V


def test_an_overload_is_one_line_under_the_numbers(terminal, monkeypatch):
    lines = iter(["other programs take about 60 % of the processors' time: answers are slower", ""])
    monkeypatch.setattr(terminal.session.overload, "line", lambda: next(lines))
    _, first = terminal.enter("Hi", "Hello")
    _, second = terminal.enter("Hi", "Hello")
    assert first.splitlines()[1:] == ["other programs take about 60 % of the processors' time: answers are slower"]
    assert second.count("\n") == 1


def test_numbers_have_the_form_that_the_help_describes(terminal):
    _, err = terminal.enter("Hi", "Hello")
    assert re.fullmatch(STATS, err.strip())
    assert re.match(STATS, COMMANDS["/stats"].details)


def test_the_second_turn_finds_the_first_in_the_cache(terminal):
    terminal.enter("A first question, long enough for some pages", "and an answer")
    said = len(terminal.session.conversation.token_ids)
    _, err = terminal.enter("And?", "More.")
    assert f"(cached {(said - 1) // 16 * 16})" in err


def test_characters_of_several_tokens_are_shown_whole(terminal):
    pieces = []
    terminal.session.terminal.say = pieces.append
    terminal.enter("Hi", "日本 🎉")
    assert pieces == ["日", "本", " ", "🎉"]


def test_control_characters_of_a_model_do_not_reach_a_terminal():
    out = Tty()
    Terminal(out, io.StringIO()).say("a\x1b[2Jb\x9bc\td\n")
    assert out.getvalue() == "a�[2Jb�c\td\n"
    plain = io.StringIO()
    Terminal(plain, io.StringIO()).say("a\x1b[0m")
    assert plain.getvalue() == "a\x1b[0m"


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_color_and_a_dumb_terminal_turn_colour_off(monkeypatch, name, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    err = Tty()
    Terminal(io.StringIO(), err).note("numbers")
    assert err.getvalue() == "\x1b[2mnumbers\x1b[0m\n"
    monkeypatch.setenv(name, value)
    err = Tty()
    Terminal(io.StringIO(), err).error("what")
    assert err.getvalue() == "error: what\n"


def test_logits_that_are_not_finite_are_one_error_line(terminal):
    terminal.llm.model.forward = lambda batch, pool, between=None: torch.full(
        (len(batch.logit_rows), VOCABULARY), float("nan")
    )
    out, err = terminal.enter("Hi")
    assert out == "" and terminal.said == []
    assert err.startswith("error: ") and "logits are not finite" in err and err.count("\n") == 1


def press_at(terminal: FakeTerminal, *steps: int) -> None:
    """Ctrl-C in the middle of these steps."""
    terminal.llm.model.before_step = lambda step: step in steps and signal.raise_signal(signal.SIGINT)


@pytest.fixture
def no_grace(monkeypatch):
    monkeypatch.setattr(stop_key, "SAME_GENERATION_S", 0.0)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(terminal, no_grace):
    press_at(terminal, 3)
    out, err = terminal.enter("Hi", "abcdef")
    assert out == "abc\n" and err.startswith("^C after 3 tok · ")
    assert terminal.said == [("user", "Hi"), ("assistant", "abc")]
    press_at(terminal)
    out, err = terminal.enter("Go on", "def")
    assert out == "def\n" and "(cached 16)" in err
    assert terminal.said[-1] == ("assistant", "def")


def test_ctrl_c_stops_between_the_chunks_of_a_long_prompt(terminal, no_grace):
    press_at(terminal, 2)
    out, err = terminal.enter("x" * 300, "never said")
    assert out == "\n" and err.startswith("^C after 0 tok · prompt ") and "KV 128 tok" in err
    assert terminal.said == [("user", "x" * 300), ("assistant", "")]
    press_at(terminal)
    assert terminal.enter("/regen", "now")[0] == "now\n"


def test_a_second_ctrl_c_leaves_with_130(terminal, no_grace, monkeypatch):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    terminal.llm.model.before_step = lambda step: step == 2 and [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    terminal.llm.model.will_say("abcdef")
    with pytest.raises(Left, match="130"):
        terminal.session.handle("Hi")


def test_the_prompt_returns_only_after_the_time_of_a_double_press(terminal, monkeypatch):
    monkeypatch.setattr(stop_key, "SAME_GENERATION_S", 0.2)
    press_at(terminal, 1)
    began = time.perf_counter()
    terminal.enter("Hi", "abc")
    assert time.perf_counter() - began >= 0.2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_step_costs_one_answer_and_nothing_else(terminal):
    terminal.enter("One", "1")

    def fail(step):
        raise ValueError("broken kernel")

    terminal.llm.model.before_step = fail
    out, err = terminal.enter("Two", "2")
    assert out == "" and err == "error: the engine could not finish this answer: ValueError: broken kernel\n"
    terminal.llm.model.before_step = lambda step: None
    assert terminal.said == [("user", "One"), ("assistant", "1")]
    assert terminal.enter("Three", "3")[0] == "3\n"


def test_a_full_context_is_one_error_line_and_nothing_is_lost():
    terminal = FakeTerminal(ScriptedLLM(max_positions=100))
    terminal.enter("Hi", "yes")
    before = terminal.said
    _, err = terminal.enter("x" * 100)
    assert err.startswith("error: the context is full: ") and "/trim" in err and err.count("\n") == 1
    assert terminal.said == before
    assert terminal.enter("Hm", "ok")[0] == "ok\n"


def test_an_answer_that_fills_the_context_says_so():
    terminal = FakeTerminal(ScriptedLLM(max_positions=60))
    out, err = terminal.enter("Hi", "a" * 100)
    assert len(out) > 10 and "cut: context full" in err and "the context is full: /trim" in err


def test_an_answer_cut_at_max_tokens_says_so(terminal):
    terminal.enter("/set max_tokens 3")
    assert terminal.enter("Hi", "abcdef")[1].endswith(" · cut at max_tokens 3\n")


# ---- reading ------------------------------------------------------------------------------------------------------


def read_lines(monkeypatch, *lines: str) -> list[str | None]:
    """The messages that these lines make."""
    waiting = list(lines)

    def line(prompt: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setenv("NANOKV_NOHISTORY", "1")
    source = reader.LineReader(completions, pytest.fail)
    messages = []
    while (message := source.read()) is not None:
        messages.append(message)
    return messages


@pytest.mark.parametrize(
    "lines, messages",
    [
        (["one", "two"], ["one", "two"]),
        (['"""', "a", "", "b", '"""', "c"], ["a\n\nb", "c"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""a"""'], ["a"]),
        (['he said """x'], ['he said """x']),
        (['/set system """a', 'b"""'], ["/set system a\nb"]),
        (['"""', "/etc/passwd", '"""'], ["//etc/passwd"]),
    ],
)
def test_the_lines_of_a_block_become_one_message(monkeypatch, lines, messages):
    assert read_lines(monkeypatch, *lines) == messages


def test_ctrl_d_inside_a_block_drops_the_block_and_stays(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        read_lines(monkeypatch, '"""', "a")


def test_the_history_file_is_private(monkeypatch, tmp_path):
    pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("NANOKV_NOHISTORY", raising=False)
    reader.LineReader(completions, pytest.fail)
    path = tmp_path / "nanokv" / "history"
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "blocked").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "blocked"))
    notes = []
    reader.LineReader(completions, notes.append)
    assert len(notes) == 1 and notes[0].startswith("history is off: ")


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `nanokv chat` on a scripted model that says "An answer." """
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.2, "top_p": 0.9}')
    made = []

    def scripted(folder, config, disagg):
        made.append(ScriptedLLM(EngineConfig(num_pages=200)))
        made[-1].asked_config = config
        made[-1].model.will_say("An answer.")
        made[-1].model.before_step = run.before_step
        submit = made[-1].engine.add_request
        made[-1].engine.add_request = lambda request, sink=None: (
            setattr(made[-1], "request", request),
            submit(request, sink),
        )[1]
        return made[-1]

    monkeypatch.setattr("nanokv.llm.LLM", scripted)

    def run(*options: str, stdin: str | bytes | None = None):
        result = CliRunner().invoke(main, ["chat", str(tmp_path), *options], input=stdin)
        result.llm = made[-1] if made else None
        return result

    run.before_step = lambda step: None
    return run


def asked(result) -> str:
    return result.llm.tokenizer.decode(result.llm.request.prompt_token_ids)


def test_a_prompt_gives_one_plain_answer(command):
    result = command("-p", "Hi", "--system", "Be brief.")
    assert result.exit_code == 0 and result.stdout == "An answer.\n"
    assert result.stderr.startswith("11 tok · ") and result.stderr.count("\n") == 1
    assert asked(result) == "system\nBe brief.\nuser\nHi\nassistant\n"
    params = result.llm.request.params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.2, 0.9, 1024)


def test_options_override_what_the_model_recommends(command):
    chosen = {"temperature": 0, "top-k": 5, "top-p": 0.5, "min-p": 0.1, "seed": 3, "max-tokens": 4, "page-size": 8}
    options = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
    result = command("-p", "Hi", "--no-stats", "--no-prefix-cache", *options)
    assert result.exit_code == 0 and result.stdout == "An a\n" and result.stderr == ""
    assert result.llm.request.params == SamplingParams(
        temperature=0, top_k=5, top_p=0.5, min_p=0.1, seed=3, max_tokens=4
    )
    assert result.llm.asked_config.page_size == 8 and not result.llm.asked_config.prefix_cache


def test_a_pipe_is_a_prompt_and_a_document_after_one(command):
    assert asked(command(stdin="From the pipe 🎉")) == "user\nFrom the pipe 🎉\nassistant\n"
    assert asked(command("-p", "Summarise:", stdin="a text")) == "user\nSummarise:\n\na text\nassistant\n"


def test_the_mark_and_the_line_ends_of_windows_are_no_part_of_a_piped_text(command):
    assert asked(command(stdin="\ufeffone\r\ntwo".encode())) == "user\none\ntwo\nassistant\n"


def test_bad_bytes_on_the_pipe_are_one_error_line(command):
    result = command(stdin=b"abc\xff\xfe")
    assert result.exit_code == 1 and result.stdout == "" and result.llm is None
    assert result.stderr == "nanokv: stdin: not valid UTF-8 at byte 3 (0xff)\n"


def test_a_byte_order_mark_is_no_part_of_the_prompt(command):
    assert asked(command(stdin="\ufeffHi\r\nyou".encode())) == "user\nHi\nyou\nassistant\n"


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_a_pipe_without_an_end_is_one_error_line():
    call = [sys.executable, "-m", "nanokv.cli.main", "chat", str(ROOT / "weights" / "tiny-gqa")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/zero", "rb") as zeros:
        result = subprocess.run(call, stdin=zeros, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and result.stderr == "nanokv: stdin: more than 64 MiB, which no context holds\n"


@pytest.mark.parametrize("options, stdin", [((), ""), ((), " \n"), (("-p", ""), None), (("-p", " "), "")])
def test_an_empty_prompt_is_an_error(command, options, stdin):
    result = command(*options, stdin=stdin)
    assert result.exit_code == 1 and "the prompt is empty" in result.stderr and result.llm is None


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--page-size", "3"], "--page-size 3"),
        (["--kv-memory", "much"], "--kv-memory 'much'"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_option_is_a_usage_error(command, options, complaint):
    result = command("-p", "Hi", *options)
    assert result.exit_code == 2 and complaint in result.stderr and result.stderr.count("\n") == 1


def test_an_unknown_model_is_one_error_line():
    result = CliRunner().invoke(main, ["chat", "no-such-model", "-p", "Hi"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "no-such-model" in result.stderr


def test_ctrl_c_in_a_one_shot_answer_exits_130(command, no_grace):
    command.before_step = lambda step: step == 3 and signal.raise_signal(signal.SIGINT)
    result = command("-p", "Hi")
    assert result.exit_code == 130 and result.stdout == "An \n" and result.stderr.startswith("^C after 3 tok")


def test_a_failed_step_shows_its_traceback_only_with_debug():
    program = """if True:
        import sys
        from nanokv.cli.main import main
        from nanokv.models.decoder import Decoder

        def fails(self, batch, store, between=None):
            raise ValueError("a bug")

        Decoder.forward = fails
        for options in ([], ["--debug"]):
            try:
                main(["chat", sys.argv[1], "-p", "Hi", *options])
            except SystemExit as left:
                print("exit", left.code, file=sys.stderr)
    """
    folder = str(ROOT / "weights" / "tiny-gqa")
    call = [sys.executable, "-c", program, folder]
    result = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert result.stdout == ""
    plain, debug, rest = result.stderr.split("exit 1\n")
    for said in (plain, debug):
        assert said.splitlines()[-1].endswith("could not finish this answer: ValueError: a bug")
    assert "Traceback" not in plain and "Traceback" in debug and rest == ""


def test_the_default_model_is_pulled_where_it_is_missing(monkeypatch, tmp_path):
    pulled = []
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path))
    monkeypatch.setattr("nanokv.hub.pull.pull", lambda what, **options: pulled.append(what) or tmp_path)
    result = CliRunner().invoke(main, ["chat", "-p", "Hi"])
    assert pulled == ["smollm2-135m-instruct"]
    assert result.exit_code == 1  # the mock pulled nothing, and the folder says so


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from nanokv.cli.main import main\n"
        "try: main(['chat', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numba', 'rich', 'jinja2', 'huggingface_hub', 'readline'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_a_wrong_choice_of_kernels_names_the_allowed_ones(command):
    result = command("-p", "Hi", "--kernels", "fast")
    assert result.exit_code == 2 and "'auto', 'reference'" in result.stderr

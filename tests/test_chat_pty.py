"""nanokv chat as a user meets it: the real command and SmolLM2 in a pseudo-terminal."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds: long enough for a slow machine
STATS = re.compile(
    r"(?P<tok>\d+) tok( · [\d.]+ tok/s)? · TTFT [\d.]+ m?s · prompt (?P<prompt>\d+) \(cached (?P<cached>\d+)\)"
    r" · KV \d+ tok / \d+ pages? / [\d.]+ [KMG]iB"
)
STOPPED = re.compile(r"\^C after (?P<tok>\d+) tok · ")
PASTE_MODE = r"\x1b\[\?2004[hl]\r?"
LONG = "Tell me a long story about a dragon, a river and a king."


def hear_ctrl_c() -> None:
    """A shell makes background jobs ignore Ctrl-C, and their child processes inherit that. This undoes it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Chat:
    """`nanokv chat` on a terminal of 200 columns, at its first prompt."""

    def __init__(self, folder, home, *options, columns=200, **environment) -> None:
        variables = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "xterm", **environment}
        if "NO_COLOR" not in environment:
            variables.pop("NO_COLOR", None)
        command = [
            "-m",
            "nanokv.cli.main",
            "chat",
            str(folder),
            "--temperature",
            "0",
            "--kv-memory",
            "128MiB",
            *options,
        ]
        self.process = pexpect.spawn(
            sys.executable, command, env=variables, encoding="utf-8", timeout=PATIENCE, dimensions=(40, columns),
            preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        self.transcript = ""
        self.prompt()

    def expect(self, pattern) -> re.Match:
        self.process.expect(pattern)
        self.transcript += self.process.before + self.process.after
        return self.process.match

    def prompt(self) -> str:
        """The output before the next prompt, without readline's switches of the paste mode."""
        self.expect(re.escape(">>> "))
        return re.sub(PASTE_MODE, "", self.process.before)

    def enter(self, text: str) -> str:
        """Types a line. Returns the output until the next prompt, without the line itself."""
        self.process.sendline(text)
        return self.prompt().partition("\n")[2]

    def ask(self, text: str) -> re.Match:
        """Types a line. Returns the numbers of its answer."""
        shown = self.enter(text)
        numbers = STATS.search(shown)
        assert numbers, shown
        return numbers

    def ended(self) -> int | None:
        self.process.expect(pexpect.EOF)
        self.transcript += self.process.before
        self.process.close()
        return self.process.exitstatus


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def running(smollm2, home):
    chat = Chat(smollm2, home)
    yield chat
    chat.process.close(force=True)


@pytest.fixture
def chat(running) -> Chat:
    """One process for most tests, with a new conversation for each."""
    running.enter("/clear")
    running.enter("/set max_tokens 12")
    return running


def test_an_answer_streams_and_the_next_turn_finds_it_in_the_cache(chat):
    first = chat.ask("What is the capital of France?")
    second = chat.ask("And of Italy?")
    assert int(second["cached"]) >= int(first["prompt"]) // 16 * 16 > 0
    assert int(second["prompt"]) > int(first["prompt"]) + int(first["tok"])


def test_the_numbers_are_dim(chat):
    assert re.search(r"\x1b\[2m\d+ tok · ", chat.enter("Hi"))


def test_ctrl_c_stops_an_answer_and_the_session_goes_on(chat):
    chat.enter("/set max_tokens 1000")
    chat.process.sendline(LONG)
    chat.expect("\n")
    chat.expect(r"[a-z]+ [a-z]+ [a-z]+")
    chat.process.sendintr()
    stopped = chat.expect(STOPPED)
    assert 0 < int(stopped["tok"]) < 1000
    chat.prompt()
    assert "0 held" in chat.enter("/cache")
    chat.enter("/set max_tokens 5")
    assert int(chat.ask("Go on.")["cached"]) > 0
    messages = chat.enter("/show messages")
    assert messages.count("[user]") == messages.count("[assistant]") == 2


def test_an_unknown_command_is_an_error_line_and_never_a_message(chat):
    shown = chat.enter("/claer")
    assert "error: unknown command /claer; did you mean /clear?" in shown and shown.count("\n") == 1
    assert chat.enter("/show messages") == ""


def test_a_block_of_several_lines_is_one_message(chat):
    for line in ('"""', "First line", ""):
        chat.process.sendline(line)
        chat.expect(re.escape("... "))
    chat.ask('last line"""')
    assert "[user] First line\r\n\r\nlast line\r\n" in chat.enter("/show messages")


def test_emoji_and_cjk_are_read_and_shown_whole(chat):
    chat.enter("/set max_tokens 24")
    chat.ask("Repeat this text exactly, nothing else: 日本語 🎉 naïve")
    shown = chat.enter("/show messages")
    question = shown.split("[assistant]")[0]  # the answer may be cut in the middle of a character
    assert "日本語 🎉 naïve" in question and "\ufffd" not in question


def test_undo_then_regen_answers_the_turn_before(chat):
    chat.ask("Name one colour.")
    before = chat.enter("/show messages")
    chat.ask("Name one animal.")
    assert "1 turn left" in chat.enter("/undo")
    again = STATS.search(chat.enter("/regen"))
    assert int(again["cached"]) > 0
    assert chat.enter("/show messages") == before  # greedy: the same answer


def test_ctrl_c_at_the_prompt_drops_the_line_or_says_how_to_leave(chat):
    chat.process.send("half a li")
    chat.expect("half a li")
    chat.process.sendintr()
    assert "leave" not in chat.prompt()
    chat.process.sendintr()
    assert "Use Ctrl-D or /bye to leave." in chat.prompt()
    assert chat.enter("/show messages") == ""


def echoes(chat) -> bool:
    import termios

    return bool(termios.tcgetattr(chat.process.child_fd)[3] & termios.ECHO)


def test_text_typed_during_an_answer_waits_for_the_next_prompt(chat):
    chat.enter("/set max_tokens 60")
    chat.process.sendline(LONG)
    chat.expect("\n")
    chat.expect(r"[a-z]+ [a-z]+ [a-z]+")
    assert not echoes(chat)
    chat.process.send("/set top")
    chat.process.send("_k")
    chat.expect(STATS)
    assert "/set" not in chat.process.before
    chat.expect(re.escape(">>> /set top_k"))
    assert "top_k = 0" in chat.enter("")


def test_a_long_paste_shows_its_progress_until_the_answer_begins(chat):
    chat.enter("/set max_tokens 3")
    chat.process.send("\x1b[200~" + "The river runs to the sea.\n" * 200 + "\x1b[201~\r")
    chat.expect(r"prefill [\d,]+ / 1,[\d,]+")
    shown = chat.expect(STATS)
    assert int(shown["prompt"]) > 1000 and shown.string.count("\x1b[K") >= 1
    chat.prompt()


@pytest.fixture(scope="module", params=["NO_COLOR", "TERM"])
def plain(request, home):
    """A chat with a small model on a narrow terminal without colour."""
    value = {"NO_COLOR": "1"} if request.param == "NO_COLOR" else {"TERM": "dumb"}
    chat = Chat(ROOT / "weights" / "tiny-gqa", home, "--max-tokens", "40", columns=60, **value)
    yield chat
    chat.process.close(force=True)


def test_a_pasted_text_is_one_message_without_colour_too(plain):
    plain.enter("/clear")
    plain.process.send("\x1b[200~Anna has a red house.\nBen has a blue boat.\nWhat has Ben?\x1b[201~")
    plain.process.send("\r")
    plain.expect(r"cached \d+\)")
    plain.prompt()
    messages = plain.enter("/show messages")
    assert messages.count("[user]") == 1 and "house.\r\nBen has" in messages
    assert "\x1b[" not in re.sub(PASTE_MODE, "", plain.transcript)


def test_answers_and_numbers_keep_words_whole_at_the_edge(plain):
    plain.enter("/clear")
    lines = [line.rstrip() for line in plain.enter("Tell me a story.").split("\r\n")]
    assert len(lines) > 2 and all(len(line) <= 60 for line in lines)
    assert " tok/s" in " ".join(lines)
    whole = " ".join(lines).split(" tok ")[0].rpartition(" ")[0]
    assert whole in " ".join(plain.enter("/show messages").split("\r\n"))


def test_ctrl_d_in_a_block_drops_it_and_adds_no_empty_lines(plain):
    for line in ('"""', "half a thought"):
        plain.process.sendline(line)
        plain.expect(re.escape("... "))
    plain.process.sendeof()
    plain.prompt()
    for _ in range(2):
        assert plain.enter("/set top_k") == "top_k = 0\r\n"
    assert "half a thought" not in plain.enter("/show messages")


@pytest.mark.slow
def test_a_first_run_says_that_it_compiles_and_leaves_when_asked(tmp_path):
    def first_run(**environment) -> Chat:
        cache = tmp_path / str(len(list(tmp_path.iterdir())))
        return Chat(ROOT / "weights" / "tiny-gqa", tmp_path, NUMBA_CACHE_DIR=str(cache), **environment)

    chat = first_run()
    chat.process.sendline("What is red?")
    chat.expect(r"compiling kernels: \d+ done in \d+ s")
    chat.expect(r"compiling kernels: 1\d done in \d+ s")
    numbers = chat.expect(STATS)
    assert " · compiling " in chat.process.readline()
    assert numbers
    chat = first_run(NO_COLOR="1")
    chat.process.sendline("What is red?")
    chat.expect("compiling kernels, once for each dtype and codec")
    chat = first_run()
    chat.process.sendeof()  # the kernels are being compiled
    began = time.monotonic()
    assert chat.ended() == 0 and time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_terminal_shows_typed_text_again_however_a_chat_ends(smollm2, tmp_path, number):
    chat = Chat(smollm2, tmp_path, "--max-tokens", "1000")
    assert not echoes(chat)  # readline's own mode
    chat.process.sendline(LONG)
    chat.expect("\n")
    chat.expect(r"[a-z]+ [a-z]+ [a-z]+")
    chat.process.kill(number)
    time.sleep(0.1)
    if number == signal.SIGINT:
        chat.process.kill(number)
    chat.process.expect(pexpect.EOF)
    assert echoes(chat)


@pytest.mark.slow
def test_a_plain_session_has_no_colour_and_ctrl_d_leaves(smollm2, home):
    chat = Chat(smollm2, home, "--max-tokens", "3", NO_COLOR="1")
    chat.ask("Hi")
    chat.enter("/nonsense")
    chat.process.sendeof()
    assert chat.ended() == 0
    assert "\x1b" not in re.sub(PASTE_MODE, "", chat.transcript)
    history = home / "nanokv" / "history"
    assert "Hi\n/nonsense\n" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_ctrl_c_twice_leaves_with_130(smollm2, tmp_path):
    chat = Chat(smollm2, tmp_path, NANOKV_NOHISTORY="1")
    chat.process.sendline(LONG)
    chat.expect("\n")
    chat.expect(r"[a-z]+ [a-z]+ [a-z]+")
    chat.process.sendintr()
    time.sleep(0.1)  # two signals at once would be one
    chat.process.sendintr()
    assert chat.ended() == 130
    assert "the conversation is gone (/save FILE keeps one, before leaving)" in chat.transcript
    assert list(tmp_path.iterdir()) == []  # no history file, as asked


@pytest.mark.slow
def test_two_turns_are_prefilled_in_another_process(smollm2, tmp_path):
    log, question = tmp_path / "events.jsonl", "Which of these is a river: " + "the Rhine, the Alps, Berlin, " * 12
    chat = Chat(smollm2, tmp_path, "--disagg", "--max-tokens", "6", "--event-log", str(log))
    first = chat.ask(question)
    second = chat.ask("And which is a city? " + question)
    assert "prefilled in another process" in chat.transcript
    assert int(second["cached"]) >= int(first["prompt"]) // 16 * 16 > 0
    chat.process.sendline("/bye")
    assert chat.ended() == 0
    assert log.read_text().count('"transfer"') == 2

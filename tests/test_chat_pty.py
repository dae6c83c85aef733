"""nanokv chat as a user meets it: the real command and SmolLM2 in a pseudo-terminal."""

import os
import re
import signal
import sys
import time

import pytest

pexpect = pytest.importorskip("pexpect")

PATIENCE = 120  # seconds: long enough for a slow machine
STATS = re.compile(
    r"(?P<tok>\d+) tok( · [\d.]+ tok/s)? · TTFT [\d.]+ m?s · prompt (?P<prompt>\d+) \(cached (?P<cached>\d+)\)"
    r" · KV \d+ tok / \d+ pages? / [\d.]+ [KMG]iB"
)
STOPPED = re.compile(r"\^C after (?P<tok>\d+) tok · ")
LONG = "Tell me a long story about a dragon, a river and a king."


def hear_ctrl_c() -> None:
    """A shell makes background jobs ignore Ctrl-C, and their child processes inherit that. This undoes it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Chat:
    """`nanokv chat` on a terminal of 200 columns, at its first prompt."""

    def __init__(self, folder, home, *options, **environment) -> None:
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
            sys.executable, command, env=variables, encoding="utf-8", timeout=PATIENCE, dimensions=(40, 200),
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
        return re.sub(r"\x1b\[\?2004[hl]\r?", "", self.process.before)

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
    assert "日本語 🎉 naïve" in shown and "\ufffd" not in chat.transcript


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


@pytest.mark.slow
def test_a_plain_session_has_no_colour_and_ctrl_d_leaves(smollm2, home):
    chat = Chat(smollm2, home, "--max-tokens", "3", NO_COLOR="1")
    chat.ask("Hi")
    chat.enter("/nonsense")
    chat.process.sendeof()
    assert chat.ended() == 0
    assert "\x1b" not in chat.transcript
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

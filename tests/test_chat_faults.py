"""No entry ends a chat: faulty commands, files and texts are one line each, and the conversation stays."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_terminal import FakeTerminal, ScriptedLLM

import nanokv.cli.repl.stop_key as stop_key
from nanokv.cli.repl import fitting, saving
from nanokv.cli.repl.fitting import count_tokens, longest_token
from nanokv.core.errors import RequestError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def terminal(monkeypatch) -> FakeTerminal:
    monkeypatch.setattr(stop_key, "SAME_GENERATION_S", 0.0)
    return FakeTerminal()


def saved(**change) -> dict:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"format": "nanokv-chat", "version": 1, "model": "m", "settings": {}, "messages": turns} | change


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), RecursionError("deep"), MemoryError(), KeyError("x")])
def test_an_unexpected_error_is_one_line_and_keeps_the_conversation(terminal, monkeypatch, error):
    terminal.enter("Zero", "0")
    terminal.enter("One", "1")

    def fail(*args, **named):
        raise error

    monkeypatch.setattr(terminal.session.conversation.tokenizer, "render", fail)
    before = terminal.said
    for line in ("Two", "/regen", "/trim"):
        _, err = terminal.enter(line)
        assert err.startswith(f"error: unexpected {type(error).__name__}: ") and err.count("\n") == 1, line
        assert terminal.said == before
    monkeypatch.undo()
    assert terminal.enter("Three", "3")[0] == "3\n"


def test_a_broken_pipe_still_ends_the_chat(terminal, monkeypatch):
    def fail(*args, **named):
        raise BrokenPipeError

    monkeypatch.setattr(terminal.session.terminal, "line", fail)
    with pytest.raises(BrokenPipeError):
        terminal.session.handle("/show")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, json.dumps(saved(messages=["x"]))[:-1]])
def test_no_json_file_ends_the_chat(terminal, tmp_path, text):
    (tmp_path / "chat.json").write_text(text)
    _, err = terminal.enter(f"/load {tmp_path / 'chat.json'}")
    assert err.startswith(f"error: {tmp_path / 'chat.json'}: not a saved chat: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (
            {"messages": [{"role": "user", "content": "caf\ud800"}, {"role": "assistant", "content": "b"}]},
            "messages[0]",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\udfff"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": "a", "\ud800": 1}, {"role": "assistant"}]}, "messages[1]"),
        ({"model": "\ud800"}, "model"),
        ({"settings": {"stop": ["\ud800"]}}, "settings"),
    ],
)
def test_half_a_character_is_refused_at_load_by_name(terminal, tmp_path, change, name):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(saved(**change)))
    _, err = terminal.enter(f"/load {path}")
    assert err.startswith(f"error: {path}: {name}") and err.count("\n") == 1 and terminal.said == []


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"\x00\xff",
        saved(version=2),
        saved(settings={"temperature": float("nan")}),
        saved(settings={"stop": 3}),
        saved(messages=[{"role": "assistant", "content": "x"}]),
        saved(messages=[{"role": "wizard", "content": "x"}]),
        saved(messages=[{"role": "system", "content": 1}]),
        saved(messages=[{"role": "user", "content": [1]}, {"role": "assistant", "content": "x"}]),
        saved(messages=[{"role": "user", "content": "no answer"}]),
    ],
)
def test_every_error_of_load_names_the_file(terminal, tmp_path, document):
    path = tmp_path / "case.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    _, err = terminal.enter(f"/load {path}")
    assert err.startswith(f"error: {path}: ") and err.count("\n") == 1 and "unexpected" not in err
    assert terminal.said == [] and "saved to" in terminal.enter(f"/save {tmp_path / 'out'}")[1]


def test_a_chat_that_cannot_be_written_stays(terminal, tmp_path, monkeypatch):
    terminal.enter("One", "1")
    terminal.session.model = "\ud800"
    for path in (tmp_path / "x.json", tmp_path / "a\x00b", tmp_path / ("n" * 300)):
        assert "cannot be written" in terminal.enter(f"/save {path}")[1]
    assert terminal.said[0] == ("user", "One") and list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_saves_and_never_overwrites(terminal, tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "chat.json"
    assert f"saved to {path}" in terminal.enter(f"/save {path}")[1]
    assert "exists already" in terminal.enter(f"/save {path}")[1]
    assert list(tmp_path.iterdir()) == [path]


# ---- texts that are too long ----------------------------------------------------------------------------------------


@pytest.fixture
def no_encoding(terminal, monkeypatch):
    monkeypatch.setattr(terminal.session.conversation.tokenizer, "encode", pytest.fail)
    monkeypatch.setattr(terminal.session.conversation.tokenizer, "render", pytest.fail)


def test_a_file_too_large_for_any_tokens_is_refused_unread(terminal, tmp_path, no_encoding):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)  # a sparse file
    began = time.perf_counter()
    _, err = terminal.enter(f"/read {tmp_path / 'huge'}")
    assert "1,099,511,627,776 bytes; tokens have at most" in err and "1,023 more fit" in err
    assert "16 MiB" in terminal.enter(f"/load {tmp_path / 'huge'}")[1]
    assert time.perf_counter() - began < 30


def test_a_message_too_large_for_any_tokens_is_refused_unencoded(terminal, no_encoding):
    _, err = terminal.enter("x" * 10_000_000)
    assert "the context is full: 10,000,000 characters" in err and "/trim" in err and terminal.said == []


def test_counting_ends_where_no_more_fits(terminal, monkeypatch):
    monkeypatch.setattr(fitting, "PIECE", 100)
    tokenizer, stop = terminal.session.conversation.tokenizer, terminal.session.stop
    assert longest_token(tokenizer) >= 1
    assert count_tokens(tokenizer, "x" * 1000, 250, stop) == (300, False)
    assert count_tokens(tokenizer, "x" * 1000, 5000, stop) == (1000, True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_at_once(terminal, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/stdin"):
        for command in ("/read", "/load"):
            assert "not a regular file" in terminal.enter(f"{command} {path}")[1] or path == "/dev/stdin"
    assert "Is a directory" in terminal.enter(f"/read {tmp_path}")[1]


def test_ctrl_c_is_heard_while_a_text_is_encoded(terminal, monkeypatch, tmp_path):
    done = threading.Event()
    tokenizer = terminal.session.conversation.tokenizer

    def encode(*_: object) -> list[int]:  # in the thread of StopKey.run
        signal.raise_signal(signal.SIGINT)
        done.wait(60)
        return [1]

    for name in ("encode", "render"):
        monkeypatch.setattr(tokenizer, name, encode)
    (tmp_path / "notes").write_text("a text")
    for line in ("a long text", f"/read {tmp_path / 'notes'}"):
        began = time.perf_counter()
        assert "stopped before the answer began" in terminal.enter(line)[1]
        assert time.perf_counter() - began < 30 and terminal.said == []
    done.set()


def test_ctrl_c_while_typing_is_hidden_stops_the_entry_alone(terminal, monkeypatch):
    restored = []

    def hide():
        signal.raise_signal(signal.SIGINT)
        return lambda: restored.append(True)

    monkeypatch.setattr(stop_key, "hide_typing", hide)
    before = signal.getsignal(signal.SIGTERM)
    err = terminal.enter("Hi", "Hello")[1]
    assert ("stopped before the answer began" in err or "^C after 1 tok" in err) and restored == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_growing_file_is_cut_off(tmp_path):
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    with pytest.raises(RequestError, match="more than 3 bytes; why"):
        saving.read_text(Path("/proc/self/environ"), 3, "why")


# ---- a full context -------------------------------------------------------------------------------------------------


def filled() -> FakeTerminal:
    terminal = FakeTerminal(ScriptedLLM(max_positions=400), system="You are a patient and thorough teacher of sums.")
    for number in range(5):
        terminal.enter(f"Question number {number}?", "The answer is long enough.")
    return terminal


def test_trim_drops_the_oldest_turns_and_keeps_the_system_message():
    terminal = filled()
    _, err = terminal.enter("/trim 2")
    assert err.startswith("oldest 2 turns removed; 3 turns left: ")
    assert terminal.said[0][0] == "system" and terminal.said[1] == ("user", "Question number 2?")
    assert terminal.enter("And now?", "Fine.")[0] == "Fine.\n"
    terminal.enter("/undo 4")
    assert [role for role, _ in terminal.said] == ["system"]
    assert "nothing to trim" in terminal.enter("/trim")[1]


def test_trim_tells_what_the_prefix_tree_keeps():
    terminal = filled()
    _, err = terminal.enter("/trim 1")
    tokens = terminal.session.conversation.token_ids
    kept = int(err.split(" of them cached")[0].split()[-1])
    assert f"{len(tokens)} tokens, {kept} of them cached, {len(tokens) - kept} to compute again" in err
    assert 0 < kept < 80  # the system message, in whole pages
    _, numbers = terminal.enter("And now?", "Fine.")
    assert f"(cached {kept})" in numbers


def test_trim_alone_leaves_half_of_the_context_free_and_a_full_one_goes_on():
    terminal = FakeTerminal(ScriptedLLM(max_positions=200))
    terminal.enter("One", "a" * 40)
    terminal.enter("Two", "b" * 40)
    _, err = terminal.enter("Three", "c" * 100)
    assert "/trim removes the oldest turns" in err
    assert "/trim" in terminal.enter("Four")[1]
    terminal.enter("/trim")
    assert 0 < len(terminal.session.conversation.token_ids) <= 100 or terminal.said == []
    assert terminal.enter("Four", "d")[0] == "d\n"


@pytest.mark.parametrize("line", ["/trim x", "/trim 0", "/trim 99", "/trim -1", "/undo 99", "/undo 1.5"])
def test_a_wrong_number_of_turns_names_the_right_ones(line):
    terminal = filled()
    before = terminal.said
    _, err = terminal.enter(line)
    assert err == f"error: {line}: expected a number of turns, 1 to 5\n" and terminal.said == before


# ---- settings -------------------------------------------------------------------------------------------------------


def test_a_setting_is_shown_alone_and_none_restores_the_start(terminal):
    assert terminal.enter("/set temperature")[1] == "temperature = 0\n"
    terminal.enter("/set max_tokens 7")
    assert terminal.enter("/set max_tokens")[1] == "max_tokens = 7\n"
    assert terminal.enter("/set num_predict none")[1] == "max_tokens = 100\n"
    assert "no such parameter" in terminal.enter("/set colour")[1]
    assert terminal.enter("/set system Be brief.")[1] == "system message: Be brief.\n"
    assert terminal.enter("/set system none")[1] == "system message: none; the chat template decides\n"
    assert terminal.session.conversation.system is None


# ---- systems --------------------------------------------------------------------------------------------------------


def test_a_chat_needs_no_module_of_posix():
    program = """if True:
        import os, sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name in ("termios", "tty", "fcntl", "readline", "pwd", "grp", "resource"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Missing())
        for name in ("termios", "tty", "fcntl", "readline", "pwd", "grp", "resource"):
            sys.modules.pop(name, None)
        for name in ("tcgetpgrp", "getpgrp", "mkfifo", "posix_fadvise", "sysconf", "getuid"):
            delattr(os, name)
        from nanokv.cli.main import main
        main()
    """
    environment = {**os.environ, "NANOKV_NOHISTORY": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    folder = str(ROOT / "weights" / "tiny-gqa")
    call = [sys.executable, "-c", program, "chat", folder, "-p", "Hi", "--max-tokens", "2", "--kv-memory", "8MiB"]
    result = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr

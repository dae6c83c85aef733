"""Between two answers: slash commands, settings, saved chats, the drawing of the cache."""

import json
import os
import random
from array import array

import pytest
from fake_terminal import FakeTerminal
from rich.cells import cell_len

from nanokv import SamplingParams
from nanokv.cache.radix import RadixTree
from nanokv.cli.repl import cache_view, settings
from nanokv.cli.repl.commands import COMMANDS, completions
from nanokv.cli.repl.saving import SavedChat, load_chat, save_chat
from nanokv.core.errors import CheckpointError, RequestError


@pytest.fixture
def terminal() -> FakeTerminal:
    return FakeTerminal()


# ---- slash commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, near", [("/claer", "/clear"), ("/sho", "/show"), ("/Bye", "/bye"), ("/xyzzy", None)])
def test_an_unknown_command_is_one_error_line_and_no_message(terminal, line, near):
    out, err = terminal.enter(line)
    assert out == "" and err.startswith(f"error: unknown command {line}") and err.count("\n") == 1
    assert (f"did you mean {near}?" in err) if near else ("did you mean" not in err)
    assert terminal.said == [] and not terminal.session.leaving


def test_two_slashes_send_a_literal_one(terminal):
    terminal.enter("//etc/passwd is what?", "A file.")
    assert terminal.said[0] == ("user", "/etc/passwd is what?")


def test_empty_lines_do_nothing(terminal):
    assert terminal.enter("") == terminal.enter("   ") == ("", "")


def test_every_command_has_help_and_aliases_share_it(terminal):
    out, _ = terminal.enter("/?")
    for name in COMMANDS:
        assert name in out
        out += terminal.enter(f"/? {name[1:]}")[0]
    out += terminal.enter("/show")[0]
    assert all(len(line) <= 80 or " tok/s · " in line for line in out.splitlines())
    assert terminal.enter("/help set") == terminal.enter("/? /set")
    assert "did you mean /clear" in terminal.enter("/? claer")[1]


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit"])
def test_bye_and_its_aliases_leave(terminal, line):
    terminal.enter(line)
    assert terminal.session.leaving


def test_undo_takes_turns_back_one_by_one(terminal):
    terminal.enter("One", "1")
    terminal.enter("Two", "2")
    assert terminal.enter("/undo")[1] == "last turn removed; 1 turn left\n"
    assert terminal.said == [("user", "One"), ("assistant", "1")]
    terminal.enter("/undo")
    assert terminal.said == []
    assert terminal.enter("/undo")[1].startswith("error: nothing to undo")


def test_regen_answers_again_from_the_cache(terminal):
    assert "nothing to answer again" in terminal.enter("/regen")[1]
    terminal.enter("One", "1")
    terminal.enter("Two", "2")
    terminal.enter("/undo")
    out, err = terminal.enter("/regen", "uno")
    assert out == "uno\n" and "(cached 16)" in err
    assert terminal.said == [("user", "One"), ("assistant", "uno")]


def test_a_regen_that_fails_keeps_the_old_answer(terminal):
    terminal.enter("One", "1")
    terminal.session.params = SamplingParams(max_tokens=0)
    assert "max_tokens=0" in terminal.enter("/regen", "never")[1]
    assert terminal.said == [("user", "One"), ("assistant", "1")]


def test_clear_keeps_the_system_message_and_its_pages():
    terminal = FakeTerminal(system="You are a patient and very thorough teacher of arithmetic.")
    terminal.enter("One", "1")
    terminal.enter("/clear")
    assert terminal.said == [("system", "You are a patient and very thorough teacher of arithmetic.")]
    _, err = terminal.enter("Two", "2")
    assert "(cached 64)" in err


def test_another_system_message_changes_the_conversation_so_far(terminal):
    terminal.enter("One", "1")
    terminal.enter("/set system You are terse.")
    assert terminal.said[0] == ("system", "You are terse.")
    terminal.enter("/regen", "2")
    assert terminal.said[1:] == [("user", "One"), ("assistant", "2")]
    terminal.enter("/set system none")
    assert terminal.session.conversation.system is None


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set parameter temperature 0.7", "temperature", 0.7),
        ("/set top_k 40", "top_k", 40),
        ("/set top_p 0.5", "top_p", 0.5),
        ("/set min_p 0.1", "min_p", 0.1),
        ("/set seed 7", "seed", 7),
        ("/set seed none", "seed", None),
        ("/set num_predict 5", "max_tokens", 5),
        ("/set max_tokens 5", "max_tokens", 5),
        ("/set repetition_penalty 1.1", "repetition_penalty", 1.1),
        ('/set stop "the end" \\n', "stop", ("the end", "\n")),
        ("/set stop none", "stop", ()),
    ],
)
def test_set_changes_one_parameter(terminal, line, name, value):
    assert terminal.enter(line)[1].startswith(f"{name} = ")
    assert getattr(terminal.session.params, name) == value


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("/set temperature hot", "temperature='hot': expected a number"),
        ("/set temperature -1", "temperature=-1.0: expected a number of at least 0"),
        ("/set temperature nan", "temperature=nan: expected a number"),
        ("/set top_k 1.5", "top_k='1.5': expected an integer"),
        ("/set stop 'open", 'stop="\'open": expected texts'),
        ("/set temprature 1", "temprature: no such parameter"),
        ("/undo x", "nothing to undo: the conversation is empty"),
        ("/clear extra", "/clear extra: /clear takes no argument"),
        ("/regen 2", "/regen 2: /regen takes no argument"),
        ("/show nothing", "/show nothing: there are params"),
        ("/stats maybe", "usage: /stats, /stats on or /stats off"),
        ("/read", "usage: /read FILE"),
        ("/load", "usage: /load FILE"),
        ("/save", "usage: /save FILE"),
    ],
)
def test_a_bad_argument_is_one_error_line_and_changes_nothing(terminal, line, complaint):
    before = terminal.session.params
    _, err = terminal.enter(line)
    assert err.startswith(f"error: {complaint}") and err.count("\n") == 1
    assert terminal.session.params == before


def test_show_prints_model_parameters_and_messages(terminal):
    out, _ = terminal.enter("/show")
    for expected in ("scripted, 1 layers", "float32 on cpu", "1,024 tokens", "temperature", "system"):
        assert expected in out
    assert terminal.enter("/set")[0] == terminal.enter("/show params")[0]
    terminal.enter("One", "1")
    assert terminal.enter("/show messages")[0] == "[user] One\n[assistant] 1\n"


def test_stats_can_be_switched_off(terminal):
    terminal.enter("/stats off")
    assert terminal.enter("Hi", "Hello")[1] == ""
    terminal.enter("/stats on")
    assert "tok" in terminal.enter("Hi", "Hello")[1]


def test_the_text_of_read_precedes_the_next_message(terminal, tmp_path):
    (tmp_path / "notes.txt").write_text("Line of notes.", encoding="utf-8")
    assert "14 tokens" in terminal.enter(f"/read {tmp_path / 'notes.txt'}")[1]
    terminal.enter("What does it say?", "Notes.")
    terminal.enter("And now?", "Nothing.")
    assert [text for role, text in terminal.said if role == "user"] == [
        "Line of notes.\n\nWhat does it say?",
        "And now?",
    ]


def test_a_file_that_cannot_be_read_is_one_error_line(terminal, tmp_path):
    (tmp_path / "bad").write_bytes(b"ab\xff")
    (tmp_path / "empty").write_bytes(b" \n")
    assert "not valid UTF-8 at byte 2" in terminal.enter(f"/read {tmp_path / 'bad'}")[1]
    assert "the file is empty" in terminal.enter(f"/read {tmp_path / 'empty'}")[1]
    assert "No such file" in terminal.enter(f"/read {tmp_path / 'none'}")[1]
    assert "Is a directory" in terminal.enter(f"/read {tmp_path}")[1]
    assert terminal.session.attached == []


def test_the_tab_key_completes_commands_names_and_paths(tmp_path, monkeypatch):
    assert completions("/sh") == ["/show"]
    assert completions("/set temp") == ["/set temperature"]
    assert completions("words") == completions("/undo x") == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "novels").mkdir()
    assert completions("/read no") == ["/read notes.txt", "/read novels/"]


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_loaded_chat_continues_where_it_was_saved(terminal, tmp_path):
    path = tmp_path / "chat.json"
    terminal.enter("/set system Be kind.")
    terminal.enter("/set stop END")
    terminal.enter("One", "1 🎉")
    assert terminal.enter(f"/save {path}")[1] == f"saved to {path}\n"
    other = FakeTerminal()
    assert other.enter(f"/load {path}")[1] == f"loaded 1 turn from {path}\n"
    assert other.said == terminal.said and other.session.params == terminal.session.params
    assert other.enter("/regen", "2")[0] == "2\n"
    assert list(tmp_path.iterdir()) == [path]


def test_only_save_with_a_bang_overwrites(terminal, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("precious")
    assert f"exists already; /save! {path} overwrites it" in terminal.enter(f"/save {path}")[1]
    assert path.read_text() == "precious"
    terminal.enter(f"/save! {path}")
    assert json.loads(path.read_text())["format"] == "nanokv-chat"
    assert "No such file" in terminal.enter(f"/save {tmp_path / 'no' / 'where'}")[1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda d: d.update(format="other"), "not a saved chat"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.pop("messages"), 'expected "model"'),
        (lambda d: d.update(settings=[]), 'expected "model"'),
        (lambda d: d["settings"].update(temperature=-1), "settings: temperature=-1"),
        (lambda d: d["settings"].update(temperature="warm"), "temperature='warm'"),
        (lambda d: d["settings"].update(colour="red"), "no such parameter: colour"),
        (lambda d: d["messages"].append({"role": "assistant", "content": "x"}), "expected a message of 'user'"),
        (lambda d: d["messages"][0].update(content=3), "expected a text"),
        (lambda d: d["messages"].append({"role": "user", "content": "unanswered"}), "ends with a question"),
        (lambda d: d["messages"].append("x"), "expected a message"),
    ],
)
def test_an_invalid_saved_chat_changes_nothing(terminal, tmp_path, change, complaint):
    terminal.enter("One", "1")
    document = {
        "format": "nanokv-chat",
        "version": 1,
        "model": "m",
        "settings": {"temperature": 0.5},
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    change(document)
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(document))
    before = terminal.session.params
    _, err = terminal.enter(f"/load {path}")
    assert err.startswith("error: ") and complaint in err and err.count("\n") == 1
    assert terminal.said == [("user", "One"), ("assistant", "1")] and terminal.session.params == before


def test_a_saved_chat_that_is_not_json_is_an_error(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("{")
    with pytest.raises(RequestError, match="not JSON"):
        load_chat(path)
    path.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="not valid UTF-8"):
        load_chat(path)


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(RequestError, match="No space left"):
        save_chat(tmp_path / "chat.json", SavedChat("m", [], SamplingParams()), overwrite=False)
    assert list(tmp_path.iterdir()) == []


# ---- settings of a model ------------------------------------------------------------------------------------------


def test_defaults_come_from_generation_config(tmp_path):
    assert settings.model_defaults(tmp_path) == settings.DEFAULTS
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 7, "eos_token_id": 2}')
    assert settings.model_defaults(tmp_path) == SamplingParams(temperature=0.2, top_p=0.9, max_tokens=7)
    path.write_text('{"temperature": 0.2, "do_sample": false}')
    assert settings.model_defaults(tmp_path).temperature == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"a":' * 100_000, '{"temperature": "warm"}', '{"top_p": 3}'])
def test_a_broken_generation_config_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="generation_config"):
        settings.model_defaults(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_generation_config_that_is_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(CheckpointError, match="generation_config.json: not a regular file"):
        settings.model_defaults(tmp_path)


# ---- drawing ------------------------------------------------------------------------------------------------------


def test_cache_draws_pages_tree_and_pool(terminal):
    assert "0 tokens = 0 cached pages" in terminal.enter("/cache")[0]
    terminal.enter("Tell me something about rivers and lakes", "The Nile is long.")
    terminal.enter("/regen", "A lake is a pool of water.")
    out, _ = terminal.enter("/cache")
    assert "* shared with another branch of the tree" in out
    assert "in no page: the next turn computes them again" in out
    assert "prefix tree: 6 pages in 3 nodes" in out
    assert '"<|im_start|>user⏎Tell me' in out and "<- here" in out
    assert "pool: 200 pages of 256 B = 50.0 KiB: 6 cached, 0 held, 194 free; 0 evictions" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def width(line: str) -> int:
    return cell_len(line)


def test_a_drawing_of_any_tree_fits_80_columns():
    random_ = random.Random(0)
    tree, page = RadixTree(2), 0
    sequences = []
    for _ in range(120):
        base = random_.choice(sequences) if sequences and random_.random() < 0.8 else []
        tokens = [*base[: random_.randrange(len(base) + 1)], *(random_.randrange(3) for _ in range(40))]
        tokens = tokens[: len(tokens) // 2 * 2]
        sequences.append(tokens)
        blob = array("i", tokens).tobytes()
        node, pages = tree.match_prefix(blob)
        tree.lock(node)
        fresh = array("i", range(page, page + len(tokens) // 2 - len(pages)))
        page += 10_000
        node, _ = tree.insert(node, blob[len(pages) * 8 :], fresh)
        if random_.random() < 0.9:
            tree.unlock(node)
    for tokens in sequences:
        held, here = cache_view.pages_of(tree, tokens, 2)
        assert len(held) == len(tokens) // 2
        lines = [
            *cache_view.conversation_lines(held, len(tokens) + 1, 2),
            *cache_view.tree_lines(tree, lambda ids: "日本" * len(ids), here),
        ]
        assert max(map(width, lines)) <= 80
        assert len(lines) < 80


def test_a_long_conversation_is_drawn_in_few_lines():
    held = [cache_view.Held(page, page < 3) for page in range(100_000, 105_000)]
    lines = list(cache_view.conversation_lines(held, 5_000 * 16, 16))
    assert len(lines) < 25 and any("more pages" in line for line in lines)


def test_a_file_too_long_for_the_context_is_refused(terminal, tmp_path):
    (tmp_path / "long").write_text("x" * 2000)
    assert "2,000 tokens; 1,023 more fit" in terminal.enter(f"/read {tmp_path / 'long'}")[1]
    (tmp_path / "nearly").write_text("x" * 1020)
    terminal.enter(f"/read {tmp_path / 'nearly'}")
    assert "the files of /read are dropped" in terminal.enter("and this")[1]
    assert terminal.enter("hello", "hi")[0] == "hi\n"


def test_stats_alone_shows_the_engines_counters(terminal):
    assert "pages_total" in terminal.enter("/stats")[0]


def test_a_message_that_is_not_unicode_names_the_character(terminal):
    assert "not valid Unicode at character 4" in terminal.enter("caf \udce9")[1]


def test_parameters_may_be_spelt_as_options(terminal):
    terminal.enter("/set max-tokens 7")
    assert terminal.session.params.max_tokens == 7

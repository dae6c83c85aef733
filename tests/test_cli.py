"""The command group: help, exit codes, errors of one line, and the parts that commands share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import nanokv
from nanokv.cli import common
from nanokv.cli.main import COMMANDS, main
from nanokv.core.config import parse_bytes
from nanokv.core.errors import ConfigError, NanokvError
from nanokv.hub.home import weights_dir

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **options):
    return CliRunner().invoke(main, arguments, **options)


def test_help_lists_every_command_with_an_example():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert "Example: nanokv chat" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"  nanokv {command}" in result.stdout
    assert "--debug" in result.stdout


@pytest.mark.parametrize("command", ["chat", "bench decode", "bench codecs", "disagg prefill"])
def test_every_command_that_runs_a_model_takes_a_number_of_threads(command):
    assert "--threads N" in run(*command.split(), "--help").stdout
    wrong = run(*command.split(), "--threads", "0", *(["--listen", "127.0.0.1:7000"] if "disagg" in command else []))
    assert wrong.exit_code == 2 and "--threads 0: expected an integer of at least 1" in wrong.stderr


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys, nanokv.cli.main as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = set('torch numpy numba tokenizers jinja2 rich gguf huggingface_hub'.split()) & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_version_prints_the_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"nanokv {nanokv.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["--nonsense"], ["pull"], ["pull", "--nonsense", "x"], ["size"], ["size", "x", "--page-size", "3"]],
)
def test_a_usage_error_is_one_line_and_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "--help)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["chat", "--codec", "zip"], "nanokv chat: --codec 'zip': allowed are raw, fp8"),
        (["chat", "--codec", "kivi4", "--page-size", "16"], "nanokv chat: --page-size 16: codec kivi4"),
        (["chat", "--device", "tpu"], "nanokv chat: --device 'tpu': allowed are auto, cpu"),
        (["chat", "--dtype", "int3"], "nanokv chat: Invalid value for '--dtype'"),
        (["chat", "--kv-memory", "500TiB"], "nanokv chat: --kv-memory '500TiB': 549,755,813,888,000 bytes"),
        (["chat", "--center-keys"], "nanokv chat: --center-keys: no layer of this model writes keys in codes"),
        (["bench", "decode", "--device", "tpu"], "nanokv bench decode: --device 'tpu'"),
        (["disagg", "prefill", "--listen", "a:1", "--page-size", "3"], "nanokv disagg prefill: --page-size 3: allowed"),
    ],
)
def test_a_wrong_value_that_only_loading_finds_is_code_2_too(arguments, line):
    result = run(*arguments, str(ROOT / "weights" / "tiny-gqa"), input="Hi")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["bench", "learn", "disagg"])
def test_no_summary_of_a_command_is_cut(name):
    shown = CliRunner().invoke(main, [name, "--help"], terminal_width=50).stdout
    words = " ".join(shown.partition("Commands:")[2].split())
    for command in main.get_command(None, name).commands.values():
        assert " ".join(command.help.partition("\n\n")[0].split()) in words


def test_a_model_that_comes_along_needs_no_pull():
    result = run("pull", "tiny-gqa")
    assert result.exit_code == 0 and Path(result.stdout.strip()).name == "tiny-gqa"
    assert "comes with nanokv" in result.stderr


def test_the_bare_command_shows_its_help():
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def failing(monkeypatch, error):
    @click.command()
    def pull():
        raise error

    monkeypatch.setattr("nanokv.cli.pull.pull", pull)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (NanokvError("it is\nso"), "nanokv: it is so\n", 1),
        (ConfigError("dtype='x': no"), "nanokv: dtype='x': no\n", 1),
        (click.ClickException("plain"), "nanokv: plain\n", 1),
        (FileNotFoundError(2, "No such file", "x"), "nanokv: [Errno 2] No such file: 'x'\n", 1),
        (ZeroDivisionError("by zero"), "nanokv: unexpected ZeroDivisionError: by zero (--debug shows where)\n", 1),
        (click.UsageError("not so"), "nanokv pull: not so (see nanokv pull --help)\n", 2),
        (SystemExit(7), "", 7),
    ],
)
def test_an_error_is_one_line(monkeypatch, error, line, code):
    failing(monkeypatch, error)
    result = run("pull")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", line)


@pytest.mark.parametrize("arguments", [["--debug", "pull"], ["pull", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch, arguments):
    failing(monkeypatch, NanokvError("so"))
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("nanokv: so\n")
    assert "Traceback" not in run("pull").stderr


def test_an_interrupt_is_code_130(monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = run("pull")
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "nanokv.cli.main", "size", *["smollm2-135m-instruct"] * 1000]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 1


def test_pull_prints_the_folder(smollm2):
    result = run("pull", "smollm2-135m-instruct")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{smollm2}\n", "")


def test_the_default_model_is_pulled_where_it_is_missing(tmp_path, monkeypatch, smollm2):
    assert common.model_folder(None) == smollm2 == weights_dir() / "smollm2-135m-instruct"
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path))
    pulled = []
    monkeypatch.setattr(common, "pull_with_progress", pulled.append)
    assert common.model_folder(None) == tmp_path / "smollm2-135m-instruct"
    assert pulled == ["smollm2-135m-instruct"]


def test_progress_shows_on_a_terminal_only(capfd):
    with common.progress_bars() as report:
        report("fetch", 1, 2)
    assert capfd.readouterr() == ("", "")
    pexpect = pytest.importorskip("pexpect")
    code = (
        "import time\nfrom nanokv.cli.common import progress_bars\n"
        "with progress_bars() as report:\n"
        "    for i in range(4): report('fetch', i, 4); time.sleep(0.1)\n"
        "print('done')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    child = pexpect.spawn(sys.executable, ["-c", code], cwd=str(ROOT), env=environment, encoding="utf-8")
    child.expect("fetch.*%")
    child.expect("done")


def test_the_json_envelope_names_command_version_and_hardware(capsys):
    common.emit_json("bench decode", "some-model", {"page_size": 16}, [{"output_tokens_per_s": 1.5}])
    value = json.loads(capsys.readouterr().out)
    assert list(value) == ["command", "version", "date", "hardware", "model", "settings", "rows"]
    assert value["hardware"]["cpus"] >= 1
    assert value["hardware"]["memory_bytes"] > 2**28
    assert value["rows"] == [{"output_tokens_per_s": 1.5}]
    with pytest.raises(ValueError, match="JSON compliant"):
        common.emit_json("bench", "m", {}, [{"x": float("nan")}])


def test_a_figure_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NanokvError, match=r"pip install 'nanokv\[bench\]'"):
        common.new_figure(1, 1)


def test_a_size_is_bytes_or_a_number_with_a_unit():
    sizes = {"1T": 10**12, "2TiB": 2**41, "1.5 tb": 1500 * 10**9, "3KB": 3000, "512MiB": 2**29, "7": 7, 9: 9}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for wrong in (1.5, 1e9, True, None, "", "T", "1XB", "-1", 0, "0GiB", [1]):
        with pytest.raises(ConfigError, match="kv_memory="):
            parse_bytes(wrong, "kv_memory")


def test_bytes_are_printed_in_binary_units():
    assert [common.binary(n) for n in (0, 1023, 1024, 5.6 * 2**20, 2**30, 2**41)] == [
        "0 B", "1023 B", "1.0 KiB", "5.6 MiB", "1.0 GiB", "2.0 TiB"
    ]  # fmt: skip

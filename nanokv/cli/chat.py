"""nanokv chat: a conversation in the terminal, or one answer to a prompt or a pipe. repl/ holds the parts."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from nanokv.cli.common import codec_options, model_folder, model_options
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError, RequestError
from nanokv.core.request import SamplingParams
from nanokv.disagg.config import DisaggConfig
from nanokv.hub.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from nanokv.cli.repl.session import ChatSession
    from nanokv.cli.repl.terminal import Terminal

STEP_TOKENS = 512
"""Tokens that one step of a prompt computes: few, so that progress is seen and Ctrl-C is heard between two steps."""
MOST_PIPED = 64 * 2**20
"""Bytes of a text from a pipe."""
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")


@click.command(
    epilog="\b\nExamples:\n  nanokv chat\n  nanokv chat -p 'Name three rivers.' --temperature 0\n"
    "  nanokv chat -p 'Summarise this:' < notes.txt"
)
@click.option("-p", "--prompt", metavar="TEXT", help="Answer this prompt and leave; text from a pipe follows it.")
@click.option("--system", metavar="TEXT", help="System message. Default: that of the chat template.")
@click.option("--max-tokens", type=int, help="Maximum tokens of an answer. Default: 1024.")
@click.option("--temperature", type=float, help="Randomness; 0: greedy. Default, as for the next three: the model's.")
@click.option("--top-k", type=int, help="Sample from the k most likely tokens; 0: from all.")
@click.option("--top-p", type=float, help="Sample from the most likely tokens up to this total probability.")
@click.option("--min-p", type=float, help="Drop tokens below this share of the highest probability.")
@click.option("--seed", type=int, help="Seed for reproducible answers. Default: a new one each time.")
@model_options
@codec_options
@click.option("--kv-memory", metavar="SIZE", help="Memory for the pages of K and V, such as 512MiB.")
@click.option("--prefix-cache/--no-prefix-cache", default=True, help="Reuse K and V of earlier turns. Default: yes.")
@click.option("--max-model-len", type=int, metavar="N", help="Maximum tokens of a conversation. Default: the model's.")
@click.option("--disagg", is_flag=False, flag_value="here", metavar="[HOST:PORT]",
              help="Prefill in another process; with HOST:PORT on that host (`nanokv disagg prefill`).")  # fmt: skip
@click.option("--secret-file", metavar="FILE", help="Secret that the host of --disagg HOST:PORT has as well.")
@click.option("--stats/--no-stats", default=True, help="Print numbers after each answer, on stderr. Default: yes.")
@click.option("--event-log", metavar="FILE", help="Write the events of pages and requests to a JSONL file.")
@click.option("--mine", is_flag=True, help="Patch the engine with your functions from my/ (nanokv learn).")
def chat(
    model: str | None,
    prompt: str | None,
    system: str | None,
    stats: bool,
    disagg: str | None,
    secret_file: str | None,
    mine: bool,
    **options: Any,
) -> None:
    """Chat with MODEL: a catalog name, a folder, or ORG/NAME after `nanokv pull`.

    Without MODEL: smollm2-135m-instruct, fetched the first time. /? in the chat lists its commands. With -p, or with
    text on stdin, prints one answer and leaves.
    """
    if mine and disagg is not None:
        raise click.UsageError("--mine and --disagg: prefill processes run the engine's own functions; give one")
    chosen = {name: value for name in SAMPLING if (value := options.pop(name)) is not None}
    SamplingParams(**chosen).validate()
    try:
        if secret_file is not None and disagg in (None, "here"):
            raise ConfigError("--secret-file: give --disagg HOST:PORT as well; only another host asks for a secret")
        connect = () if disagg == "here" else disagg
        split = None if connect is None else DisaggConfig(connect=connect, secret_file=secret_file)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    # Without --seed each chat draws differently: requests without a seed use the engine's.
    seed = int.from_bytes(os.urandom(4), "little")
    config = EngineConfig(seed=seed, max_step_tokens=STEP_TOKENS, **options)
    question = None if prompt is None and _is_terminal(sys.stdin) else _question(prompt)
    if mine:
        _patch_mine()
    from nanokv.cli.repl.stop_key import Stopped

    name = DEFAULT_MODEL if model is None else Path(model).resolve().name if Path(model).is_dir() else model
    session = _open(model_folder(model), name, system, chosen, config, split, stats)
    with session.llm:
        if question is None:
            _converse(session)
        else:
            try:
                with session.stop:
                    is_stopped = session.send(question, time.perf_counter()).stopped
            except Stopped:
                is_stopped = True
            if is_stopped:
                sys.exit(130)
    if session.warm_up.is_running:  # in machine code, which cannot be interrupted: leave without waiting for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _patch_mine() -> None:
    """Patches the engine with the student's functions. Raises CourseError: none has passed, or one does not load."""
    from nanokv.learn.mine import patch_passed
    from nanokv.learn.progress import MY

    patched, waiting = patch_passed(MY)
    click.echo(f"with your {', '.join(f'{one.id} {one.function}' for one in patched)}", err=True)
    if waiting:
        click.echo(f"without {', '.join(one.id for one in waiting)}: not passed yet (nanokv learn check)", err=True)


def _open(
    folder: Path,
    name: str,
    system: str | None,
    chosen: dict[str, Any],
    config: EngineConfig,
    split: DisaggConfig | None,
    stats: bool,
) -> ChatSession:
    """Loads the model and opens a session with it. Raises CheckpointError, ConfigError, RequestError."""
    from dataclasses import replace

    from nanokv.cli.repl.compiling import Compilations, compile_ahead
    from nanokv.cli.repl.settings import checked, model_defaults
    from nanokv.cli.repl.terminal import Terminal, wants_colour

    params = checked(replace(model_defaults(folder), **chosen))
    terminal = Terminal()
    compiled = Compilations()
    if not wants_colour(terminal.err):  # no line that moves: one that stays
        compiled = Compilations(lambda: terminal.note("compiling kernels, once for each dtype and codec ..."))
    # Imports take most of the time of a short answer. Their objects live as long as the process, so the garbage
    # collector need not visit them: not now, not later, not at the end.
    gc.disable()
    try:
        with _log_as_notes(terminal), terminal.busy(lambda: compiled.line() or f"loading {name} ..."):
            compile_ahead(folder, config)
            Thread(target=_read_ahead, args=(folder,), daemon=True).start()
            from nanokv.cli.repl.session import ChatSession
            from nanokv.engine.device import choose_device
            from nanokv.llm import LLM

            if config.kernels == "auto" and choose_device(config.device).device.type == "cpu":
                compiled.watch()  # before loading, which compiles some
            session = ChatSession(LLM(folder, config, split), name, system, params, terminal, stats, compiled)
    finally:
        gc.freeze()
        gc.enable()
    return session


@contextmanager
def _log_as_notes(terminal: Terminal) -> Iterator[None]:
    """Warnings of the package are notes, which the line of `busy` makes room for."""
    from nanokv.cli.main import is_wanted

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            terminal.note(self.format(record))

    handler, logger = Notes(logging.WARNING), logging.getLogger("nanokv")
    handler.addFilter(is_wanted)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _converse(session: ChatSession) -> None:
    from nanokv.cli.repl.commands import completions
    from nanokv.cli.repl.reader import LineReader

    llm, terminal = session.llm, session.terminal
    terminal.note(
        f"{session.model} · {str(llm.dtype).removeprefix('torch.')} on {llm.device} ({llm.device_reason}) · "
        f"context {llm.engine.max_length:,} tokens · /? for help"
    )
    if llm.disagg is not None:
        terminal.note(f"messages of {llm.disagg.min_tokens} new tokens and more are prefilled in another process")
    session.run(LineReader(completions, terminal.note))


def _question(prompt: str | None) -> str:
    """The prompt of the command line, then the text of the pipe. Raises RequestError where both are empty."""
    piped = "" if _is_terminal(sys.stdin) else _read_pipe()
    question = "\n\n".join(text for text in (prompt, piped) if text and text.strip())
    if not question:
        raise RequestError("the prompt is empty: give -p TEXT, or text on stdin")
    return question


def _read_pipe() -> str:
    """All of stdin, without a byte order mark, its line ends as "\\n".

    Raises RequestError where it is not UTF-8, or has no end in sight.
    """
    if sys.stdin is None:  # started with stdin closed
        return ""
    data = sys.stdin.buffer.read(MOST_PIPED + 1)
    if len(data) > MOST_PIPED:
        raise RequestError(f"stdin: more than {MOST_PIPED >> 20} MiB, which no context holds")
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin: not valid UTF-8 at byte {error.start} (0x{data[error.start]:02x})") from None


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _read_ahead(folder: Path) -> None:
    """Asks the operating system to read the weights from disk while torch is imported, which takes about as long."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

"""Slash commands: a table of small functions over a chat. An unknown command is an error line, never a message."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nanokv.cli.common import binary, counted
from nanokv.cli.repl import cache_view, settings
from nanokv.cli.repl.saving import SavedChat, load_chat, read_text, save_chat
from nanokv.core.errors import RequestError

if TYPE_CHECKING:
    from nanokv.cli.repl.terminal import Terminal
    from nanokv.core.request import SamplingParams
    from nanokv.llm import LLM
    from nanokv.text.conversation import Conversation


class Chat(Protocol):
    """The chat that a command acts on. `ChatSession` documents the members."""

    llm: LLM
    model: str
    terminal: Terminal
    conversation: Conversation
    params: SamplingParams
    attached: list[tuple[Path, str]]
    show_stats: bool
    leaving: bool

    def answer_again(self) -> None: ...


Run = Callable[[Chat, str], None]


@dataclass(frozen=True)
class Command:
    """One command. `run` takes the chat and the text after the name; a RequestError becomes one error line."""

    run: Run
    usage: str
    summary: str

    @property
    def details(self) -> str:
        """The text of `/? COMMAND` below the summary, from the docstring of `run`."""
        return "\n".join(line.strip() for line in (self.run.__doc__ or "").splitlines()).strip()


COMMANDS: dict[str, Command] = {}
"""By name, aliases included."""


def _command(usage: str, summary: str, *aliases: str):
    def register(function: Run) -> Run:
        command = Command(function, usage, summary)
        COMMANDS.update(dict.fromkeys((usage.split()[0], *aliases), command))
        return function

    return register


def run_command(chat: Chat, line: str) -> None:
    """Runs one line that begins with a slash. Raises RequestError for an unknown command or an invalid argument."""
    name, *argument = line.split(maxsplit=1)
    _known(name).run(chat, argument[0].rstrip() if argument else "")


def completions(line: str) -> list[str]:
    """The lines that complete `line`, for the Tab key."""
    name, space, argument = line.partition(" ")
    if not space:
        return sorted(known for known in COMMANDS if known.startswith(name)) if name.startswith("/") else []
    if name in ("/read", "/load", "/save", "/save!"):
        paths = sorted(glob.glob(glob.escape(os.path.expanduser(argument)) + "*"))
        return [f"{name} {path}{'/' if os.path.isdir(path) else ''}" for path in paths]
    words = {"/set": [*settings.SETTINGS, "system"], "/show": list(_SHOWN), "/stats": ["on", "off"]}.get(name, [])
    return [f"{name} {word}" for word in words if word.startswith(argument)]


def _known(name: str) -> Command:
    from difflib import get_close_matches

    if name in COMMANDS:
        return COMMANDS[name]
    near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5) if len(name) > 2 else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RequestError(f"unknown command {name}{hint} (/? lists them, /{name} sends it as text)")


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise RequestError(f"usage: {usage}")
    return Path(argument.strip("'\"")).expanduser()


_KEYS = '''\
  """               begins and ends a message of several lines
  //TEXT            sends text that begins with a slash
  Ctrl-C            stops an answer and keeps its text; twice: leaves
  Ctrl-D            leaves'''


@_command("/? [COMMAND]", "list the commands, or explain one", "/help")
def _help(chat: Chat, argument: str) -> None:
    if argument:
        command = _known(argument if argument.startswith("/") else f"/{argument}")
        chat.terminal.line(f"{command.usage}    {command.summary}")
        if command.details:
            chat.terminal.line(command.details)
        return
    for command in dict.fromkeys(COMMANDS.values()):
        names = [name for name, known in COMMANDS.items() if known is command]
        others = f" (also {', '.join(names[1:])})" if len(names) > 1 else ""
        chat.terminal.line(f"  {command.usage:18}{command.summary}{others}")
    chat.terminal.line(_KEYS)


@_command("/set NAME VALUE", "set a sampling parameter, or the system message")
def _set(chat: Chat, argument: str) -> None:
    """/set alone lists the parameters and their values.
    /set temperature 0.7     /set stop "\\n\\n" END     /set seed none
    /set system You are terse.     /set system none: the model's own
    Another system message changes the beginning of the conversation, so the cache
    has nothing of the later turns."""
    name, _, value = argument.partition(" ")
    if name == "parameter":  # as in ollama
        name, _, value = value.strip().partition(" ")
    value = value.strip()
    if not name:
        _show_parameters(chat)
    elif not value:
        raise RequestError("usage: /set NAME VALUE (/set alone lists the names)")
    elif name == "system":
        chat.conversation.set_system(None if value == "none" else value)
        chat.terminal.note("system message set")
    else:
        chat.params = settings.changed(chat.params, name, value)
        name = settings.canonical(name)
        chat.terminal.note(f"{name} = {settings.shown(chat.params)[name]}")


@_command("/show [WHAT]", "show parameters, model, system message or messages")
def _show(chat: Chat, argument: str) -> None:
    """/show params, /show model, /show system, /show messages; alone: the first three."""
    if argument and argument not in _SHOWN:
        raise RequestError(f"/show {argument}: there are {', '.join(_SHOWN)}")
    for name in [argument] if argument else ("model", "system", "params"):
        _SHOWN[name](chat)


def _show_parameters(chat: Chat) -> None:
    for name, text in settings.shown(chat.params).items():
        chat.terminal.line(f"  {name:19} {text:8} {settings.SETTINGS[name].help}")


def _show_model(chat: Chat) -> None:
    llm, layout = chat.llm, chat.llm.engine.layout
    config = llm.model_config
    chat.terminal.line(f"  {chat.model}: {config.family}, {config.num_layers} layers, from {llm.folder}")
    native = f", raw in layers {llm.config.native_layers}" if llm.config.native_layers else ""
    chat.terminal.line(f"  {str(llm.dtype).removeprefix('torch.')} on {llm.device}, codec {llm.config.codec}{native}")
    chat.terminal.line(f"  context of {llm.engine.max_length:,} tokens at most")
    chat.terminal.line(f"  KV {binary(layout.bytes_per_token)} a token")


def _show_system(chat: Chat) -> None:
    system = chat.conversation.system
    chat.terminal.line(f"  system: {system if system is not None else '(the chat template decides)'}")


def _show_messages(chat: Chat) -> None:
    for message in chat.conversation.messages:
        chat.terminal.line(f"[{message['role']}] {message['content']}")


_SHOWN = {"params": _show_parameters, "model": _show_model, "system": _show_system, "messages": _show_messages}


@_command("/clear", "forget the conversation, keep the system message")
def _clear(chat: Chat, _argument: str) -> None:
    chat.conversation.clear()
    chat.attached = []
    chat.terminal.note("conversation cleared")


@_command("/undo", "remove your last message and its answer")
def _undo(chat: Chat, _argument: str) -> None:
    """The earlier turns stay in the cache, so the next answer begins as fast."""
    if not chat.conversation.undo():
        raise RequestError("nothing to undo: the conversation is empty")
    chat.terminal.note(f"last turn removed; {counted(chat.conversation.num_turns, 'turn')} left")


@_command("/regen", "answer your last message again")
def _regen(chat: Chat, _argument: str) -> None:
    """With a fixed seed, or temperature 0, the answer is the same."""
    chat.answer_again()


@_command("/save FILE", "write the chat to a JSON file")
def _save(chat: Chat, argument: str, overwrite: bool = False) -> None:
    """Saves messages, model and settings. /save refuses a file that exists; /save!
    overwrites it."""
    path = _path(argument, "/save FILE")
    save_chat(path, SavedChat(chat.model, chat.conversation.messages, chat.params), overwrite)
    chat.terminal.note(f"saved to {path}")


@_command("/save! FILE", "write the chat to a JSON file, over an existing one")
def _save_over(chat: Chat, argument: str) -> None:
    _save(chat, argument, overwrite=True)


@_command("/load FILE", "continue a saved chat")
def _load(chat: Chat, argument: str) -> None:
    """Replaces conversation, system message and settings. The next answer computes
    the whole conversation once."""
    path = _path(argument, "/load FILE")
    saved = load_chat(path)
    chat.conversation.load(saved.messages)
    chat.params = saved.params
    chat.attached = []
    other = f", saved with {saved.model}" if saved.model != chat.model else ""
    chat.terminal.note(f"loaded {counted(chat.conversation.num_turns, 'turn')} from {path}{other}")


@_command("/read FILE", "put a text file before your next message")
def _read(chat: Chat, argument: str) -> None:
    """Several files are joined. /clear drops them."""
    path = _path(argument, "/read FILE")
    text = read_text(path)
    if not text.strip():
        raise RequestError(f"{path}: the file is empty")
    encode = chat.conversation.tokenizer.encode
    count = len(encode(text))
    room = chat.llm.engine.max_length - len(chat.conversation.token_ids)
    room -= sum(len(encode(content)) for _, content in chat.attached)
    if count >= room:
        raise RequestError(f"{path}: {count:,} tokens; {max(room - 1, 0):,} more fit into this conversation")
    chat.attached.append((path, text))
    chat.terminal.note(f"{path}: {count:,} tokens, sent before your next message")


@_command("/cache", "draw this conversation's pages, the prefix tree, the pool")
def _cache(chat: Chat, _argument: str) -> None:
    """A page is marked * where another branch of the tree shares it: an answer that
    /regen or /undo replaced, or another conversation with the same beginning."""
    engine, tokens = chat.llm.engine, chat.conversation.token_ids
    page_size, tree = engine.layout.page_size, engine.cache.tree
    held, here = cache_view.pages_of(tree, tokens, page_size)
    decode = lambda ids: chat.conversation.tokenizer.decode(ids, skip_special=False)  # noqa: E731
    for line in (
        *cache_view.conversation_lines(held, len(tokens), page_size),
        *cache_view.tree_lines(tree, decode, here),
        cache_view.pool_line(chat.llm.stats()),
    ):
        chat.terminal.line(line)


@_command("/stats [on|off]", "the engine's counters; on, off: the line after answers")
def _stats(chat: Chat, argument: str) -> None:
    """38 tok · 61.2 tok/s · TTFT 41 ms · prompt 212 (cached 192) · KV 249 tok / 16 pages / 5.6 MiB
    tok     tokens of the answer, with the token that ends it
    tok/s   decode only: (tok - 1) / (time of the last token - time of the first)
    TTFT    time to first token, from Enter
    prompt  tokens of the whole conversation
    cached  tokens of these that the prefix cache had
    KV      tokens in the cache at the end of the answer, and their pages
    /stats alone shows the engine's counters."""
    if not argument:
        for name, value in chat.llm.stats().items():
            chat.terminal.line(f"  {name:19} {value:,}" if type(value) is int else f"  {name:19} {value}")
        return
    if argument not in ("on", "off"):
        raise RequestError("usage: /stats, /stats on or /stats off")
    chat.show_stats = argument == "on"
    chat.terminal.note(f"stats {argument}")


@_command("/bye", "leave", "/exit", "/quit")
def _bye(chat: Chat, _argument: str) -> None:
    chat.leaving = True

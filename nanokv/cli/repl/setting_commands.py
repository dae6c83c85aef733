"""Slash commands about what applies to the next answer: /set, /show."""

from __future__ import annotations

from nanokv.cli.common import binary
from nanokv.cli.repl import settings
from nanokv.cli.repl.registry import Chat, command
from nanokv.core.errors import RequestError


@command("/set [NAME [VALUE]]", "set a sampling parameter, or the system message")
def _set(chat: Chat, argument: str) -> None:
    """/set alone lists the parameters and their values, /set NAME shows one.
    /set temperature 0.7     /set stop "\\n\\n" END     /set system You are terse.
    /set max_tokens none: as at the start     /set system none: the model's own
    Another system message changes the beginning of the conversation, so the cache
    has nothing of the later turns."""
    name, _, value = argument.partition(" ")
    if name == "parameter":  # as in ollama
        name, _, value = value.strip().partition(" ")
    value = value.strip()
    if not name:
        _show_parameters(chat)
    elif name == "system":
        if value:
            chat.conversation.set_system(None if value.lower() == "none" else value)
        _note_system(chat)
    else:
        if value:
            chat.params = settings.changed(chat.params, name, value, chat.defaults)
        name = settings.known(name)
        chat.terminal.note(f"{name} = {settings.shown(chat.params)[name]}")


def _note_system(chat: Chat) -> None:
    system = chat.conversation.system
    chat.terminal.note("system message: " + ("none; the chat template decides" if system is None else system))


@command("/show [WHAT]", "show parameters, model, system message or messages")
def _show(chat: Chat, argument: str) -> None:
    """/show params, /show model, /show system, /show messages; alone: the first three."""
    if argument and argument not in SHOWN:
        raise RequestError(f"/show {argument}: there are {', '.join(SHOWN)}")
    for name in [argument] if argument else ("model", "system", "params"):
        SHOWN[name](chat)


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


SHOWN = {"params": _show_parameters, "model": _show_model, "system": _show_system, "messages": _show_messages}

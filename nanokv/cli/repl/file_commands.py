"""Slash commands about files: /save, /save!, /load, /read."""

from __future__ import annotations

from pathlib import Path

from nanokv.cli.common import counted
from nanokv.cli.repl.fitting import count_tokens, longest_token
from nanokv.cli.repl.registry import Chat, command
from nanokv.cli.repl.saving import SavedChat, load_chat, read_text, save_chat
from nanokv.core.errors import RequestError


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise RequestError(f"usage: {usage}")
    return Path(argument.strip("'\"")).expanduser()


@command("/save FILE", "write the chat to a JSON file")
def _save(chat: Chat, argument: str) -> None:
    """Saves messages, model and settings. /save refuses a file that exists; /save!
    overwrites it."""
    _write(chat, argument, overwrite=False)


@command("/save! FILE", "write the chat to a JSON file, over an existing one")
def _save_over(chat: Chat, argument: str) -> None:
    _write(chat, argument, overwrite=True)


def _write(chat: Chat, argument: str, overwrite: bool) -> None:
    path = _path(argument, "/save FILE")
    save_chat(path, SavedChat(chat.model, chat.conversation.messages, chat.params), overwrite)
    chat.terminal.note(f"saved to {path}")


@command("/load FILE", "continue a saved chat")
def _load(chat: Chat, argument: str) -> None:
    """Replaces conversation, system message and settings. The next answer computes
    the whole conversation once."""
    path = _path(argument, "/load FILE")
    saved = load_chat(path)
    try:
        chat.conversation.load(saved.messages)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    chat.params = saved.params
    chat.attached = []
    other = f", saved with {saved.model}" if saved.model != chat.model else ""
    chat.terminal.note(f"loaded {counted(chat.conversation.num_turns, 'turn')} from {path}{other}")


@command("/read FILE", "put a text file before your next message")
def _read(chat: Chat, argument: str) -> None:
    """Several files are joined. /clear drops them."""
    path = _path(argument, "/read FILE")
    tokenizer, room = chat.conversation.tokenizer, chat.room
    more = f"{max(room - 1, 0):,} more fit into this conversation"
    longest = longest_token(tokenizer)
    text = read_text(path, most=longest * max(room, 1), why=f"tokens have at most {longest} bytes; {more}")
    if not text.strip():
        raise RequestError(f"{path}: the file is empty")
    count, is_all = count_tokens(tokenizer, text, room, chat.stop)
    if count >= room:
        raise RequestError(f"{path}: {count:,} tokens{'' if is_all else ' and more'}; {more}")
    chat.attached.append((path, text))
    chat.terminal.note(f"{path}: {count:,} tokens, sent before your next message")

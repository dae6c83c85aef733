"""Chats on disk: one JSON file with messages, model and settings. It holds text, so another model can continue it."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanokv.cli.repl.settings import SETTINGS, checked
from nanokv.core.errors import RequestError
from nanokv.core.request import SamplingParams

FORMAT, VERSION = "nanokv-chat", 1


@dataclass(frozen=True)
class SavedChat:
    """The content of a file. `messages` begin with the system message, if any; Conversation.load checks them."""

    model: str
    messages: list[Any]
    params: SamplingParams


def save_chat(path: Path, chat: SavedChat, overwrite: bool) -> None:
    """Writes the file, complete or not at all.

    Raises RequestError where it exists, without `overwrite`, or cannot be written.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": chat.model,
        "settings": {name: getattr(chat.params, name) for name in SETTINGS},
        "messages": chat.messages,
    }
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            if overwrite:
                os.replace(name, path)
            else:
                os.link(name, path)  # unlike a rename, refuses where the file exists
        finally:
            if os.path.exists(name):
                os.unlink(name)
    except FileExistsError:
        raise RequestError(f"{path}: exists already; /save! {path} overwrites it") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror}") from None


def load_chat(path: Path) -> SavedChat:
    """Reads a file and checks all of it except the order of the messages. Raises RequestError, one line."""
    text = read_text(path)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{path}: not a saved chat: not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RequestError(f'{path}: not a saved chat: no "format": "{FORMAT}" in it')
    if document.get("version") != VERSION:
        raise RequestError(f"{path}: version {document.get('version')!r}; this nanokv reads version {VERSION}")
    model, settings, messages = (document.get(name) for name in ("model", "settings", "messages"))
    if not isinstance(model, str) or not isinstance(settings, dict) or not isinstance(messages, list):
        raise RequestError(f'{path}: expected "model" (a text), "settings" (an object) and "messages" (a list)')
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "user":
        raise RequestError(f"{path}: ends with a question; expected an answer as the last message")
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise RequestError(f"{path}: settings: no such parameter: {unknown[0]}; there are {', '.join(SETTINGS)}")
    try:
        params = checked(SamplingParams(**settings))
    except RequestError as error:
        raise RequestError(f"{path}: settings: {error}") from None
    return SavedChat(model, messages, params)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises RequestError, one line."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not valid UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None

"""Chats on disk: one JSON file with messages, model and settings. It holds text, so another model can continue it."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanokv.cli.repl.settings import SETTINGS, checked
from nanokv.core.errors import RequestError
from nanokv.core.request import SamplingParams

FORMAT, VERSION = "nanokv-chat", 1
MOST_BYTES = 16 * 2**20
"""Of a saved chat: more than any context holds."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK}


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
                _rename_to_new(name, path)
        finally:
            if os.path.exists(name):
                os.unlink(name)
    except FileExistsError:
        raise RequestError(f"{path}: exists already; /save! {path} overwrites it") from None
    except (OSError, ValueError) as error:  # ValueError: a character that no file name or text can have
        raise RequestError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _rename_to_new(name: str, path: Path) -> None:
    """Gives a complete file its name. Raises FileExistsError where another file has it."""
    try:
        os.link(name, path)  # unlike a rename, refuses where the file exists
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "File exists") from None
        os.replace(name, path)  # a file system without links, such as FAT


def load_chat(path: Path) -> SavedChat:
    """Reads a file and checks all of it except the order of the messages. Raises RequestError, one line."""
    text = read_text(path, MOST_BYTES, "a saved chat has at most 16 MiB")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"
        raise RequestError(f"{path}: not a saved chat: {why}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RequestError(f'{path}: not a saved chat: no "format": "{FORMAT}" in it')
    if document.get("version") != VERSION:
        raise RequestError(f"{path}: version {document.get('version')!r}; this nanokv reads version {VERSION}")
    model, settings, messages = (document.get(name) for name in ("model", "settings", "messages"))
    if not isinstance(model, str) or not isinstance(settings, dict) or not isinstance(messages, list):
        raise RequestError(f'{path}: expected "model" (a text), "settings" (an object) and "messages" (a list)')
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "user":
        raise RequestError(f"{path}: ends with a question; expected an answer as the last message")
    for place, message in enumerate(messages):
        _check_unicode(path, f"messages[{place}]", message)
    for name in ("model", "settings"):
        _check_unicode(path, name, document[name])
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise RequestError(f"{path}: settings: no such parameter: {unknown[0]}; there are {', '.join(SETTINGS)}")
    try:
        params = checked(SamplingParams(**settings))
    except RequestError as error:
        raise RequestError(f"{path}: settings: {error}") from None
    return SavedChat(model, messages, params)


def _check_unicode(path: Path, name: str, value: Any) -> None:
    """Raises RequestError where a text in `value` has a lone surrogate, which JSON can write and no tokenizer reads."""
    text = value.get("content") if isinstance(value, dict) and "content" in value else value
    try:
        (text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{path}: {name}: not valid Unicode at character {error.start}") from None


def read_text(path: Path, most: int, why: str) -> str:
    """The text of a UTF-8 file of at most `most` bytes. Raises RequestError, one line; `why` follows a larger size."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise RequestError(f"{path}: not a regular file, but a pipe or a device")
        if about.st_size > most and stat.S_ISREG(about.st_mode):
            raise RequestError(f"{path}: {about.st_size:,} bytes; {why}")
        with open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:  # the file grows, or is one of /proc, which have no size
            raise RequestError(f"{path}: more than {most:,} bytes; {why}")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not valid UTF-8 at byte {error.start}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or error}") from None

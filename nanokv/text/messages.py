"""Messages as a chat template takes them: plain JSON types with a meaning, or a RequestError that names the place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanokv.core.errors import RequestError


def check_messages(messages: Sequence[Mapping]) -> list[dict]:
    """Copies messages. A template sees no live object.

    A field that is None is left out, as in transformers. Each message has a role and a content: a text, or a list of
    parts {"type": "text", "text": ...}; beside tool_calls it may be missing. Arguments of tool calls that are given as
    JSON text become a dictionary, as in vLLM.
    Raises   RequestError
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages={messages!r:.80}: expected a list of {{'role', 'content'}}")
    if not messages:
        raise RequestError("messages=[]: expected at least one message")
    return [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _message(where: str, message: Mapping) -> dict:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where}={message!r:.80}: expected {{'role': text, 'content': text}}")
    kept = {key: value for key, value in plain(message).items() if value is not None}
    content, calls = kept.get("content"), kept.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where}['tool_calls']={calls!r:.80}: expected a list of calls")
    if content is None and not calls:
        raise RequestError(f"{where}: a message of {kept['role']!r:.40} has no 'content'")
    if isinstance(content, list):
        for place, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                named = f"a part of type {kind!r:.40}" if kind not in (None, "text") else f"{part!r:.60}"
                raise RequestError(f"{where}['content'][{place}]: {named}; expected {{'type': 'text', 'text': text}}")
    elif not isinstance(content, (str, type(None))):
        raise RequestError(f"{where}['content']={content!r:.80}: expected a text")
    for holder in _holders(kept):
        holder["arguments"] = _parsed(holder["arguments"])
    return kept


def plain(value: Any) -> Any:
    """A copy in plain JSON types. Raises RequestError for another type, and for nesting without end."""
    try:
        return _plain(value)
    except RecursionError:
        raise RequestError("messages: they are nested too deep") from None


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise RequestError(f"messages: a {type(value).__name__} is no text, number, list or dictionary")


def _key(key: Any) -> Any:
    if isinstance(key, (tuple, Mapping)):
        raise RequestError(f"messages: a {type(key).__name__} is no key of a dictionary")
    return _plain(key)


def join_parts(messages: list[dict]) -> list[dict]:
    """Messages whose content is a text: that of all parts."""
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def arguments_of(messages: list[dict]) -> list[dict]:
    """The arguments of all tool calls that are dictionaries, without empty ones."""
    found = [holder["arguments"] for message in messages for holder in _holders(message)]
    return [arguments for arguments in found if arguments and isinstance(arguments, dict)]


def write_arguments(messages: list[dict]) -> list[dict]:
    """A copy of messages in which the arguments of tool calls are JSON text."""
    copy = plain(messages)
    for message in copy:
        for holder in _holders(message):
            if not isinstance(holder["arguments"], str):
                holder["arguments"] = json.dumps(holder["arguments"], ensure_ascii=False)
    return copy


def _holders(message: dict) -> Iterator[dict]:
    """The dictionaries with the arguments of tool calls: {"function": {"arguments"}}, or {"arguments"} alone."""
    for call in message.get("tool_calls", []):
        for holder in (call, call.get("function")):
            if isinstance(holder, dict) and "arguments" in holder:
                yield holder


def _parsed(arguments: Any) -> Any:
    """The dictionary that a JSON text means; anything else as it is."""
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments

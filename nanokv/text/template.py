"""The chat template of a checkpoint: turns messages into the text that the model was trained to continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from nanokv.core.errors import CheckpointError, RequestError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A jinja template, compiled in a sandbox, because it comes with the weights and is foreign code.

    source          the template's text
    special_tokens  variables of the template, such as {"bos_token": "<s>"}
    Raises          CheckpointError where the text is no template
    Source          the environment of transformers (utils/chat_template_utils.py), for which templates are written
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        from jinja2 import TemplateSyntaxError

        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"chat template, line {error.lineno}: {_one_line(error)}") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of chat_template.jinja, else of tokenizer_config.json (a text, or the one named "default").

        None where neither has a template. Raises CheckpointError, naming the file, where one of them is damaged.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = {**_special_tokens(_read_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
        try:
            source: Any = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except FileNotFoundError:
            source = config.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder / 'chat_template.jinja'}: {error}") from error
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is not a text")
        return cls(source, special)

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as one text, which ends where the assistant's answer begins.

        messages               {"role": ..., "content": ...}, with further fields that the template reads
        add_generation_prompt  whether the text ends with the beginning of an answer
        variables              passed to the template: tools, documents, enable_thinking, ...
        Raises                 RequestError, one line, where a message is invalid or the template refuses it
        """
        from jinja2 import TemplateError

        known: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens, **_plain(variables)}
        try:
            return self._template.render(
                messages=check_messages(messages), add_generation_prompt=add_generation_prompt, **known
            )
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, AttributeError, LookupError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"messages: the model's chat template refuses them: {_one_line(error)}") from error


def check_messages(messages: Sequence[Mapping]) -> list[dict]:
    """The messages as plain JSON types: a template sees no live object. Raises RequestError naming the place."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages={messages!r:.80}: expected a list of {{'role', 'content'}}")
    if not messages:
        raise RequestError("messages=[]: expected at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{place}]={message!r:.80}: expected {{'role': text, 'content': text}}")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"messages[{place}]: a message of {message['role']!r} has no 'content'")
        if not isinstance(message.get("content"), (str, list, tuple, type(None))):
            raise RequestError(f"messages[{place}]['content']={message['content']!r:.80}: expected a text")
    return [_plain(message) for message in messages]


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise RequestError(f"messages: a {type(value).__name__} is no text, number, list or dictionary")


@cache
def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's text for training; here it renders the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Refuses names that Python calls by itself (__html__, ...)."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.TemplateError(f"a namespace takes no name that begins with an underscore: {name}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja's own escapes <, > and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment


def _special_tokens(config: dict) -> dict[str, str]:
    """bos_token and the other special tokens, which files write as a text or as {"content": text}."""
    values = {name: config.get(name) for name in _SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_json(path: Path) -> dict:
    """A JSON object; an empty one where there is no such file. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""The chat template of a checkpoint: turns messages into the text that the model was trained to continue."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanokv.core.errors import CheckpointError, RequestError
from nanokv.text.files import one_line, read_json, read_text, special_tokens
from nanokv.text.messages import arguments_of, check_messages, join_parts, plain, write_arguments

if TYPE_CHECKING:
    import jinja2

_PROBE = "nanokv-probe"


class ChatTemplate:
    """The templates of a model, which are foreign code: sandboxed and bounded, and compiled at the first chat.

    source          the template's text, or several by name: "tool_use" is for chats with tools, "default" for others
    special_tokens  variables of the template, such as {"bos_token": "<s>"}
    where           the file that it comes from, for errors
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        where: str = "chat template",
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else source
        self.special_tokens = dict(special_tokens or {})
        self._templates = {name: _Template(text, self.special_tokens, where) for name, text in sources.items()}

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of chat_template.jinja, else of tokenizer_config.json: a text, or several with names.

        None where neither has a template. Raises CheckpointError, naming the file, where one of them is damaged; a
        template that does not compile is refused by `render`, because texts without a chat need none.
        """
        folder = Path(folder)
        path = folder / "chat_template.jinja"
        source: Any = read_text(path)
        if source is None:
            path = folder / "tokenizer_config.json"
            source = read_json(path).get("chat_template")
        if source is None:
            return None
        if isinstance(source, list):
            named = [(entry.get("name"), entry.get("template")) for entry in source if isinstance(entry, dict)]
            if not named or not all(isinstance(part, str) for pair in named for part in pair):
                raise CheckpointError(f"{path}: chat_template is no list of {{'name': text, 'template': text}}")
            source = dict(named)
        elif not isinstance(source, str):
            raise CheckpointError(f"{path}: chat_template is not a text")
        return cls(source, special_tokens(folder), str(path))

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as one text, which ends where the assistant's answer begins.

        messages               {"role": ..., "content": ...}, with further fields that the template reads
        add_generation_prompt  whether the text ends with the beginning of an answer
        variables              passed to the template: tools, documents, enable_thinking, ...
        Raises                 RequestError, one line, where a message is invalid, the template refuses it, or it has
                               no meaning for the template (a role, tools, a part of a content)
        """
        return self.open(messages, add_generation_prompt, **variables).text

    def open(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any) -> Chat:
        """`render`, as a Chat: the text, its template and its values."""
        values = {"tools": None, "documents": None, **self.special_tokens, **plain(variables)}
        values["strftime_now"] = datetime.now().strftime  # one time for all renderings of a chat
        template = self._choose(bool(values["tools"]))
        for name in ("tools", "documents"):
            if not isinstance(values[name], (list, type(None))):
                raise RequestError(f"{name}={values[name]!r:.60}: expected a list")
            if values[name] and not template.reads(name):
                raise RequestError(f"{name}: the model's chat template has no place for {name}")
        for name in variables.keys() - {"tools", "documents"}:
            if not template.reads(name):
                raise RequestError(f"{name}: no such argument, and no variable that the model's chat template reads")
        checked = check_messages(messages)
        for place, message in enumerate(checked):
            if not template.knows(message["role"]):
                raise RequestError(f"messages[{place}]['role']={message['role']!r:.40}: unknown to the chat template")
            if message.get("tool_calls") and "tool_calls" not in template.source:
                raise RequestError(f"messages[{place}]['tool_calls']: the model's chat template has no place for them")
        if any(isinstance(message.get("content"), list) for message in checked) and not template.takes_parts:
            checked = join_parts(checked)
        return _with_arguments(
            Chat(template, {**values, "messages": checked, "add_generation_prompt": add_generation_prompt})
        )

    def _choose(self, has_tools: bool) -> _Template:
        """The template for a chat. Raises RequestError where several have names, and none is "default"."""
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(map(repr, self._templates))
            raise RequestError(f"messages: the model has chat templates {known:.80}, and none with the name 'default'")
        return self._templates[name]


@dataclass
class Chat:
    """Messages and variables as the template gets them."""

    template: _Template
    values: dict[str, Any]

    @cached_property
    def text(self) -> str:
        """The text that the template makes of them. Raises RequestError."""
        return self.template.render(self.values)


def _with_arguments(chat: Chat) -> Chat:
    """The chat with arguments of tool calls as the template takes them: dictionaries, or else JSON text.

    A template wants text where it refuses a dictionary, or writes it as Python does ({'city': 'Rome'}).
    """
    arguments = arguments_of(chat.values["messages"])
    if not arguments:
        return chat
    refusal = None
    try:
        if not any(repr(one) in chat.text for one in arguments):
            return chat
    except RequestError as error:
        refusal = error
    other = Chat(chat.template, {**chat.values, "messages": write_arguments(chat.values["messages"])})
    try:
        other.text  # noqa: B018
    except RequestError:
        if refusal is None:
            return chat
        raise refusal from None
    return other


class _Template:
    """One template, compiled at its first use, and the variables, roles and parts that it knows."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._where = where
        self._knows: dict[str, bool] = {}

    @cached_property
    def _compiled(self) -> jinja2.Template:
        from jinja2 import TemplateSyntaxError

        from nanokv.text.sandbox import compile_template

        try:
            return compile_template(self.source)
        except Exception as error:  # foreign code: whatever it makes jinja or Python raise
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise RequestError(
                f"messages: {self._where}{line}: unusable chat template: {one_line(error):.200}"
            ) from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The text. Raises RequestError where the template refuses the values, fails or takes too much."""
        from nanokv.text.sandbox import render

        template = self._compiled
        try:
            return render(template, values)
        except Exception as error:  # foreign code, as above; MemoryError and RecursionError among them
            raise RequestError(f"messages: the model's chat template refuses them: {one_line(error):.200}") from error

    @cached_property
    def _names(self) -> set[str]:
        """The variables that the template reads."""
        from jinja2 import nodes

        names = self._compiled.environment.parse(self.source).find_all(nodes.Name)
        return {name.name for name in names if name.ctx == "load"}

    def reads(self, variable: str) -> bool:
        """Whether the template has a use for a variable."""
        return variable in self._names

    def knows(self, role: str) -> bool:
        """Whether a message of this role has a meaning: another role than these five must stand in the source.

        Of `tool` and `developer` the template must write the content; one that refuses the probe may take the chat.
        """
        if role in ("system", "user", "assistant"):
            return True
        if role not in ("tool", "developer"):
            return re.search(rf"\b{re.escape(role)}\b", self.source) is not None
        if role not in self._knows:
            text = self._probe(role, _PROBE)
            self._knows[role] = text is None or _PROBE in text
        return self._knows[role]

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template makes the same of a text and of a list with one part of that text."""
        text = self._probe("user", _PROBE)
        return text is not None and text == self._probe("user", [{"type": "text", "text": _PROBE}])

    def _probe(self, role: str, content: Any) -> str | None:
        """The text of a short chat; None where the template refuses it."""
        first = [] if role == "user" else [{"role": "user", "content": "Hi"}]
        messages = [*first, {"role": role, "content": content}]
        values = {"tools": None, "documents": None, **self._special_tokens, "add_generation_prompt": True}
        try:
            return self.render({**values, "messages": messages})
        except RequestError:
            return None

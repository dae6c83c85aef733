"""Conversation: a chat that keeps the token ids it has, and encodes only what is new.

Encoding a whole chat anew may cut the assistant's words into other tokens than those it generated; then nothing after
the first difference would be found in the prefix cache. Here the generated ids stay:

    token_ids   | rendered prompt | answer, as generated | only the new part is encoded | answer | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanokv.core.errors import RequestError
from nanokv.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _State:
    """What has been said at one moment: the messages, the ids that hold them, the marked text of these ids."""

    messages: tuple[dict, ...] = ()
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    text: str = field(default="", repr=False)


class Conversation:
    """A chat between a user and a model, as messages and as token ids.

        prompt = conversation.ask("Hello")          # ids for the engine
        conversation.answer(output.token_ids, output.text)

    system      the system message, or None for the template's own
    variables   passed to the chat template: enable_thinking, ...
    Raises      RequestError where the model has no tokenizer or chat template, or the template refuses
    """

    def __init__(self, tokenizer: Tokenizer | None, system: str | None = None, **variables: Any) -> None:
        if tokenizer is None:
            raise RequestError("this model has no tokenizer.json, so it cannot chat")
        if tokenizer.template is None:
            raise RequestError("this model has no chat template, so it cannot chat")
        self._tokenizer = tokenizer
        self._variables = variables
        self._system = system
        self._states = [_State()]
        """The states after each turn begun or ended, for undo: empty, asked, answered, asked, answered, ..."""

    @property
    def system(self) -> str | None:
        return self._system

    @property
    def messages(self) -> list[dict]:
        """Everything said, the system message first where there is one."""
        system = [{"role": "system", "content": self._system}] if self._system is not None else []
        return system + [dict(message) for message in self._states[-1].messages]

    @property
    def token_ids(self) -> list[int]:
        """The ids of everything said: what the next prompt begins with, and what the cache may hold."""
        return list(self._states[-1].token_ids)

    @property
    def num_turns(self) -> int:
        """Questions asked so far."""
        return sum(message["role"] == "user" for message in self._states[-1].messages)

    def ask(self, text: str) -> list[int]:
        """Adds the user's words. Returns the ids of the whole prompt, to be continued by the assistant."""
        now = self._states[-1]
        asked = (*now.messages, {"role": "user", "content": text})
        self._states.append(self._render(asked, now))
        return self.token_ids

    def answer(self, token_ids: Sequence[int], text: str) -> None:
        """Adds the assistant's words: the ids as they were generated (end-of-turn token included), and their text."""
        now = self._states[-1]
        if not now.messages or now.messages[-1]["role"] != "user":
            raise RequestError("answer: nothing has been asked")
        said = self._tokenizer.decode(token_ids, skip_special=False)
        messages = (*now.messages, {"role": "assistant", "content": text})
        self._states.append(_State(messages, now.token_ids + tuple(token_ids), now.text + said))

    def undo(self) -> bool:
        """Takes the last question and its answer back. False where there is none."""
        if len(self._states) == 1:
            return False
        while self._states[-1].messages and self._states[-1].messages[-1]["role"] == "assistant":
            self._states.pop()
        self._states.pop()
        return True

    def clear(self) -> None:
        """Forgets all turns; the system message stays."""
        self._states = [_State()]

    def set_system(self, system: str | None) -> None:
        """Another system message, for the turns so far too: they are encoded anew with the next question."""
        self._system = system
        self._states = [_State(state.messages) for state in self._states]

    def load(self, messages: Sequence[dict]) -> None:
        """Replaces everything by saved messages: an optional system message, then user and assistant in turns.

        Raises RequestError for another order; the conversation then stays as it was.
        """
        system, turns = None, list(messages)
        if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
            system, turns = turns[0].get("content"), turns[1:]
        for place, message in enumerate(turns):
            role = ("user", "assistant")[place % 2]
            if not isinstance(message, dict) or message.get("role") != role:
                raise RequestError(f"messages[{place}]={message!r:.60}: expected a message of {role!r}")
            if not isinstance(message.get("content"), str):
                raise RequestError(f"messages[{place}]['content']: expected a text")
        if not isinstance(system, (str, type(None))):
            raise RequestError("messages[0]['content']: expected a text")
        self._system = system
        self._states = [_State(tuple(turns[:end])) for end in range(len(turns) + 1)]

    def _render(self, messages: tuple[dict, ...], before: _State) -> _State:
        """The state that asks for an answer to `messages`, built on the ids of `before` where its text still stands."""
        system = [{"role": "system", "content": self._system}] if self._system is not None else []
        text = self._tokenizer.render_marked([*system, *messages], **self._variables)
        if before.token_ids and text.startswith(before.text):
            new = self._tokenizer.encode_after(before.text, text[len(before.text) :])
            if new is not None:
                return _State(messages, before.token_ids + tuple(new), text)
        return _State(messages, tuple(self._tokenizer.encode_marked(text)), text)

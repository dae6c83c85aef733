"""Conversation: a chat that keeps its token ids and encodes only the new text.

Encoding a whole chat again may split an answer into other tokens than those that were generated; then the prefix cache
would have nothing after the first difference. Here the generated ids stay:

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
    """The chat at one moment: messages, their token ids, and the text of these ids."""

    messages: tuple[dict, ...] = ()
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    text: str = field(default="", repr=False)


class Conversation:
    """A chat between a user and a model, as messages and as token ids.

        prompt = conversation.ask("Hello")          # ids for the engine
        conversation.answer(output.token_ids, output.text)

    system      the system message; None: that of the template
    variables   passed to the chat template: enable_thinking, ...
    Raises      RequestError where the model has no tokenizer or chat template, or the template refuses
    """

    def __init__(self, tokenizer: Tokenizer | None, system: str | None = None, **variables: Any) -> None:
        if tokenizer is None:
            raise RequestError("this model has no tokenizer.json, so it cannot chat")
        if tokenizer.template is None:
            raise RequestError("this model has no chat template, so it cannot chat")
        self.tokenizer = tokenizer
        self._variables = variables
        self.system = system
        self._states = [_State()]
        """The states after each message, for undo: empty, asked, answered, asked, answered, ..."""

    @property
    def messages(self) -> list[dict]:
        """All messages, the system message first where there is one."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return system + [dict(message) for message in self._states[-1].messages]

    @property
    def token_ids(self) -> list[int]:
        """The ids of all messages: the next prompt begins with them, and the cache may hold them."""
        return list(self._states[-1].token_ids)

    @property
    def num_turns(self) -> int:
        """Questions asked so far."""
        return sum(message["role"] == "user" for message in self._states[-1].messages)

    def ask(self, text: str) -> list[int]:
        """Adds a message of the user. Returns the ids of the whole prompt, which the assistant continues.

        Raises RequestError where the template refuses the messages; the chat is unchanged then.
        """
        now = self._states[-1]
        asked = (*now.messages, {"role": "user", "content": text})
        self._states.append(self._render(asked, now))
        return self.token_ids

    def answer(self, token_ids: Sequence[int], text: str) -> None:
        """Adds the assistant's answer.

        token_ids   as generated, with the end-of-turn token
        text        as shown to the user
        Raises      RequestError where the last message is no question
        """
        now = self._states[-1]
        if not now.messages or now.messages[-1]["role"] != "user":
            raise RequestError("answer: nothing has been asked")
        said = self.tokenizer.decode(token_ids, skip_special=False)
        messages = (*now.messages, {"role": "assistant", "content": text})
        self._states.append(_State(messages, now.token_ids + tuple(token_ids), now.text + said))

    def undo(self) -> bool:
        """Removes the last question and its answer. False where there is no question."""
        if len(self._states) == 1:
            return False
        while self._states[-1].messages and self._states[-1].messages[-1]["role"] == "assistant":
            self._states.pop()
        self._states.pop()
        return True

    def clear(self) -> None:
        """Removes all turns; the system message stays."""
        self._states = [_State()]

    def copy(self) -> Conversation:
        """Another chat with the same turns, so that a question can be tried."""
        other = Conversation(self.tokenizer, self.system, **self._variables)
        other._states = list(self._states)
        return other

    def without_oldest(self, num_turns: int) -> Conversation:
        """Another chat without its `num_turns` oldest turns; the system message stays. Encodes the rest again.

        Raises RequestError where the template refuses the rest.
        """
        other = self.copy()
        questions = [place for place, message in enumerate(self._states[-1].messages) if message["role"] == "user"]
        first = questions[num_turns] if num_turns < len(questions) else len(self._states[-1].messages)
        other._states = [_State(state.messages[first:]) for state in self._states[first:]]
        if other._states[-1].messages:
            text, literal = self.tokenizer.render(other.messages, add_generation_prompt=False, **self._variables)
            ids = tuple(self.tokenizer.pieces.encode(text, literal))
            other._states[-1] = _State(other._states[-1].messages, ids, text)
        return other

    def set_system(self, system: str | None) -> None:
        """Replaces the system message, for earlier turns too: the next question encodes them again."""
        self.system = system
        self._states = [_State(state.messages) for state in self._states]

    def load(self, messages: Sequence[dict]) -> None:
        """Replaces all messages: an optional system message, then user and assistant in turns.

        Raises RequestError for another order; the chat is unchanged then.
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
        self.system = system
        self._states = [_State(tuple(turns[:end])) for end in range(len(turns) + 1)]

    def _render(self, messages: tuple[dict, ...], before: _State) -> _State:
        """The state that asks for an answer to `messages`. Keeps the ids of `before` where its text is a prefix."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        text, literal = self.tokenizer.render([*system, *messages], **self._variables)
        if before.token_ids and text.startswith(before.text):
            new = self.tokenizer.pieces.encode_after(text, literal, len(before.text))
            if new is not None:
                return _State(messages, before.token_ids + tuple(new), text)
        return _State(messages, tuple(self.tokenizer.pieces.encode(text, literal)), text)

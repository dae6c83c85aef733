"""Conversations as prompts: one, or several at once, through the chat template of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from nanokv.core.arguments import no_such
from nanokv.core.errors import RequestError
from nanokv.core.request import SamplingParams
from nanokv.text.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
"""A conversation: {"role", "content"} of each message."""


def are_several(messages: Messages | Sequence[Messages]) -> bool:
    """Whether these are several conversations, and not the messages of one."""
    return isinstance(messages, (list, tuple)) and len(messages) > 0 and isinstance(messages[0], (list, tuple))


def chat_prompts(
    tokenizer: Tokenizer | None, messages: Messages | Sequence[Messages], params: Any, variables: dict[str, Any]
) -> list[list[int]]:
    """Token ids of each conversation.

    params      SamplingParams, or a sequence of them: each asks for one sample
    variables   of the template; none has the name of a field of SamplingParams, which the template would ignore
    Raises      RequestError
    """
    for one in params if isinstance(params, (list, tuple)) else [params]:
        if isinstance(one, SamplingParams) and one.n != 1:
            raise RequestError(f"n={one.n}: a chat has one answer; use generate() for more")
    conversations = cast("list[Messages]", messages if are_several(messages) else [messages])
    return [chat_prompt(tokenizer, one, variables) for one in conversations]


def chat_prompt(tokenizer: Tokenizer | None, messages: Messages, variables: dict[str, Any]) -> list[int]:
    """Token ids of one conversation; arguments as of `chat_prompts`. Raises RequestError."""
    if tokenizer is None:
        raise RequestError("messages: this model has no tokenizer.json; use generate() with token ids")
    if are_several(messages):
        raise RequestError("messages: a stream has one conversation; use chat() for several")
    for field in fields(SamplingParams):
        if field.name in variables:
            raise no_such(RequestError, "chat", [field.name], ("messages", "params"), SamplingParams)
    return tokenizer.chat(messages, **variables)

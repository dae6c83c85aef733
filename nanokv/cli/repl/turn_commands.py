"""Slash commands about the turns of a conversation: /clear, /undo, /trim, /regen."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from functools import partial

from nanokv.cli.common import counted
from nanokv.cli.repl.registry import Chat, command
from nanokv.core.errors import RequestError
from nanokv.core.request import Request
from nanokv.text.conversation import Conversation


@command("/clear", "forget the conversation, keep the system message")
def _clear(chat: Chat, _argument: str) -> None:
    chat.conversation.clear()
    chat.attached = []
    chat.terminal.note("conversation cleared")


@command("/undo [N]", "remove your last message and its answer, or the last N")
def _undo(chat: Chat, argument: str) -> None:
    """The earlier turns stay in the cache, so the next answer begins as fast."""
    wanted = _count(argument, "/undo", chat.conversation.num_turns, "nothing to undo")
    for _ in range(wanted):
        chat.conversation.undo()
    removed = "last turn" if wanted == 1 else f"last {wanted} turns"
    chat.terminal.note(f"{removed} removed; {counted(chat.conversation.num_turns, 'turn')} left")


@command("/trim [N]", "remove the oldest turns, keep the system message")
def _trim(chat: Chat, argument: str) -> None:
    """/trim N removes the N oldest turns; alone: as many as leave half of the context.
    A prompt is found in the cache up to the first token that differs, so only what
    precedes the removed turns is still cached: the next answer computes the rest."""
    conversation, most = chat.conversation, chat.conversation.num_turns
    wanted = _count(argument, "/trim", most, "nothing to trim")

    def without(number: int) -> Conversation:
        return chat.stop.run(partial(conversation.without_oldest, number))

    if not argument:
        half = chat.llm.engine.max_length // 2
        wanted = 1 + bisect_left(range(1, most), True, key=lambda number: len(without(number).token_ids) <= half)
    chat.conversation = trimmed = without(wanted)
    tokens = trimmed.token_ids
    kept = 0
    if tokens:
        # One more token, as the next message will bring: the last token of a prompt is never taken from the cache.
        request = Request([])
        request.tokens = array("i", [*tokens, tokens[-1]])
        kept = chat.llm.loop.call(lambda engine: engine.cache.prefix_length(request))
    left = f"{counted(trimmed.num_turns, 'turn')} left"
    chat.terminal.note(
        f"oldest {counted(wanted, 'turn')} removed; {left}: {counted(len(tokens), 'token')}, {kept:,} of them cached, "
        f"{len(tokens) - kept:,} to compute again"
    )


@command("/regen", "answer your last message again")
def _regen(chat: Chat, _argument: str) -> None:
    """With a fixed seed, or temperature 0, the answer is the same."""
    chat.answer_again()


def _count(argument: str, name: str, most: int, nothing: str) -> int:
    """The number of turns that a command is to remove. Raises RequestError."""
    if most == 0:
        raise RequestError(f"{nothing}: the conversation is empty")
    if not argument:
        return 1
    if not argument.isdecimal() or not 1 <= int(argument[:9]) <= most:
        raise RequestError(f"{name} {argument}: expected a number of turns, 1 to {most}")
    return int(argument)

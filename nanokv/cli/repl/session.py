"""ChatSession: a conversation with a model: reads lines, sends messages, runs slash commands between two answers."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanokv.cli.repl.commands import run_command
from nanokv.cli.repl.compiling import Compilations, WarmUp
from nanokv.cli.repl.fitting import longest_token
from nanokv.cli.repl.overload import Overload
from nanokv.cli.repl.stop_key import StopKey
from nanokv.cli.repl.turn import Turn, answer, stats_line
from nanokv.core.errors import NanokvError, RequestError
from nanokv.core.request import RequestOutput, SamplingParams
from nanokv.engine.limits import processors
from nanokv.text.conversation import Conversation

if TYPE_CHECKING:
    from nanokv.cli.repl.reader import LineReader
    from nanokv.cli.repl.terminal import Terminal
    from nanokv.llm import LLM

logger = logging.getLogger("nanokv")

LEAVE_HINT = "Use Ctrl-D or /bye to leave."
ROOM_HINT = "/trim removes the oldest turns, /clear all, /undo the last one"
FAREWELL = "left; the conversation is gone (/save FILE keeps one, before leaving)"


class ContextFull(RequestError):
    """The conversation with the next message is longer than the model or the pool allows."""


class ChatSession:
    """State of one `nanokv chat`.

    llm           the loaded model
    model         its name, as the user gave it
    system        system message; None: that of the template
    params        SamplingParams of the next answer; `/set` replaces them. `defaults`: those of the start
    terminal      receives answers and notes
    show_stats    whether a line of numbers follows each answer
    compiled      counts compiled kernels; None: counts none
    conversation  the turns so far
    attached      files of `/read`, (path, text), sent before the next message
    leaving       whether `run` returns after this line
    Raises        RequestError where the model cannot chat (no tokenizer, no chat template)
    """

    def __init__(
        self,
        llm: LLM,
        model: str,
        system: str | None,
        params: SamplingParams,
        terminal: Terminal,
        show_stats: bool,
        compiled: Compilations | None = None,
    ) -> None:
        self.llm = llm
        self.model = model
        self.params = self.defaults = params
        self.terminal = terminal
        self.show_stats = show_stats
        self.conversation = Conversation(llm.tokenizer, system)
        self.attached: list[tuple[Path, str]] = []
        self.stop = StopKey()  # held while a line is handled, so that Ctrl-C interrupts between engine steps only
        self.leaving = False
        self.compiled = Compilations() if compiled is None else compiled
        self.warm_up = WarmUp()
        self.overload = Overload(torch.get_num_threads(), processors())

    def run(self, reader: LineReader) -> None:
        """Reads and answers lines until the user leaves. Meanwhile the kernels run once, which may compile them."""
        self.stop.farewell = FAREWELL
        self.warm_up.start(self.llm)
        while not self.leaving:
            try:
                with self.compiled.silent():
                    line = reader.read()
                if line is None:
                    self.terminal.line()
                    return
                self.handle(line)
            except KeyboardInterrupt:
                self.terminal.line()
                if not reader.pending:
                    self.terminal.note(LEAVE_HINT)
            except UnicodeDecodeError as error:
                self.terminal.error(f"your line is not valid {error.encoding} at byte {error.start}: not sent")

    def handle(self, line: str) -> None:
        """Handles one entry: a slash command, or a message for the model (`//` sends a literal slash).

        No entry ends the chat: every error is one line, and the conversation is as it was.
        """
        entered, was_full = time.perf_counter(), self.is_full
        with self.stop:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    run_command(self, line)
                elif line.strip():
                    self.send(line[1:] if line.startswith("//") else line, entered)
            except ContextFull as error:
                dropped = "; the files of /read are dropped" if self.attached else ""
                self.attached = []  # they would make every later message fail too
                self.terminal.error(f"{error}{dropped}; {ROOM_HINT}")
            except NanokvError as error:
                self.terminal.error(str(error))
            except BrokenPipeError:  # no reader is left
                raise
            except Exception as error:
                logger.error("an entry failed", exc_info=True)  # shown with --debug
                text = " ".join(f"unexpected {type(error).__name__}: {str(error) or 'no details'}".split())
                self.terminal.error(f"{text:.300}; the conversation is as it was (--debug shows where)")
        if self.is_full and not was_full:
            self.terminal.note(f"the context is full: {ROOM_HINT}")

    @property
    def is_full(self) -> bool:
        """Whether the conversation fills the context, so that no further message fits."""
        return len(self.conversation.token_ids) >= self.llm.engine.max_length

    @property
    def room(self) -> int:
        """Tokens that the context has left, beside the turns so far and the files of `/read`."""
        attached = sum(len(self.conversation.tokenizer.encode(content)) for _, content in self.attached)
        return self.llm.engine.max_length - len(self.conversation.token_ids) - attached

    def send(self, text: str, entered: float) -> Turn:
        """Sends `text` and streams the answer. Call it inside `with self.stop`.

        entered   perf_counter() when the user pressed Enter
        Raises    RequestError; the conversation is unchanged then
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"your message is not valid Unicode at character {error.start}: not sent") from None
        text = "\n\n".join([*(content for _, content in self.attached), text])
        before, self.conversation = self.conversation, self._asked(self.conversation, text)
        try:
            turn = self._stream(entered)
        except BaseException:
            self.conversation = before
            raise
        self.attached = []
        return turn

    def answer_again(self) -> None:
        """Replaces the last answer by a new one. Raises RequestError; the old answer stays then."""
        before = self.conversation
        if before.num_turns == 0:
            raise RequestError("nothing to answer again: the conversation is empty")
        question = next(message["content"] for message in reversed(before.messages) if message["role"] == "user")
        earlier = before.copy()
        earlier.undo()
        self.conversation = self._asked(earlier, question)
        try:
            self._stream(time.perf_counter())
        except BaseException:
            self.conversation = before
            raise

    def _asked(self, conversation: Conversation, text: str) -> Conversation:
        """A copy of the conversation with a question. Raises ContextFull where it is too long to encode, Stopped."""
        asked, most = conversation.copy(), self.llm.engine.max_length
        size = len(text) + sum(len(message["content"]) for message in conversation.messages)
        if size > most * longest_token(conversation.tokenizer):
            raise ContextFull(f"the context is full: {size:,} characters with this message, {most:,} tokens fit")
        self.stop.run(lambda: asked.ask(text))
        return asked

    def _stream(self, entered: float) -> Turn:
        """Streams the answer to the conversation and keeps it, stopped or not.

        Raises RequestError where there is no answer.
        """
        engine, token_ids = self.llm.engine, self.conversation.token_ids
        if len(token_ids) >= engine.max_length:
            fit = f"at most {engine.max_length - 1:,} fit"
            raise ContextFull(f"the context is full: {len(token_ids):,} tokens with this message, {fit}")
        if self.warm_up.is_running:
            self.compiled.announce()
            with self.terminal.busy(lambda: self.compiled.line() or "preparing kernels ..."):
                self.stop.wait(lambda: not self.warm_up.is_running)
        self.overload.begin()
        turn = answer(self.llm, token_ids, self.params, self.terminal, self.stop, entered, self.compiled)
        output = turn.output
        if output.text or output.finish_reason != "error":
            self.terminal.end_answer()
        if output.finish_reason == "error":
            raise RequestError(f"the engine could not finish this answer: {output.error}")
        self.conversation.answer(output.token_ids, output.text)
        if self.show_stats:
            layout = engine.layout
            numbers = stats_line(turn, layout.page_size, layout.page_bytes, layout.state_bytes)
            self.terminal.note(numbers + self._why_cut(output))
        if line := self.overload.line():
            self.terminal.note(line)
        return turn

    def _why_cut(self, output: RequestOutput) -> str:
        if output.finish_reason != "length":
            return ""
        return " · cut: context full" if self.is_full else f" · cut at max_tokens {self.params.max_tokens}"

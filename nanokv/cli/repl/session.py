"""ChatSession: a conversation with a model: reads lines, sends messages, runs slash commands between two answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from nanokv.cli.repl.commands import run_command
from nanokv.cli.repl.turn import StopKey, Turn, answer, stats_line
from nanokv.core.errors import NanokvError, RequestError
from nanokv.core.request import RequestOutput, SamplingParams
from nanokv.text.conversation import Conversation

if TYPE_CHECKING:
    from nanokv.cli.repl.reader import LineReader
    from nanokv.cli.repl.terminal import Terminal
    from nanokv.llm import LLM

LEAVE_HINT = "Use Ctrl-D or /bye to leave."
ROOM_HINT = "/clear starts a new conversation, /undo removes the last turn"


class ContextFull(RequestError):
    """The conversation with the next message is longer than the model or the pool allows."""


class ChatSession:
    """State of one `nanokv chat`.

    llm           the loaded model
    model         its name, as the user gave it
    system        system message; None: that of the template
    params        SamplingParams of the next answer; `/set` replaces them
    terminal      receives answers and notes
    show_stats    whether a line of numbers follows each answer
    conversation  the turns so far
    attached      files of `/read`, (path, text), sent before the next message
    leaving       whether `run` returns after this line
    Raises        RequestError where the model cannot chat (no tokenizer, no chat template)
    """

    def __init__(
        self, llm: LLM, model: str, system: str | None, params: SamplingParams, terminal: Terminal, show_stats: bool
    ) -> None:
        self.llm = llm
        self.model = model
        self.params = params
        self.terminal = terminal
        self.show_stats = show_stats
        self.conversation = Conversation(llm.tokenizer, system)
        self.attached: list[tuple[Path, str]] = []
        self.stop = StopKey()  # held while a line is handled, so that Ctrl-C interrupts between engine steps only
        self.leaving = False

    def run(self, reader: LineReader) -> None:
        """Reads and answers lines until the user leaves."""
        while not self.leaving:
            try:
                line = reader.read()
                if line is None:
                    self.terminal.line()
                    return
                self.handle(line)
            except KeyboardInterrupt:
                self.terminal.line()
                if not reader.pending:
                    self.terminal.note(LEAVE_HINT)

    def handle(self, line: str) -> None:
        """Handles one entry: a slash command, or a message for the model (`//` sends a literal slash)."""
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
        if self.is_full and not was_full:
            self.terminal.note(f"the context is full: {ROOM_HINT}")

    @property
    def is_full(self) -> bool:
        """Whether the conversation fills the context, so that no further message fits."""
        return len(self.conversation.token_ids) >= self.llm.engine.max_length

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
        token_ids = self.conversation.ask(text)
        try:
            turn = self._stream(token_ids, entered)
        except NanokvError:
            self.conversation.undo()
            raise
        self.attached = []
        return turn

    def answer_again(self) -> None:
        """Replaces the last answer by a new one. Raises RequestError; the old answer stays then."""
        before = self.conversation.messages
        if self.conversation.num_turns == 0:
            raise RequestError("nothing to answer again: the conversation is empty")
        question = next(message["content"] for message in reversed(before) if message["role"] == "user")
        self.conversation.undo()
        try:
            self._stream(self.conversation.ask(question), time.perf_counter())
        except NanokvError:
            self.conversation.load(before)
            raise

    def _stream(self, token_ids: list[int], entered: float) -> Turn:
        """Streams the answer to a prompt and keeps it, stopped or not. Raises RequestError where there is no answer."""
        engine = self.llm.engine
        if len(token_ids) >= engine.max_length:
            fit = f"at most {engine.max_length - 1:,} fit"
            raise ContextFull(f"the context is full: {len(token_ids):,} tokens with this message, {fit}")
        turn = answer(self.llm, token_ids, self.params, self.terminal.say, self.stop, entered)
        output = turn.output
        if output.text or output.finish_reason != "error":
            self.terminal.say("\n")
        if output.finish_reason == "error":
            raise RequestError(f"the engine could not finish this answer: {output.error}")
        self.conversation.answer(output.token_ids, output.text)
        if self.show_stats:
            layout = engine.layout
            numbers = stats_line(turn, layout.page_size, layout.page_bytes, layout.state_bytes)
            self.terminal.note(numbers + self._why_cut(output))
        return turn

    def _why_cut(self, output: RequestOutput) -> str:
        if output.finish_reason != "length":
            return ""
        return " · cut: context full" if self.is_full else f" · cut at max_tokens {self.params.max_tokens}"

"""A prefill process for other hosts: `nanokv disagg prefill --listen HOST:PORT`. One decode process at a time.

Others are heard meanwhile, and wait for their turn (reception.py). It computes into pages of its own and sends them
(transport.py). The cached pages of the decode process are not here, so a prompt is computed from its first token, and
only the pages that the decode process lacks are sent. Pages and states are zeroed before they get an owner: behind the
end of a prompt no byte of an earlier one is sent. It has no prefix cache: a second tree would pay only for a long new
text behind a long cached one.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import msgspec
from torch import Tensor

from nanokv.cache.pool import PagePool, StatePool
from nanokv.cache.store import CacheStore, Slots
from nanokv.core.batch import Batch
from nanokv.core.errors import NanokvError
from nanokv.core.request import Request
from nanokv.disagg.channel import Channel
from nanokv.disagg.config import join_address
from nanokv.disagg.messages import (
    Abort,
    AbortAck,
    Done,
    Failed,
    Hello,
    Layers,
    Message,
    Prefill,
    failed,
    pack_ints,
    printable,
    unpack_ints,
)
from nanokv.disagg.prefill_loop import PrefillLoop
from nanokv.disagg.reception import SILENCE_S, Reception
from nanokv.disagg.transport import GROUP_BYTES, PageSender
from nanokv.disagg.worker import PrefillModel, Session
from nanokv.engine.memory import memory_for_pages, pool_size

logger = logging.getLogger("nanokv")

MAX_HELD = 64 << 20
"""Bytes of the messages of open prompts. Beyond it a prompt fails, and the decode process computes it."""
OBJECTS = 1 << 10
"""Bytes of the objects of one open prompt, however short it is."""
MAX_SAMPLES = 128
"""Samples of the prompts that are computed at once: each has a row of logits, as long as the vocabulary."""


@dataclass
class ServedAttempt:
    """One attempt: the message, which names pages and states of the decode process, and its pages and states here."""

    message: Prefill
    pages: list[int]
    states: list[int]


class SendingSession(Session):
    """A Session over a pool of its own, where prompts wait until there are pages for them.

    sender   of pages, on the connection of the messages
    """

    def __init__(self, channel: Channel, loop: PrefillLoop, heartbeat_s: float, silence_s: float | None = None) -> None:
        super().__init__(channel, loop, heartbeat_s, silence_s)
        store, layout = loop.store, loop.store.layout
        self.sender = PageSender(channel, store, self.send_at_once, min(heartbeat_s, silence_s or heartbeat_s))
        self._pages, self._states = PagePool(len(store.pages)), StatePool(len(store.states))
        self._waiting: deque[Prefill] = deque()
        self._attempts: dict[int, ServedAttempt] = {}
        self._held = 0  # bytes of the messages of both
        self._highest = 0  # attempt that came or was aborted, as in PrefillLoop, which gets it later
        self._first, self._last = 0, layout.num_layers - 1
        self._per_layer = max(1, layout.page_bytes // layout.num_layers)

    def hear(self, message: Message) -> None:
        """Takes one message. Raises ProtocolError for one that no decode process may send."""
        if message.generation != self.loop.generation:
            return
        if isinstance(message, Prefill):
            if message.attempt > self._highest:
                self._highest = message.attempt
                self._take(message)
        elif isinstance(message, Abort):
            self._highest = max(self._highest, message.attempt)
            for one in [
                one for one in self._waiting if (one.request, one.attempt) == (message.request, message.attempt)
            ]:
                self._waiting.remove(one)
                self._held -= _weight(one)
            attempt = self._attempts.get(message.attempt)
            if attempt is not None and attempt.message.request == message.request:
                self.send(self.loop.abort(message))
                self._free(message.attempt)
            else:  # not told to the loop, for which the waiting prompts before it would be late
                self.send(AbortAck(generation=message.generation, request=message.request, attempt=message.attempt))
        else:
            super().hear(message)
        self._admit()

    def send(self, message: Message) -> None:
        """Sends a message; DONE only after the pages and states that it reports."""
        if isinstance(message, Done):
            attempt = self._attempts[message.attempt]
            if attempt.states:
                self._send(attempt, attempt.message.states, attempt.states, 0, self._last + 1, states=True)
        self.send_at_once(message)
        if isinstance(message, (Done, Failed)):
            self._free(message.attempt)
            self._admit()

    def send_at_once(self, message: Message) -> None:
        """Sends a message, whatever it reports."""
        super().send(message)

    def between(self, layer: int, x: Tensor, residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
        """Sends the layers computed since the last send, if they are large enough or the last."""
        stream = super().between(layer, x, residual, batch)
        self._send_layers(layer)
        return stream

    def _send_layers(self, layer: int) -> None:
        if layer == 0:  # the step before may have failed halfway
            self._first = 0
        rows = sum(request.num_scheduled for request in self.loop.running)
        pages = -(-rows // self.loop.store.layout.page_size)
        if layer < self._last and (layer + 1 - self._first) * self._per_layer * pages < GROUP_BYTES:
            return
        for request in self.loop.running:
            self._send_pages(request, self._first, layer + 1)
        self._first = 0 if layer == self._last else layer + 1

    def _send_pages(self, request: Request, first: int, last: int) -> None:
        attempt = self._attempts[self.loop.prompt(request).attempt]
        size, end = self.loop.store.layout.page_size, request.num_computed + request.num_scheduled
        begin = max(request.num_computed, attempt.message.cached_length) // size
        here = attempt.pages[begin : -(-end // size)]
        if here:
            there = unpack_ints(attempt.message.pages)[begin : begin + len(here)].tolist()
            self._send(attempt, there, here, first, last)

    def _send(
        self, attempt: ServedAttempt, there: list[int], here: list[int], first: int, last: int, states: bool = False
    ) -> None:
        message = attempt.message
        announced = Layers(
            generation=message.generation, request=message.request, attempt=message.attempt,
            places=pack_ints(there), first=first, last=last, states=states,
        )  # fmt: skip
        self.sender.send(announced, here)

    def _take(self, message: Prefill) -> None:
        """Queues a prompt, or sends FAILED at once where it can never be computed or too many wait."""
        refused = self._refusal(message)
        if refused is None and self._held + _weight(message) > MAX_HELD:
            refused = failed(message, f"the prompts that wait here have {MAX_HELD:,} bytes")
        if refused is not None:
            self.send_at_once(refused)
        else:
            self._held += _weight(message)
            self._waiting.append(message)

    def _admit(self) -> None:
        """Prompts in order of arrival, as long as there are pages and states."""
        while self._waiting:
            message = self._waiting[0]
            num_pages, num_states = self.loop.cache.pages_for(len(message.tokens) // 4), len(message.states)
            samples = sum(one.sampling.samples for one in (message, *(two.message for two in self._attempts.values())))
            if num_pages > self._pages.num_free or num_states > self._states.num_free or samples > MAX_SAMPLES:
                return
            self._waiting.popleft()
            states = [state for _ in range(num_states) if (state := self._states.allocate()) is not None]
            attempt = ServedAttempt(message, self._pages.allocate(num_pages), states)
            _clear(self.loop.store.pages, attempt.pages)
            _clear(self.loop.store.states, attempt.states)
            self._attempts[message.attempt] = attempt
            refused = self.loop.accept(self._translated(attempt))
            if refused is not None:
                self.send_at_once(refused)
                self._free(message.attempt)

    def _refusal(self, message: Prefill) -> Failed | None:
        """FAILED of a prompt for which no pages can be allocated. PrefillLoop checks the other fields."""
        cached, size = message.cached_length, self.loop.store.layout.page_size
        num_pages = self.loop.cache.pages_for(len(message.tokens) // 4)
        if len(message.pages) != 4 * num_pages or cached % size or not 0 <= cached < len(message.tokens) // 4:
            return failed(message, "pages and cached_length do not fit the tokens")
        if (message.state is None) != (self._states.num_states == 0):
            has = "no recurrent states" if message.state is not None else "recurrent states, and the prompt names none"
            return failed(message, f"this model has {has}")
        if message.state is None and message.checkpoints:
            return failed(message, "checkpoints of a state that does not exist")
        if not 0 < message.sampling.samples <= MAX_SAMPLES:
            return failed(message, f"a prompt has 1 to {MAX_SAMPLES} samples here")
        if num_pages > self._pages.num_pages:
            return failed(message, "the prompt is longer than the pool of this prefill process")
        if len(message.states) > self._states.num_states:
            return failed(message, "the prompt has more checkpoints than this prefill process has states")
        return None

    def _translated(self, attempt: ServedAttempt) -> Prefill:
        """The same prompt over places of this pool, computed from its first token."""
        checkpoints = [position for position, _ in attempt.message.checkpoints]
        return msgspec.structs.replace(
            attempt.message, cached_length=0, pages=pack_ints(attempt.pages),
            state=attempt.states[0] if attempt.states else None,
            checkpoints=tuple(zip(checkpoints, attempt.states[1:], strict=True)),
        )  # fmt: skip

    def _free(self, number: int) -> None:
        attempt = self._attempts.pop(number, None)
        if attempt is not None:
            self._held -= _weight(attempt.message)
            self._pages.release(attempt.pages)
            for state in attempt.states:
                self._states.release(state)


def _weight(message: Prefill) -> int:
    """Bytes that a prompt takes here, about."""
    texts = len(message.request) + len(message.sampling.seed)
    numbers = len(message.checkpoints) + len(message.sampling.stop_token_ids)
    return OBJECTS + len(message.tokens) + len(message.pages) + 4 * texts + 64 * numbers  # a letter: up to 4 bytes


def _clear(slots: Slots, ids: Sequence[int]) -> None:
    for one in ids:
        slots.data[one].zero_()


def serve_one(model: PrefillModel, store: CacheStore, channel: Channel, answer: Hello) -> None:
    """Serves one decode process until it closes the connection.

    store    for prompts in progress; its bytes of another decode process are zeroed before they are sent
    answer   to HELLO
    Raises   ProtocolError, EOFError
    """
    session: SendingSession
    loop = PrefillLoop(model.decoder, store, model.config, answer.generation, lambda *stream: session.between(*stream))
    session = SendingSession(channel, loop, answer.heartbeat_s, SILENCE_S)
    try:
        session.send(answer)
        session.serve()
    finally:  # both refer to the session: its buffers must not wait for a garbage collection
        del session.sender, session.loop


def listen(model: PrefillModel, server: socket.socket, secret: bytes | None = None) -> None:
    """Serves one decode process after the other, for ever.

    server   from `bind`
    secret   that decode processes must know, or None
    Raises   ConfigError where the pages do not fit in memory: before a decode process connects, never later
    """
    memory = memory_for_pages(model.config, model.decoder, model.layout, model.device)
    num_pages, num_states = pool_size(model.config, model.layout, memory)
    store = CacheStore(model.layout, num_pages, model.device, num_states=num_states)
    logger.warning("listening on %s", join_address(*server.getsockname()[:2]))
    reception = Reception(server, model.digest, secret)
    while True:
        guest = reception.next()
        try:
            with closing(guest.channel):
                serve_one(model, store, guest.channel, reception.answer(guest))
            logger.warning("%s disconnected", guest.name)
        except Exception as error:  # ends this session; the next decode process is served
            known = isinstance(error, (NanokvError, EOFError, OSError))
            what = printable(error if known else f"{type(error).__name__}: {error}")
            logger.warning("%s: %s", guest.name, what, exc_info=logger.isEnabledFor(logging.DEBUG))

"""HostLink: a prefill process on another host, as a peer. A thread relays its messages and writes its pages.

    engine thread <-- Channel over a socket pair --> link thread <-- Channel over TCP --> prefill process
                   (a PING while pages come)                         messages, pages

It connects when the engine says HELLO, so that a prefill process waits for no model that is still being loaded. The
link is gone when its thread has ended: nothing is written into the pool after that. Pages that arrive for an attempt
are written only into pages and states that were granted to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from nanokv.cache.store import CacheStore
from nanokv.core.errors import ConfigError, NanokvError
from nanokv.disagg.channel import MAX_UNREAD, Channel, wait
from nanokv.disagg.config import split_address
from nanokv.disagg.messages import (
    AbortAck,
    Challenge,
    Done,
    Failed,
    Hello,
    Layers,
    Message,
    Ping,
    Prefill,
    ProtocolError,
    printable,
    unpack_ints,
)
from nanokv.disagg.secret import is_loopback, is_signed, new_nonce, signed
from nanokv.disagg.transport import Arrivals, PageReceiver

logger = logging.getLogger("nanokv")

RETRY_S = 1.0
"""Seconds between two attempts to connect to a host that was lost."""
CHALLENGE_S = 10.0
"""Seconds within which a prefill process says CHALLENGE, also while it serves another decode process."""
PING_S = 2.0
"""Seconds between two PINGs to the prefill process, from HELLO on: it drops a decode process that is silent."""


def connect(address: str, seconds: float, secret: bytes | None) -> socket.socket:
    """A connection to HOST:PORT. Raises ConfigError where none is made within `seconds`, or where prompts would go to
    another host that proves nothing."""
    try:
        sock = socket.create_connection(split_address(address), timeout=seconds)
    except OSError as error:
        raise ConfigError(
            f"connect={address!r}: {error.strerror or error}; is `nanokv disagg prefill` running?"
        ) from None
    if secret is None and not is_loopback(sock.getpeername()[0]):
        sock.close()
        raise ConfigError(f"connect={address!r}: another host has to prove itself; give a secret_file (--secret-file)")
    return sock


class HostLink:
    """One connection, from `connect` to its end.

    address   HOST:PORT
    store     returns the pool of the decode process; called after HELLO is sent
    seconds   for which pages may stand still
    secret    that both hosts share, or None
    why       why it ended; read after its end
    """

    def __init__(
        self, address: str, store: Callable[[], CacheStore], seconds: float, secret: bytes | None = None
    ) -> None:
        self._near, far = socket.socketpair()
        self.name = f"prefill {address}"
        self.why: str | None = None
        self.channel = Channel(self._near)
        self._address, self._store, self._seconds, self._secret = address, store, seconds, secret
        self._engine = Channel(far, most_unread=MAX_UNREAD)
        self._ended, self._end = os.pipe()
        self._closing = threading.Event()
        self._granted: dict[int, Arrivals] = {}
        self._hello: Hello | None = None  # as the engine has said it; with a nonce once it is sent
        self._challenge: bytes | None = None
        self._receiver: PageReceiver | None = None  # once HELLO is answered
        self._sock: socket.socket | None = None
        self._pinged = self._told = self._connected = time.monotonic()  # the prefill process, the engine
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """A descriptor that is readable once the thread has ended."""
        return self._ended

    @property
    def gone(self) -> bool:
        """Whether the thread has ended, which writes nothing after that."""
        return not self._thread.is_alive()

    def kill(self) -> None:
        """Closes the connection. Pages in flight may still be written until `gone`."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_WR)  # wakes the thread
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Frees the descriptors. Called once, after its end."""
        self.channel.close()
        os.close(self._ended)

    # -- the thread

    @property
    def _is_ending(self) -> bool:
        return self._engine.closed or self._closing.is_set()

    def _run(self) -> None:
        far: Channel | None = None
        try:
            self._await_hello()
            while self._sock is None and not self._is_ending:
                try:
                    self._sock = connect(self._address, self._seconds, self._secret)
                except ConfigError:
                    self._closing.wait(RETRY_S)
            if self._sock is not None:
                far = Channel(self._sock)
                self._connected = time.monotonic()
                self._relay(far)
                self.why = f"connect={self._address!r}: closed the connection before it was ready"
        except (NanokvError, EOFError, OSError) as error:
            # The supervisor warns that the worker is gone; this line has the cause.
            what = printable(error)
            logger.info("%s: %s", self.name, what)
            is_stranger = isinstance(error, ProtocolError) and self._challenge is None
            self.why = f"connect={self._address!r}: {'no nanokv prefill process there' if is_stranger else what}"
        finally:
            self._receiver = None
            if far is not None:
                far.close()
            self._engine.close()
            os.close(self._end)

    def _await_hello(self) -> None:
        while self._hello is None and not self._is_ending:
            wait([self._engine])
            for message in self._engine.receive():
                self._hello = message if isinstance(message, Hello) else self._hello

    def _relay(self, far: Channel) -> None:
        while not (far.closed or self._is_ending):
            writing = [channel for channel in (far, self._engine) if channel.is_backed_up]
            wait([far, self._engine], writing, PING_S)
            self._ping(far)
            if self._challenge is None and time.monotonic() - self._connected > CHALLENGE_S:
                raise ProtocolError("no CHALLENGE came")
            for message in self._engine.receive():
                if isinstance(message, Prefill):
                    pages = unpack_ints(message.pages)[message.cached_length // self._store().layout.page_size :]
                    self._granted[message.attempt] = Arrivals(pages, message.states, self._store())
                far.send(message)
            messages = far.receive()
            while messages:
                for message in messages:
                    self._hear(far, message)
                # Behind LAYERS and its bytes messages may be here already, for which no `wait` would return.
                messages = far.receive() if isinstance(messages[-1], Layers) else []
            far.flush()
            self._engine.flush()

    def _ping(self, far: Channel) -> None:
        """Sends PING if it is due: once HELLO is sent, before which the prefill process takes none."""
        now = time.monotonic()
        if self._challenge is not None and now - self._pinged >= PING_S:
            self._pinged = now
            far.send(Ping(generation=0))

    def _hear(self, far: Channel, message: Message) -> None:
        if isinstance(message, Challenge):
            self._prove(far, message)
        elif isinstance(message, Hello):
            self._check(far, message)
            self._engine.send(message)
        elif isinstance(message, Failed) and message.request is None:  # of a process that has proven nothing yet
            self._engine.send(msgspec.structs.replace(message, reason=printable(message.reason)))
        elif self._receiver is None:
            raise ProtocolError(f"{message.kind} came before HELLO")
        elif isinstance(message, Layers):
            self._receive(far, message)
        else:
            if isinstance(message, (Done, AbortAck, Failed)):
                arrivals = self._granted.pop(message.attempt, None)
                if isinstance(message, Done) and arrivals is not None and not arrivals.are_complete:
                    raise ProtocolError("DONE before all pages have come")
            self._engine.send(message)

    def _prove(self, far: Channel, message: Challenge) -> None:
        """Answers CHALLENGE with HELLO."""
        if self._challenge is not None:
            raise ProtocolError("a second CHALLENGE")
        assert self._hello is not None
        self._challenge, self._pinged = message.nonce, time.monotonic()
        self._hello = msgspec.structs.replace(self._hello, nonce=new_nonce())
        far.send(signed(self._hello, "decode", self._secret, self._challenge))

    def _check(self, far: Channel, answer: Hello) -> None:
        """The answer to HELLO: from now on pages are received. Raises ProtocolError where it proves nothing."""
        if self._hello is None or self._challenge is None or self._receiver is not None:
            raise ProtocolError("HELLO out of turn")
        if answer.nonce != self._hello.nonce or not is_signed(answer, "prefill", self._secret, self._challenge):
            raise ProtocolError("the prefill process there does not know the secret of this secret_file")
        if answer.memory is None or answer.memory.kind != "sent":
            raise ProtocolError("HELLO of a process that sends no pages")
        self._receiver = PageReceiver(far, self._store(), self._seconds)

    def _receive(self, far: Channel, layers: Layers) -> None:
        assert self._receiver is not None
        arrivals = self._granted.get(layers.attempt)
        if arrivals is None:
            raise ProtocolError("LAYERS for places that were not granted to that attempt")
        arrivals.add(layers)

        def tick(has_come: bool) -> None:
            self._ping(far)
            if has_come and time.monotonic() - self._told >= min(PING_S, self._seconds / 4):
                self._told = time.monotonic()
                self._engine.send(Ping(generation=layers.generation))  # pages are not relayed, but show life

        tick(True)
        self._receiver.receive(layers, tick)

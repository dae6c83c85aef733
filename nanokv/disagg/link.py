"""HostLink: a prefill process on another host, as a peer. A thread relays its messages and receives its pages.

    engine thread <-- Channel over a socket pair --> link thread <-- TCP: messages --> prefill process
                   (a PING for each LAYERS)          writes pages <-- gloo / NCCL: layers --

The link is gone when its thread has ended: nothing is written into the pool after that. Pages that arrive for an
attempt are written only into pages and states that were granted to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable

from nanokv.cache.store import CacheStore
from nanokv.core.errors import ConfigError
from nanokv.disagg.channel import Channel, wait
from nanokv.disagg.config import split_address
from nanokv.disagg.messages import (
    AbortAck,
    Done,
    Failed,
    Hello,
    Layers,
    Message,
    Ping,
    Prefill,
    ProtocolError,
    unpack_ints,
)
from nanokv.disagg.transport import PageReceiver, join_group, join_store

logger = logging.getLogger("nanokv")

RETRY_S = 1.0
"""Seconds between two attempts to connect to a host that was lost."""
PING_S = 2.0
"""Seconds between two PINGs before HELLO, while the decode process loads its model."""


def connect(address: str, seconds: float) -> socket.socket:
    """A connection to HOST:PORT. Raises ConfigError where none is made within `seconds`."""
    try:
        return socket.create_connection(split_address(address), timeout=seconds)
    except OSError as error:
        raise ConfigError(
            f"connect={address!r}: {error.strerror or error}; is `nanokv disagg prefill` running?"
        ) from None


class HostLink:
    """One connection, from `connect` to its end.

    address   HOST:PORT
    store     returns the pool of the decode process; called after HELLO is sent
    seconds   after which a send or receive without progress fails
    sock      a connection; None: the thread connects, and tries until `kill`
    why       why it ended; read after its end
    """

    def __init__(
        self, address: str, store: Callable[[], CacheStore], seconds: float, sock: socket.socket | None = None
    ) -> None:
        near, far = socket.socketpair()
        self.name = f"prefill {address}"
        self.why: str | None = None
        self.channel = Channel(near)
        self._address, self._store, self._seconds = address, store, seconds
        self._engine = Channel(far)
        self._ended, self._end = os.pipe()
        self._closing = threading.Event()
        self._granted: dict[int, tuple[set[int], set[int]]] = {}
        self._receiver: PageReceiver | None = None
        self._sock = sock
        self._is_known = False  # a message of the protocol has come
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
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Frees the descriptors. Called once, after its end."""
        self.channel.close()
        os.close(self._ended)

    # -- the thread

    def _run(self) -> None:
        far: Channel | None = None
        try:
            while self._sock is None and not self._closing.is_set():
                try:
                    self._sock = connect(self._address, self._seconds)
                except ConfigError:
                    self._closing.wait(RETRY_S)
            if self._sock is not None:
                self._here, self._there = self._sock.getsockname()[0], self._sock.getpeername()[0]
                far = Channel(self._sock)
                self._relay(far)
                self.why = f"connect={self._address!r}: closed the connection before it was ready"
        except (ProtocolError, RuntimeError, OSError) as error:  # RuntimeError: from torch.distributed
            # The supervisor warns that the worker is gone; this line has the cause.
            what = " ".join(str(error).split())[:200]
            logger.info("%s: %s", self.name, what)
            is_stranger = isinstance(error, ProtocolError) and not self._is_known
            self.why = f"connect={self._address!r}: {'no nanokv prefill process there' if is_stranger else what}"
        finally:
            self._receiver = None
            if far is not None:
                far.close()
            self._engine.close()
            os.close(self._end)

    def _relay(self, far: Channel) -> None:
        is_greeted = False
        while not (far.closed or self._engine.closed or self._closing.is_set()):
            writing = [channel for channel in (far, self._engine) if channel.is_backed_up]
            if not wait([far, self._engine], writing, None if is_greeted else PING_S):
                far.send(Ping(generation=0))
            for message in self._engine.receive():
                is_greeted = is_greeted or isinstance(message, Hello)
                if isinstance(message, Prefill):
                    cached = message.cached_length // self._store().layout.page_size
                    self._granted[message.attempt] = set(unpack_ints(message.pages)[cached:]), set(message.states)
                far.send(message)
            for message in far.receive():
                self._is_known = True
                self._hear(message)
            far.flush()
            self._engine.flush()

    def _hear(self, message: Message) -> None:
        if isinstance(message, Layers):
            if self._receiver is None:
                raise ProtocolError("LAYERS came before HELLO")
            pages, states = self._granted.get(message.attempt, (set(), set()))
            if not set(unpack_ints(message.places)) <= (states if message.states else pages):
                raise ProtocolError("LAYERS for places that were not granted to that attempt")
            self._engine.send(Ping(generation=message.generation))  # LAYERS is not relayed, but shows life
            self._receiver.post(message)
            return
        if self._receiver is not None:
            self._receiver.drain()  # the pages of an attempt are written before a message about it is relayed
        if isinstance(message, Hello):
            self._join(message)
        elif isinstance(message, (Done, AbortAck)) or (isinstance(message, Failed) and message.request is not None):
            self._granted.pop(message.attempt, None)
        self._engine.send(message)

    def _join(self, hello: Hello) -> None:
        if hello.memory is None or hello.memory.kind != "sent" or self._receiver is not None:
            raise ProtocolError("HELLO without a data connection, or a second one")
        pool = self._store()
        rendezvous = join_store(self._there, hello.memory.port, self._seconds)
        group = join_group(rendezvous, 1, pool.device, self._here, self._seconds)
        self._receiver = PageReceiver(group, pool)

"""Channel: whole messages over a stream socket, in both directions, which never blocks.

An engine step must not wait for a process that is stopped or dead. Bytes that the socket does not accept stay in a
buffer until the next `flush`, and `receive` returns the messages that have arrived.
"""

from __future__ import annotations

import math
import os
import select
import socket
import sys
from collections.abc import Sequence
from typing import Protocol

from nanokv.disagg.messages import AnyMessage, Message, encode, take_frames

_CHUNK = 1 << 18


class Waitable(Protocol):
    """Anything with a descriptor to poll: a channel, or a peer, which is readable when it is gone."""

    def fileno(self) -> int:
        """The descriptor."""


class Channel:
    """Messages over one connected stream socket (UNIX or TCP); owns and closes it.

    closed   whether the other side has closed it; all its whole messages have been received by then
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
        self.closed = False
        self._sock = sock
        self._in = bytearray()
        self._out = bytearray()
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._sock.fileno()

    @property
    def is_backed_up(self) -> bool:
        """Whether bytes wait until the other side reads."""
        return bool(self._out)

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Queues a message and sends what the socket accepts now. Raises ProtocolError for one that is too long.

        descriptor   is sent with it (SCM_RIGHTS); on a fresh UNIX socket only
        """
        frame = encode(message)
        if descriptor is not None:
            try:
                sent = socket.send_fds(self._sock, [frame], [descriptor])
            except OSError:  # the other side is gone, see `flush`
                return
            frame = frame[sent:]
        self._out += frame
        self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the socket accepts it."""
        while self._out and not self.closed:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                return
            except OSError:  # the other side is gone; `receive` reads its last messages and notices
                self._out.clear()
                return
            del self._out[:sent]

    def receive(self) -> list[AnyMessage]:
        """The whole messages that have arrived, oldest first. Raises ProtocolError for malformed ones."""
        messages: list[AnyMessage] = []
        while not self.closed:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(_CHUNK, socket.CMSG_SPACE(4))
            except BlockingIOError:
                break
            except OSError:  # reset by the other side
                data, ancillary = b"", []
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._descriptors.append(int.from_bytes(value[:4], sys.byteorder))
            self.closed = not data
            self._in += data
            messages += take_frames(self._in)
        return messages

    def take_descriptor(self) -> int | None:
        """The descriptor that came with a message, or None. The caller owns it."""
        return self._descriptors.pop() if self._descriptors else None

    def close(self) -> None:
        """Closes the socket, and descriptors that were not taken. Safe to call twice."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        self.closed = True
        self._sock.close()


def wait(reading: Sequence[Waitable | int], writing: Sequence[Waitable] = (), seconds: float | None = None) -> bool:
    """Waits until one of `reading` is readable or one of `writing` is writable; returns whether one is.

    writing   are among `reading`
    seconds   at most; None: no limit
    """
    poll = select.poll()  # select.select refuses descriptors from 1,024 on
    for one in reading:
        poll.register(one, select.POLLIN | (select.POLLOUT if one in writing else 0))
    return bool(poll.poll(None if seconds is None else math.ceil(1000 * seconds)))


def keep_alive(sock: socket.socket, seconds: int = 10) -> None:
    """Makes the kernel close a TCP connection whose other side is silently cut off, after about `seconds`."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)

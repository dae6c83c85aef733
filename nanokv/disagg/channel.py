"""Channel: whole messages over a stream socket, in either direction, without ever blocking.

An engine step must not wait for a process that is stopped or dead: what the socket does not take at once stays in a
buffer that `flush` tries again, and `receive` returns what has come by now.
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
    """What has a descriptor, as a peer has, which is readable when it is gone."""

    def fileno(self) -> int: ...


class Channel:
    """Messages over one connected stream socket (UNIX or TCP); owns and closes it.

    closed   whether the other side has hung up; everything it had sent whole has been received by then
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
        return self._sock.fileno()

    @property
    def is_backed_up(self) -> bool:
        """Whether messages wait for the other side to read."""
        return bool(self._out)

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Queues a message and sends what can be sent now. `descriptor`: rides along; on a fresh UNIX socket only."""
        frame = encode(message)
        if descriptor is not None:
            try:
                sent = socket.send_fds(self._sock, [frame], [descriptor])
            except OSError:  # gone before it was greeted: as in `flush`
                return
            frame = frame[sent:]
        self._out += frame
        self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the socket takes it."""
        while self._out and not self.closed:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                return
            except OSError:  # gone: `receive` finds out what it said last
                self._out.clear()
                return
            del self._out[:sent]

    def receive(self) -> list[AnyMessage]:
        """Every whole message that has come, oldest first. Raises ProtocolError for what is none."""
        messages: list[AnyMessage] = []
        while not self.closed:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(_CHUNK, socket.CMSG_SPACE(4))
            except BlockingIOError:
                break
            except OSError:  # reset: the other side is gone
                data, ancillary = b"", []
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._descriptors.append(int.from_bytes(value[:4], sys.byteorder))
            self.closed = not data
            self._in += data
            messages += take_frames(self._in)
        return messages

    def take_descriptor(self) -> int | None:
        """The descriptor that came with a message, which the caller owns from now on."""
        return self._descriptors.pop() if self._descriptors else None

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        self.closed = True
        self._sock.close()


def wait(reading: Sequence[Waitable | int], writing: Sequence[Waitable] = (), seconds: float | None = None) -> bool:
    """Whether one of `reading` can be read, or one of `writing`, which are among them, written, within `seconds` (None:
    waits until it is so). By poll: select refuses descriptors from 1,024 on."""
    poll = select.poll()
    for one in reading:
        poll.register(one, select.POLLIN | (select.POLLOUT if one in writing else 0))
    return bool(poll.poll(None if seconds is None else math.ceil(1000 * seconds)))


def keep_alive(sock: socket.socket, seconds: int = 10) -> None:
    """Has the kernel notice a TCP peer that is cut off without a word, within about `seconds`."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)

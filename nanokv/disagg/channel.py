"""Channel: whole messages over a stream socket, in both directions, which never blocks; and pages, which may.

An engine step must not wait for a process that is stopped or dead. Bytes that the socket does not accept stay in a
queue until the next `flush`, and `receive` returns the messages that have arrived. What the other side can make this
process keep is bounded: a frame, what one `receive` reads, and, where it is told, the messages that wait to be read.
"""

from __future__ import annotations

import math
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import msgspec

from nanokv.core.errors import NanokvError
from nanokv.disagg.messages import ANY, MAX_FRAME, AnyMessage, Layers, Message, encode, take_frames

_CHUNK = 1 << 18
_AT_ONCE = 1 << 20
"""Bytes that one `receive` reads, beside the rest of a frame: a peer that never pauses does not keep it for ever."""
TICK_S = 1.0
"""Seconds of one wait for the bytes of a page at most."""
MAX_UNREAD = 32 << 20
"""Bytes of messages that a prefill server keeps for a decode process that does not read them."""


class UnreadError(NanokvError, EOFError):
    """The other side does not read what it is sent."""


class Waitable(Protocol):
    """Anything with a descriptor to poll: a channel, or a peer, which is readable when it is gone."""

    def fileno(self) -> int:
        """The descriptor."""


class Channel:
    """Messages over one connected stream socket (UNIX or TCP); owns and closes it.

    most_unread   bytes of messages that may wait until the other side reads; None: no limit
    longest       bytes of a frame that is received; may be changed
    decoder       of the messages that may come (messages.ANY, messages.FROM_DECODE)
    closed        whether the other side has closed it; all its whole messages have been received by then
    """

    def __init__(
        self,
        sock: socket.socket,
        most_unread: int | None = None,
        longest: int = MAX_FRAME,
        decoder: msgspec.msgpack.Decoder = ANY,
    ) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
        self.closed = False
        self.longest = longest
        self.sent = 0
        """Bytes that the socket has accepted, or that were dropped because the other side is gone."""
        self.queued = 0
        """Bytes that were ever to be sent."""
        self._sock = sock
        self._most_unread = most_unread
        self._decoder = decoder
        self._in = bytearray()
        self._out: deque[tuple[memoryview, bool]] = deque()  # bytes, and whether they are a frame
        self._unread = 0  # bytes of frames in _out
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._sock.fileno()

    @property
    def is_backed_up(self) -> bool:
        """Whether bytes wait until the other side reads."""
        return bool(self._out)

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Queues a message and sends what the socket accepts now.

        descriptor   is sent with it (SCM_RIGHTS); on a fresh UNIX socket only
        Raises       ProtocolError for a message that is too long, UnreadError where more than `most_unread` bytes wait
        """
        frame = encode(message)
        if descriptor is not None:
            try:
                sent = socket.send_fds(self._sock, [frame], [descriptor])
            except OSError:  # the other side is gone, see `flush`
                return
            frame = frame[sent:]
        if frame:
            self._queue(memoryview(frame), True)
        self.flush()
        if self._most_unread is not None and self._unread > self._most_unread:
            raise UnreadError(f"does not read: {self._unread:,} bytes of messages wait")

    def send_bytes(self, data: memoryview) -> None:
        """Queues bytes that are no message and sends what the socket accepts now. `data` may change once `sent` has
        reached the `queued` of now."""
        self._queue(data, False)
        self.flush()

    def drain(self, most: int, seconds: float) -> None:
        """Waits until at most `most` bytes are left to send.

        seconds   without progress at most
        Raises    UnreadError where the other side reads nothing for so long
        """
        self.flush()
        while self.queued - self.sent > most:
            if not wait_writable(self, seconds):
                raise UnreadError(f"has read nothing for {seconds:g} s")
            self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the socket accepts it."""
        while self._out and not self.closed:
            try:
                sent = self._sock.sendmsg([data for data, _ in islice(self._out, 64)])
            except BlockingIOError:
                return
            except OSError:  # the other side is gone; `receive` reads its last messages and notices
                self._out.clear()
                self._unread, self.sent = 0, self.queued
                return
            self._sent(sent)

    def receive(self) -> list[AnyMessage]:
        """Whole messages that have arrived, oldest first, up to the first LAYERS: `read_into` takes what follows it.

        Raises ProtocolError for malformed ones, and for those that the decoder does not know.
        """
        messages = take_frames(self._in, self.longest, self._decoder)
        taken = 0
        while not self.closed and taken < _AT_ONCE and not (messages and isinstance(messages[-1], Layers)):
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
            taken += len(data)
            self._in += data
            messages += take_frames(self._in, self.longest, self._decoder)
        return messages

    def read_into(self, data: memoryview, seconds: float, tick: Callable[[bool], None]) -> None:
        """Fills `data` with the bytes behind the last message.

        seconds   without progress at most
        tick      called at least every TICK_S, with whether bytes have come
        Raises    EOFError where the other side closes the connection or sends nothing for so long
        """
        done = min(len(data), len(self._in))
        data[:done] = self._in[:done]
        del self._in[:done]
        heard = time.monotonic()
        while done < len(data):
            try:
                count = self._sock.recv_into(data[done:])
            except BlockingIOError:
                if not wait([self], seconds=TICK_S):
                    if time.monotonic() - heard > seconds:
                        raise EOFError(f"sent nothing for {seconds:g} s in the middle of a page") from None
                    tick(False)
                continue
            except OSError as error:
                raise EOFError(f"{error.strerror or error}, in the middle of a page") from None
            if not count:
                raise EOFError("closed the connection in the middle of a page")
            done, heard = done + count, time.monotonic()
            tick(True)

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

    def _queue(self, data: memoryview, is_frame: bool) -> None:
        self._out.append((data, is_frame))
        self.queued += len(data)
        self._unread += len(data) if is_frame else 0

    def _sent(self, count: int) -> None:
        """Removes bytes from the front of the queue."""
        self.sent += count
        while count:
            data, is_frame = self._out.popleft()
            done = min(count, len(data))
            self._unread -= done if is_frame else 0
            count -= done
            if done < len(data):
                self._out.appendleft((data[done:], is_frame))


def wait(reading: Sequence[Waitable | int], writing: Sequence[Waitable] = (), seconds: float | None = None) -> bool:
    """Waits until one of `reading` is readable or one of `writing` is writable; returns whether one is.

    writing   are among `reading`
    seconds   at most; None: no limit
    """
    poll = select.poll()  # select.select refuses descriptors from 1,024 on
    for one in reading:
        poll.register(one, select.POLLIN | (select.POLLOUT if one in writing else 0))
    return bool(poll.poll(None if seconds is None else math.ceil(1000 * seconds)))


def wait_writable(one: Waitable, seconds: float) -> bool:
    """Waits until bytes can be sent, or until an error is there to be found; returns whether that is so."""
    poll = select.poll()
    poll.register(one, select.POLLOUT)
    return bool(poll.poll(math.ceil(1000 * seconds)))


def keep_alive(sock: socket.socket, seconds: int = 10) -> None:
    """Makes the kernel close a TCP connection whose other side is silently cut off, after about `seconds`."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)

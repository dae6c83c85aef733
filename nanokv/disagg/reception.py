"""Reception: accepts connections and hears their HELLO while another decode process is served. One thread, no waiting.

    accepted --CHALLENGE--> stranger --HELLO with its proof--> guest, in the order of HELLO --next()--> served
                               |                                 |
          HELLO_S after CHALLENGE, another message,         hangs up, says anything but PING,
          or the oldest of MAX_STRANGERS: ends              is silent for SILENCE_S: ends

What a connection says or does not say ends at most this connection. A stranger costs one descriptor and the bytes of
one short frame.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue

import msgspec

from nanokv.core.errors import NanokvError
from nanokv.disagg.channel import MAX_UNREAD, Channel, wait
from nanokv.disagg.config import join_address
from nanokv.disagg.messages import FROM_DECODE, MAX_FRAME, VERSION, Challenge, Failed, Hello, Ping, ProtocolError
from nanokv.disagg.secret import is_signed, new_nonce, signed
from nanokv.disagg.worker import refusal

logger = logging.getLogger("nanokv")

HELLO_S = 10.0
"""Seconds from CHALLENGE to HELLO in all: a decode process connects when it has HELLO to say."""
HELLO_BYTES = 1 << 14
"""Bytes of a frame before HELLO is heard."""
SILENCE_S = 30.0
"""Seconds of silence after which a decode process is gone, waiting or served; its link sends PING (link.py)."""
MAX_STRANGERS, MAX_GUESTS = 64, 16
TICK_S = 0.2
"""Seconds after which a guest that waits is handed over at the latest."""


@dataclass
class Guest:
    """One connection.

    name       HOST:PORT, in log lines
    challenge  the nonce that it was sent
    heard      when its last message came, at first when it was accepted; time.monotonic()
    hello      None while it is a stranger
    """

    channel: Channel
    name: str
    challenge: bytes
    heard: float
    hello: Hello | None = None


class Reception:
    """The connections that are not served yet.

    server   from transport.bind; when it is closed, the thread ends
    digest   of the model, which decode processes must share
    secret   that they must know, or None
    """

    def __init__(self, server: socket.socket, digest: str, secret: bytes | None = None) -> None:
        server.setblocking(False)
        self._server = server
        self._digest = digest
        self._secret = secret
        self._strangers: deque[Guest] = deque()
        self._guests: deque[Guest] = deque()
        self._wanted = threading.Event()
        self._handed: SimpleQueue[Guest | Exception] = SimpleQueue()
        threading.Thread(target=self._run, name="reception", daemon=True).start()

    def next(self) -> Guest:
        """Waits for the decode process that has waited longest since its HELLO. The caller owns its channel."""
        self._wanted.set()
        guest = self._handed.get()
        if isinstance(guest, Exception):
            raise guest
        return guest

    def answer(self, guest: Guest) -> Hello:
        """The HELLO that says to a guest: it is your turn, and this process knows the secret, too."""
        assert guest.hello is not None
        return signed(guest.hello, "prefill", self._secret, guest.challenge)

    # -- the thread

    def _run(self) -> None:
        try:
            while self._server.fileno() >= 0:
                self._turn()
        except Exception as error:  # the server must not wait for guests that no thread lets in
            if self._server.fileno() >= 0:
                self._handed.put(error)
        for guest in (*self._strangers, *self._guests):
            guest.channel.close()

    def _turn(self) -> None:
        everyone = [*self._strangers, *self._guests]
        wait([self._server, *(guest.channel for guest in everyone)], seconds=TICK_S)
        for guest in everyone:
            try:
                self._listen_to(guest)
            except (NanokvError, EOFError) as error:
                self._end(guest, str(error))
        self._accept()
        if self._guests and self._wanted.is_set():
            self._wanted.clear()
            self._handed.put(self._guests.popleft())

    def _accept(self) -> None:
        for _ in range(MAX_STRANGERS):
            try:
                sock, (host, port, *_) = self._server.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor is left, or the other side has hung up meanwhile
                logger.info("accept: %s", error.strerror or error)
                if self._strangers:
                    self._end(self._strangers[0], "gives way to a new connection")
                else:
                    time.sleep(TICK_S)  # the connection stays readable: without a pause this thread would spin
                return
            if len(self._strangers) == MAX_STRANGERS:
                self._end(self._strangers[0], "gives way to a new connection")
            channel = Channel(sock, MAX_UNREAD, HELLO_BYTES, FROM_DECODE)
            guest = Guest(channel, join_address(host, port), new_nonce(), time.monotonic())
            self._strangers.append(guest)
            channel.send(Challenge(generation=0, nonce=guest.challenge))

    def _listen_to(self, guest: Guest) -> None:
        """Raises ProtocolError, EOFError: the connection ends."""
        guest.channel.flush()
        messages = guest.channel.receive()
        for message in messages:
            if guest.hello is None and isinstance(message, Hello):
                self._welcome(guest, message)
            elif guest.hello is None or not isinstance(message, Ping):
                raise ProtocolError(f"{message.kind} came {'before' if guest.hello is None else 'after'} HELLO")
        now = time.monotonic()
        if guest.channel.closed:
            raise EOFError("closed the connection")
        if guest.hello is None and now - guest.heard > HELLO_S:
            raise EOFError(f"said no HELLO in {HELLO_S:g} s")
        if guest.hello is not None:
            guest.heard = now if messages else guest.heard
            if now - guest.heard > SILENCE_S:
                raise EOFError(f"sent nothing for {SILENCE_S:g} s")

    def _welcome(self, guest: Guest, hello: Hello) -> None:
        """A stranger with a HELLO that fits is a guest. Raises ProtocolError for another one, after FAILED was sent."""
        reason = self._refusal(guest, hello)
        if reason is not None:
            guest.channel.send(Failed(generation=hello.generation, reason=reason))
            raise ProtocolError(reason)
        logger.warning("%s connected", guest.name)
        guest.hello = msgspec.structs.replace(hello, proof=b"")
        guest.channel.longest = MAX_FRAME
        self._strangers.remove(guest)
        self._guests.append(guest)

    def _refusal(self, guest: Guest, hello: Hello) -> str | None:
        if hello.version == VERSION and not is_signed(hello, "decode", self._secret, guest.challenge):
            if self._secret is None:
                return "no secret is known here: start this prefill process with --secret-file, too"
            return "a shared secret is asked for here: secret_file there is missing, or has another one"
        if len(self._guests) == MAX_GUESTS:
            return f"{MAX_GUESTS} decode processes wait here already"
        return refusal(hello, self._digest, ("sent",))

    def _end(self, guest: Guest, why: str) -> None:
        # A connection without a word is how a decode process looks whether this one is there.
        logger.log(logging.WARNING if guest.hello or "closed" not in why else logging.INFO, "%s: %s", guest.name, why)
        for guests in (self._strangers, self._guests):
            with contextlib.suppress(ValueError):
                guests.remove(guest)
        guest.channel.close()

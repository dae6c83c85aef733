"""Supervisor: starts, greets, hears, kills and reaps the prefill processes of one decode process. Knows no requests.

A missed heartbeat, a broken message and a closed socket all end the same way: kill, wait until the process is gone,
report what it held as lost, and start another one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from nanokv.core.errors import ConfigError
from nanokv.disagg.channel import wait
from nanokv.disagg.grants import Grant, Peer, WorkerSlot
from nanokv.disagg.messages import VERSION, AnyMessage, Done, Failed, Hello, Ping, PoolMemory, ProtocolError
from nanokv.disagg.shared_buffer import SharedBuffer

logger = logging.getLogger("nanokv")

MAX_DEATHS = 3
"""Deaths of a worker in a row, after which no new one is started. DONE ends the row; so does the HELLO of another host,
where it is started again by others, and here a life of LIVED_S."""
LIVED_S = 60.0
"""How long a worker of this host is ready before its death says nothing of the next one's."""
WAIT_S = 0.05
"""How long one wait for messages lasts at most, so that the engine can do other things in between."""
START_S = 600.0
"""How long a worker may take to load its model."""
TELL_S = 5.0
"""How long the first workers may take before the user is told which one is waited for."""


class Supervisor:
    """Keeps a WorkerSlot for each prefill process.

    generation    of the pool: messages of another one are dropped
    heartbeat_s   silence after which a worker with open grants is killed
    hear          is called with each DONE, FAILED and ABORT_ACK of an attempt
    lost          is called with the grants of a process that is gone
    counters      "stale_messages" and "worker_deaths" are counted here
    """

    def __init__(
        self,
        generation: int,
        heartbeat_s: float,
        hear: Callable[[WorkerSlot, Any], None],
        lost: Callable[[Iterable[Grant]], None],
        counters: dict[str, int],
    ) -> None:
        self.slots: list[WorkerSlot] = []
        self._generation = generation
        self._heartbeat_s = heartbeat_s
        self._hear_attempt = hear
        self._lost = lost
        self._counters = counters
        self._pool: SharedBuffer | None = None
        self._hello: dict[str, Any] = {}
        self._closed = False

    @property
    def ready(self) -> list[WorkerSlot]:
        """The slots whose workers take prompts."""
        return [slot for slot in self.slots if slot.state == "ready"]

    def add(self, start: Callable[[], Peer], memory: PoolMemory | None = None) -> None:
        """Starts a worker; `start` is called again when it has died.

        memory   what HELLO tells it of the pool; None: it maps this one
        """
        slot = WorkerSlot(start, memory)
        slot.peer = start()
        self.slots.append(slot)

    def open(self, pool: SharedBuffer, num_pages: int, num_states: int, digest: str) -> None:
        """Says HELLO to all and waits until each has answered. Raises ConfigError where one is refused, is given up,
        or takes longer than START_S."""
        self._pool = pool
        self._hello = {
            "digest": digest, "num_pages": num_pages, "num_states": num_states,
            "heartbeat_s": float(self._heartbeat_s),
        }  # fmt: skip
        for slot in self.slots:
            self._greet(slot)
        begin, is_told = time.monotonic(), False
        while missing := [slot for slot in self.slots if slot.peer is not None and slot.state != "ready"]:
            self.select(WAIT_S)
            self.listen()
            refusals = [slot.refusal for slot in self.slots if slot.refusal is not None]
            refusals += [slot.why for slot in self.slots if slot.peer is None]
            waited = time.monotonic() - begin
            if refusals or waited > START_S:
                raise ConfigError(f"disagg: {refusals[0] if refusals else f'no worker is ready after {START_S:g} s'}")
            if waited > TELL_S and not is_told:
                is_told = True
                logger.warning(
                    "waiting for %s: it loads its model, or serves another decode process",
                    ", ".join(slot.peer.name for slot in missing if slot.peer is not None),
                )

    def select(self, seconds: float) -> None:
        """Waits until something can be read, written or reaped."""
        peers = [slot.peer for slot in self.slots if slot.peer is not None]
        channels = [peer.channel for peer in peers if not peer.channel.closed]
        writing = [channel for channel in channels if channel.is_backed_up]
        wait([*peers, *channels], writing, seconds)

    def listen(self) -> None:
        """Reads what every worker has sent; kills unresponsive and broken ones, reaps those that have exited."""
        for slot in self.slots:
            if slot.peer is None:
                self._start_again(slot)
                continue
            is_gone = slot.peer.gone  # asked first: what it said before its end is read below
            try:
                slot.peer.channel.flush()
                self._hear_all(slot)
                if slot.peer.channel.closed and not is_gone:
                    self._kill(slot, "hung up")
                self._check_heartbeat(slot)
            except ProtocolError as error:
                self._kill(slot, f"said what it must not ({error})")
            if is_gone:
                self._reap(slot)

    def close(self) -> None:
        """Kills every worker and waits until it is gone. Nothing in them needs tidying."""
        self._closed = True
        for slot in self.slots:
            if slot.peer is not None:
                slot.state = "terminating"
                slot.peer.kill()
        while any(slot.peer is not None for slot in self.slots):
            self.select(WAIT_S)
            self.listen()

    # -- inside

    def _greet(self, slot: WorkerSlot) -> None:
        assert self._pool is not None and slot.peer is not None
        memory = slot.memory or self._pool.export()
        hello = Hello(generation=self._generation, version=VERSION, memory=memory, **self._hello)
        slot.state, slot.since = "starting", time.monotonic()
        slot.peer.channel.send(hello, self._pool.descriptor if memory.kind == "memfd" else None)

    def _hear_all(self, slot: WorkerSlot) -> None:
        messages = slot.peer.channel.receive()
        if messages:
            slot.heard = time.monotonic()
        for message in messages:
            self._hear(slot, message)

    def _hear(self, slot: WorkerSlot, message: AnyMessage) -> None:
        """One message. Raises ProtocolError for one that no prefill process may send."""
        if slot.state == "terminating" and not isinstance(message, Done):
            return
        if message.generation != self._generation:
            self._counters["stale_messages"] += 1
        elif isinstance(message, Hello):
            self._check_hello(message)
            slot.state, slot.since = "ready", time.monotonic()
            if slot.deaths:
                logger.warning("%s is back", slot.peer.name)
            if slot.is_elsewhere:
                slot.deaths = 0
        elif isinstance(message, Failed) and message.request is None:
            slot.refusal = f"{slot.peer.name}: {message.reason}"
            slot.deaths = MAX_DEATHS  # another one would refuse as well
            self._kill(slot, message.reason)
        elif not isinstance(message, Ping):
            self._hear_attempt(slot, message)

    def _check_hello(self, hello: Hello) -> None:
        ours = {**self._hello, "version": VERSION}
        for name, value in ours.items():
            if getattr(hello, name) != value:
                raise ProtocolError(f"HELLO with {name}={getattr(hello, name)!r}, {value!r} here")

    def _check_heartbeat(self, slot: WorkerSlot) -> None:
        # A host that cannot be reached is tried for ever; a process of this host loads, or something is wrong with it.
        if slot.state == "starting" and not slot.is_elsewhere and time.monotonic() - slot.since > START_S:
            self._kill(slot, f"is not ready after {START_S:g} s")
        if slot.state == "ready" and slot.grants:
            since = max(slot.heard, min(grant.since for grant in slot.grants.values()))
            if time.monotonic() - since > self._heartbeat_s:
                self._kill(slot, f"said nothing for {self._heartbeat_s:g} s")

    def _kill(self, slot: WorkerSlot, why: str) -> None:
        """The process may still write until it is reaped, so its grants stay open."""
        if slot.state != "terminating":
            if slot.state == "ready" and slot.refusal is None and time.monotonic() - slot.since > LIVED_S:
                slot.deaths = 0
            slot.state = "terminating"
            slot.deaths += 1
            slot.why = f"{slot.peer.name} {why}, {slot.deaths} times in a row: its lines above say more"
            self._counters["worker_deaths"] += 1
            logger.warning("%s %s: %s", slot.peer.name, why, self._what_follows(slot))
        slot.peer.kill()

    def _what_follows(self, slot: WorkerSlot) -> str:
        where = "by another worker" if any(one is not slot for one in self.ready) else "here"
        prompts = f"{len(slot.grants)} prompts are computed {where}, " if slot.grants else ""
        if slot.is_elsewhere:
            return prompts + ("tried again" if slot.deaths < MAX_DEATHS else "not tried again")
        return prompts + ("a new one starts" if slot.deaths < MAX_DEATHS else "no new one is started")

    def _reap(self, slot: WorkerSlot) -> None:
        """The process is gone: what it held is lost, and a new one starts unless they keep dying."""
        if slot.state != "terminating":
            self._kill(slot, "is gone" if slot.is_elsewhere else "has died")
        self._lost(list(slot.grants.values()))  # first: Ctrl-C between the two loses nothing
        slot.grants = {}
        peer, slot.peer = slot.peer, None
        slot.why = peer.why or slot.why
        peer.close()
        self._start_again(slot)

    def _start_again(self, slot: WorkerSlot) -> None:
        """Where there is none, and one may come. `listen` asks again, should Ctrl-C come in the middle of it."""
        if not self._closed and slot.deaths < MAX_DEATHS:
            slot.state = "starting"
            slot.peer = slot.start()
            self._greet(slot)

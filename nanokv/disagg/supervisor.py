"""Supervisor: starts, greets, kills and reaps the prefill processes of one decode process. Knows no requests.

    start -> starting --HELLO--> greeted --HELLO--> ready --kill--> terminating --gone--> reap -> start

A missed heartbeat, a broken message and a closed connection have the same consequence: the process is killed, and once
it is gone, its open attempts are lost and another one is started.
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
"""Deaths of a worker in a row, after which it is not started again. DONE ends the row. So does a life of LIVED_S on
this host, and HELLO of a worker on another host, where other programs start it."""
LIVED_S = 60.0
"""Seconds that a worker of this host is ready, after which its death says nothing about the next one."""
WAIT_S = 0.05
"""Seconds of one wait for messages at most: the engine has other work to do."""
START_S = 600.0
"""Seconds that a worker may take to load its model."""
TELL_S = 5.0
"""Seconds after which a warning names the workers that are not ready yet."""


class Supervisor:
    """Keeps a WorkerSlot for each prefill process.

    generation    of the pool: messages about another one are dropped
    heartbeat_s   seconds of silence after which a worker with open attempts is killed
    hear          called with each DONE, FAILED and ABORT_ACK of an attempt
    lost          called with the grants of a process that is gone
    counters      whose "stale_messages" and "worker_deaths" are counted here
    """

    def __init__(
        self,
        generation: int,
        heartbeat_s: float,
        hear: Callable[[WorkerSlot, AnyMessage], None],
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
        """Starts a worker.

        start    called again after its death
        memory   what HELLO says about the pool; None: the worker maps it
        """
        peer = start()
        self.slots.append(WorkerSlot(peer.name, start, memory, peer))

    def open(self, pool: SharedBuffer, num_pages: int, num_states: int, digest: str) -> None:
        """Sends HELLO to every worker and waits for the answers. Raises ConfigError where a worker refuses, is not
        started again, or takes longer than START_S."""
        self._pool = pool
        self._hello = {
            "digest": digest, "num_pages": num_pages, "num_states": num_states,
            "heartbeat_s": float(self._heartbeat_s),
        }  # fmt: skip
        begin, is_told = time.monotonic(), False
        while True:
            self.listen()
            refusals = [slot.refusal for slot in self.slots if slot.refusal is not None]
            refusals += [slot.why for slot in self.slots if slot.peer is None]
            waited = time.monotonic() - begin
            if refusals or waited > START_S:
                raise ConfigError(f"disagg: {refusals[0] if refusals else f'no worker is ready after {START_S:g} s'}")
            missing = [slot.name for slot in self.slots if slot.state != "ready"]
            if not missing:
                return
            if waited > TELL_S and not is_told:
                is_told = True
                names = ", ".join(missing)
                logger.warning("waiting for %s: it loads its model, or serves another decode process", names)
            self.select(WAIT_S)

    def select(self, seconds: float) -> None:
        """Waits until a message can be read or sent, or a process is gone; `seconds` at most."""
        peers = [slot.peer for slot in self.slots if slot.peer is not None]
        channels = [peer.channel for peer in peers if not peer.channel.closed]
        writing = [channel for channel in channels if channel.is_backed_up]
        wait([*peers, *channels], writing, seconds)

    def listen(self) -> None:
        """Reads what the workers have sent; kills unresponsive and broken ones, reaps those that are gone."""
        for slot in self.slots:
            if slot.peer is None:
                self._start(slot)
            else:
                self._listen_to(slot, slot.peer)

    def close(self) -> None:
        """Kills every worker and waits until all are gone. A worker holds nothing that must be saved."""
        self._closed = True
        for slot in self.slots:
            if slot.peer is not None:
                slot.state = "terminating"
                slot.peer.kill()
        while any(slot.peer is not None for slot in self.slots):
            self.select(WAIT_S)
            self.listen()

    # -- inside

    def _listen_to(self, slot: WorkerSlot, peer: Peer) -> None:
        is_gone = peer.gone  # asked first: its last messages are read below
        try:
            if slot.state == "starting":
                self._greet(slot, peer)
            peer.channel.flush()
            messages = peer.channel.receive()
            slot.heard = time.monotonic() if messages else slot.heard
            for message in messages:
                self._hear(slot, message)
            if peer.channel.closed and not is_gone:
                self._kill(slot, "closed its connection")
            self._check_heartbeat(slot)
        except ProtocolError as error:
            self._kill(slot, f"broke the protocol ({error})")
        if is_gone:
            self._reap(slot, peer)

    def _greet(self, slot: WorkerSlot, peer: Peer) -> None:
        """Sends HELLO. After Ctrl-C in the middle it may be sent twice, which ends the worker, but never not at all."""
        assert self._pool is not None
        memory = slot.memory or self._pool.export()
        hello = Hello(generation=self._generation, version=VERSION, memory=memory, **self._hello)
        peer.channel.send(hello, self._pool.descriptor if memory.kind == "memfd" else None)
        slot.state, slot.since = "greeted", time.monotonic()

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
                logger.warning("%s is back", slot.name)
            if slot.is_elsewhere:
                slot.deaths = 0
        elif isinstance(message, Failed) and message.request is None:
            slot.refusal = f"{slot.name}: {message.reason}"
            slot.deaths = MAX_DEATHS  # the next one would refuse as well
            self._kill(slot, message.reason)
        elif not isinstance(message, Ping):
            self._hear_attempt(slot, message)

    def _check_hello(self, hello: Hello) -> None:
        for name, value in {**self._hello, "version": VERSION}.items():
            if getattr(hello, name) != value:
                raise ProtocolError(f"HELLO with {name}={getattr(hello, name)!r}, {value!r} here")

    def _check_heartbeat(self, slot: WorkerSlot) -> None:
        # A host that cannot be reached is tried for ever. A process of this host loads its model, or has a fault.
        if slot.state == "greeted" and not slot.is_elsewhere and time.monotonic() - slot.since > START_S:
            self._kill(slot, f"is not ready after {START_S:g} s")
        if slot.state == "ready" and slot.grants:
            since = max(slot.heard, min(grant.since for grant in slot.grants.values()))
            if time.monotonic() - since > self._heartbeat_s:
                self._kill(slot, f"sent nothing for {self._heartbeat_s:g} s")

    def _kill(self, slot: WorkerSlot, why: str) -> None:
        """The process may write until it is reaped, so its attempts stay open."""
        if slot.state != "terminating":
            if slot.state == "ready" and slot.refusal is None and time.monotonic() - slot.since > LIVED_S:
                slot.deaths = 0
            slot.state = "terminating"
            slot.deaths += 1
            slot.why = f"{slot.name} {why}, {slot.deaths} times in a row: see its log lines above"
            self._counters["worker_deaths"] += 1
            logger.warning("%s %s: %s", slot.name, why, self._consequence(slot))
        if slot.peer is not None:
            slot.peer.kill()

    def _consequence(self, slot: WorkerSlot) -> str:
        where = "by another worker" if any(one is not slot for one in self.ready) else "here"
        prompts = f"{len(slot.grants)} prompts are computed {where}, " if slot.grants else ""
        if slot.is_elsewhere:
            return prompts + ("tried again" if slot.deaths < MAX_DEATHS else "not tried again")
        return prompts + ("a new one starts" if slot.deaths < MAX_DEATHS else "no new one is started")

    def _reap(self, slot: WorkerSlot, peer: Peer) -> None:
        """The process is gone: its open attempts are lost, and a new one starts unless too many have died."""
        if slot.state != "terminating":
            self._kill(slot, "is gone" if slot.is_elsewhere else "has died")
        self._lost(list(slot.grants.values()))  # before they are dropped: Ctrl-C in between loses none
        slot.grants, slot.peer = {}, None
        slot.why = peer.why or slot.why
        peer.close()
        self._start(slot)

    def _start(self, slot: WorkerSlot) -> None:
        """Starts a worker, unless too many have died. `listen` starts it where Ctrl-C has prevented this."""
        if not self._closed and slot.deaths < MAX_DEATHS:
            slot.state = "starting"
            slot.peer = slot.start()

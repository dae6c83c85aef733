"""Dispatcher: gives prompts to prefill processes, and takes back what they have computed or what they left behind.

A page that is given away is quarantined until one of three things is known of the attempt it was given for:

    DONE, FAILED    the worker says that it writes no more
    ABORT_ACK       the same, asked for
    its death       pidfd (one host) or the end of the thread that receives (between hosts)

A missed heartbeat, a broken message and a closed socket all lead to the third: kill, wait until it is gone, give back.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable

import torch

from nanokv.core.errors import ConfigError
from nanokv.core.request import Request
from nanokv.disagg.channel import wait
from nanokv.disagg.config import DisaggConfig
from nanokv.disagg.grants import Grant, Peer, Place, prefill_message
from nanokv.disagg.memory import SharedPool
from nanokv.disagg.messages import (
    VERSION,
    Abort,
    AbortAck,
    AnyMessage,
    Done,
    Failed,
    Hello,
    Memory,
    Ping,
    ProtocolError,
)
from nanokv.engine.remote import Prefilled

logger = logging.getLogger("nanokv")

MAX_ATTEMPTS = 2
"""Attempts of other processes at a request in a row, without a DONE between; then it is computed here."""
MAX_DEATHS = 3
"""Deaths of a worker in a row, after which no new one is started. DONE ends the row; so does the HELLO of another host,
where somebody else starts it again, and here a life of LIVED_S."""
LIVED_S = 60.0
"""How long a worker of this host is ready before its death says nothing of the next one's."""
WAIT_S = 0.05
"""How long `collect` waits at most, so that whoever steps the engine can do other things in between."""
START_S = 600.0
"""How long a worker may take to load its model."""
TELL_S = 5.0
"""How long the first workers may take before the user is told who is waited for."""


class Dispatcher:
    """The decode process's side of disaggregation (engine.remote.Prefiller).

    config   DisaggConfig
    """

    def __init__(self, config: DisaggConfig) -> None:
        self.generation = secrets.randbits(62)
        self.last_finished = 0.0  # when the last kernel of the latest DONE had ended, time.monotonic() of its host
        self._config = config
        self._places: list[Place] = []
        self._results: deque[Prefilled] = deque()
        self._pool: SharedPool | None = None
        self._attempts = 0
        self._closed = False
        self._pid = os.getpid()
        self._hello: dict = {}
        self._vocab_size = 0
        self._counters = dict.fromkeys(
            ("remote_prefills", "remote_tokens", "remote_lost", "stale_messages", "worker_deaths"), 0
        )

    # -- starting

    def add(self, start: Callable[[], Peer], memory: Memory | None = None) -> None:
        """A worker, started right away; `start` is called again when it has died.

        memory   what HELLO tells it of the pool; None: it maps this one
        """
        place = Place(start, memory)
        place.peer = start()
        self._places.append(place)

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """The pool, as memory that other processes can map: uint8 [num_bytes]."""
        self._pool = SharedPool(num_bytes, device)
        return self._pool.tensor

    def open(self, vocab_size: int, num_pages: int, num_states: int, digest: str) -> None:
        """Says HELLO to all and waits until each has answered. Raises ConfigError where one is refused, is given up,
        or takes longer than START_S.

        vocab_size   of the model: no token of a DONE may lie beyond it
        """
        assert self._pool is not None
        self._vocab_size = vocab_size
        self._hello = {
            "digest": digest, "num_pages": num_pages, "num_states": num_states,
            "heartbeat_s": float(self._config.heartbeat_s),
        }  # fmt: skip
        for place in self._places:
            self._greet(place)
        begin, is_told = time.monotonic(), False
        while missing := [place for place in self._places if place.peer is not None and place.state != "ready"]:
            self._select(WAIT_S)
            self._listen()
            refusals = [place.refusal for place in self._places if place.refusal is not None]
            refusals += [place.why for place in self._places if place.peer is None]
            waited = time.monotonic() - begin
            if refusals or waited > START_S:
                raise ConfigError(f"disagg: {refusals[0] if refusals else f'no worker is ready after {START_S:g} s'}")
            if waited > TELL_S and not is_told:
                is_told = True
                logger.warning(
                    "waiting for %s: it loads its model, or serves another decode process",
                    ", ".join(place.peer.name for place in missing if place.peer is not None),
                )

    def _greet(self, place: Place) -> None:
        memory = place.memory or self._pool.export()
        hello = Hello(generation=self.generation, version=VERSION, memory=memory, **self._hello)
        place.state, place.since = "starting", time.monotonic()
        place.peer.channel.send(hello, self._pool.descriptor if memory.kind == "memfd" else None)

    # -- what the engine asks for

    def wants(self, request: Request, num_uncached: int) -> bool:
        """Whether it is long enough to be worth it, has not failed twice, and somebody is there."""
        return (
            num_uncached >= self._config.min_tokens
            and request.num_handed_over < MAX_ATTEMPTS
            and not request.wants_all_logits
            and any(place.state == "ready" for place in self._places)
        )

    def start(self, request: Request, checkpoints: list[tuple[int, int]]) -> None:
        """To the worker with the fewest tokens before it."""
        if self._pool.tensor.is_cuda:
            torch.cuda.synchronize(self._pool.tensor.device)  # every step that reads or writes the pages has finished
        ready = [place for place in self._places if place.state == "ready"]
        place = min(ready, key=lambda one: sum(grant.tokens for grant in one.grants.values()))
        self._attempts += 1
        request.num_handed_over += 1
        grant = Grant(request, self._attempts, request.num_to_compute, time.monotonic())
        place.grants[grant.attempt] = grant
        place.peer.channel.send(prefill_message(request, grant.attempt, self.generation, checkpoints))
        self._counters["remote_prefills"] += 1
        self._counters["remote_tokens"] += grant.tokens

    def abort(self, request: Request) -> bool:
        """Whether the request is out, or what came of it is not collected yet; its worker is asked to stop."""
        for place in self._places:
            for grant in place.grants.values():
                if grant.request is request:
                    if not grant.aborted and place.state == "ready":
                        place.peer.channel.send(self._about(Abort, grant))
                    grant.aborted = True
                    return True
        return any(one.request is request for one in self._results)

    def collect(self, wait: bool) -> deque[Prefilled]:
        """What has come back and was not taken out. `wait`: up to WAIT_S, if anything is out and nothing is there."""
        self._listen()
        if wait and not self._results and any(place.grants for place in self._places):
            self._select(WAIT_S)
            self._listen()
        return self._results

    def close(self) -> None:
        """Kills every worker and waits until it is gone. Nothing in them needs tidying. Does nothing in a forked child:
        they work for the parent."""
        if os.getpid() != self._pid:
            return
        self._closed = True
        for place in self._places:
            if place.peer is not None:
                place.state = "dying"
                place.peer.kill()
        while any(place.peer is not None for place in self._places):
            self._select(WAIT_S)
            self._listen()
        if self._pool is not None:
            self._pool.close()

    def stats(self) -> dict[str, int | float]:
        """Documented at LLM.stats."""
        return {
            "prefill_workers_ready": sum(place.state == "ready" for place in self._places),
            "requests_remote": sum(len(place.grants) for place in self._places),
            **self._counters,
        }

    # -- listening

    def _select(self, seconds: float) -> None:
        """Waits until something can be read, written or buried."""
        peers = [place.peer for place in self._places if place.peer is not None]
        channels = [peer.channel for peer in peers if not peer.channel.closed]
        writing = [channel for channel in channels if channel.is_backed_up]
        wait([*peers, *channels], writing, seconds)

    def _listen(self) -> None:
        """Hears every worker out, kills those that are silent or broken, buries those that are gone."""
        self._close_grants()
        for place in self._places:
            if place.peer is None:
                self._start_again(place)
                continue
            is_gone = place.peer.gone  # asked first: what it said before its end is read below
            try:
                place.peer.channel.flush()
                self._hear_all(place)
                if place.peer.channel.closed and not is_gone:
                    self._kill(place, "hung up")
                self._check_heartbeat(place)
            except ProtocolError as error:
                self._kill(place, f"said what it must not ({error})")
            if is_gone:
                self._bury(place)

    def _close_grants(self) -> None:
        """Those whose results are there: Ctrl-C may have come between the two."""
        back = [one.request for one in self._results]
        for place in self._places if back else ():
            place.grants = {
                attempt: grant
                for attempt, grant in place.grants.items()
                if not any(grant.request is request for request in back)
            }

    def _hear_all(self, place: Place) -> None:
        messages = place.peer.channel.receive()
        if messages:
            place.heard = time.monotonic()
        for message in messages:
            self._hear(place, message)

    def _hear(self, place: Place, message: AnyMessage) -> None:
        """One message. Raises ProtocolError for one that no prefill process may send."""
        if place.state == "dying" and not isinstance(message, Done):
            return
        if message.generation != self.generation:
            self._counters["stale_messages"] += 1
        elif isinstance(message, Hello):
            self._check_hello(message)
            place.state, place.since = "ready", time.monotonic()
            if place.deaths:
                logger.warning("%s is back", place.peer.name)
            if place.is_elsewhere:
                place.deaths = 0
        elif isinstance(message, Failed) and message.request is None:
            place.refusal = f"{place.peer.name}: {message.reason}"
            place.deaths = MAX_DEATHS  # another one would refuse as well
            self._kill(place, message.reason)
        elif isinstance(message, (Done, Failed, AbortAck)):
            self._settle(place, message)
        elif not isinstance(message, Ping):
            raise ProtocolError(f"{type(message).__name__} is not for a decode process")

    def _settle(self, place: Place, message: Done | Failed | AbortAck) -> None:
        grant = place.grants.get(message.attempt)
        if grant is None or grant.request.request_id != message.request:
            self._counters["stale_messages"] += 1
            return
        request = grant.request
        if isinstance(message, Done):
            num_samples = 1 + request.num_forks
            if not len(message.tokens) == len(message.logprobs) == num_samples:
                raise ProtocolError(f"DONE with {len(message.tokens)} tokens for {num_samples} samples")
            if not all(token is None or 0 <= token < self._vocab_size for token in message.tokens):
                raise ProtocolError(f"DONE with tokens {message.tokens} of a vocabulary of {self._vocab_size}")
            place.deaths = request.num_handed_over = 0
            self.last_finished = message.finished
        elif isinstance(message, Failed):
            logger.warning("%s: %s failed there: %s", place.peer.name, message.request, message.reason)
            self._counters["remote_lost"] += 1
        elif not grant.aborted:
            raise ProtocolError("ABORT_ACK of what was not aborted")
        is_good = isinstance(message, Done) and not grant.aborted
        back = Prefilled(request, message.tokens, message.logprobs) if is_good else Prefilled(request)
        self._results.append(back)  # first: Ctrl-C between the two loses nothing
        place.grants.pop(message.attempt, None)

    def _check_hello(self, hello: Hello) -> None:
        ours = {**self._hello, "version": VERSION}
        for name, value in ours.items():
            if getattr(hello, name) != value:
                raise ProtocolError(f"HELLO with {name}={getattr(hello, name)!r}, {value!r} here")

    def _check_heartbeat(self, place: Place) -> None:
        # A host that cannot be reached is tried for ever; a process of this host loads, or something is wrong with it.
        if place.state == "starting" and not place.is_elsewhere and time.monotonic() - place.since > START_S:
            self._kill(place, f"is not ready after {START_S:g} s")
        if place.state == "ready" and place.grants:
            since = max(place.heard, min(grant.since for grant in place.grants.values()))
            if time.monotonic() - since > self._config.heartbeat_s:
                self._kill(place, f"said nothing for {self._config.heartbeat_s:g} s")

    # -- ends

    def _kill(self, place: Place, why: str) -> None:
        """It may still write until it is buried: its grants stay out."""
        if place.state != "dying":
            if place.state == "ready" and place.refusal is None and time.monotonic() - place.since > LIVED_S:
                place.deaths = 0
            place.state = "dying"
            place.deaths += 1
            place.why = f"{place.peer.name} {why}, {place.deaths} times in a row: its lines above say more"
            self._counters["worker_deaths"] += 1
            logger.warning("%s %s: %s", place.peer.name, why, self._what_follows(place))
        place.peer.kill()

    def _what_follows(self, place: Place) -> str:
        others = any(one.state == "ready" for one in self._places if one is not place)
        where = "by another worker" if others else "here"
        prompts = f"{len(place.grants)} prompts are computed {where}, " if place.grants else ""
        if place.is_elsewhere:
            return prompts + ("tried again" if place.deaths < MAX_DEATHS else "not tried again")
        return prompts + ("a new one starts" if place.deaths < MAX_DEATHS else "no new one is started")

    def _bury(self, place: Place) -> None:
        """It is gone: what it held comes back, and a new one starts unless they keep dying."""
        if place.state != "dying":
            self._kill(place, "is gone" if place.is_elsewhere else "has died")
        lost = list(place.grants.values())
        self._counters["remote_lost"] += sum(not grant.aborted for grant in lost)
        self._results += [Prefilled(grant.request) for grant in lost]  # first, as in `_settle`
        place.grants = {}
        peer, place.peer = place.peer, None
        place.why = peer.why or place.why
        peer.close()
        self._start_again(place)

    def _start_again(self, place: Place) -> None:
        """Where there is none, and one may come. `_listen` asks again, should Ctrl-C come in the middle of it."""
        if not self._closed and place.deaths < MAX_DEATHS:
            place.state = "starting"
            place.peer = place.start()
            self._greet(place)

    def _about(self, kind: type, grant: Grant) -> Abort:
        return kind(generation=self.generation, request=grant.request.request_id, attempt=grant.attempt)

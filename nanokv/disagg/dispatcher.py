"""Dispatcher: the connector whose transfers are prompts that prefill processes compute.

A granted page is quarantined until the attempt that it was granted for has one of three ends:

    DONE, FAILED    the worker writes no more
    ABORT_ACK       the same, as the answer to ABORT
    death           reported by a pidfd (one host) or by the end of the receiving thread (between hosts): supervisor.py
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Iterable

import torch

from nanokv.cache.contract import Moves
from nanokv.cache.store import CacheStore
from nanokv.core.request import Request
from nanokv.disagg.config import DisaggConfig
from nanokv.disagg.grants import Grant, WorkerSlot, prefill_message
from nanokv.disagg.messages import Abort, AbortAck, AnyMessage, Done, Failed, ProtocolError, printable
from nanokv.disagg.shared_buffer import SharedBuffer
from nanokv.disagg.supervisor import WAIT_S, Supervisor
from nanokv.engine.connector import Delivery

logger = logging.getLogger("nanokv")


class Dispatcher:
    """The decode process's side of disaggregation (engine.connector.Connector).

    config          DisaggConfig
    workers         the Supervisor of the prefill processes
    generation      of the pool: a random number
    last_finished   when the last kernel of the latest DONE had ended, time.monotonic() of its host
    """

    def __init__(self, config: DisaggConfig) -> None:
        self.generation = secrets.randbits(62)
        self.last_finished = 0.0
        self._config = config
        self._results: deque[Delivery] = deque()
        self._pool: SharedBuffer | None = None
        self._attempts = 0
        self._pid = os.getpid()
        self._vocab_size = 0
        self._counters = dict.fromkeys(
            ("remote_prefills", "remote_tokens", "remote_lost", "stale_messages", "worker_deaths"), 0
        )
        self.workers = Supervisor(self.generation, config.heartbeat_s, self._close_attempt, self._lose, self._counters)

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """The memory of the pool, which other processes can map: uint8 [num_bytes], zeroed."""
        self._pool = SharedBuffer(num_bytes, device)
        return self._pool.tensor

    def open(self, vocab_size: int, num_pages: int, num_states: int, digest: str) -> None:
        """Sends HELLO to every worker and waits for the answers.

        vocab_size   of the model: no token of a DONE may lie beyond it
        digest       of the model and the layout, which both processes must share
        Raises       ConfigError where a worker refuses, is not started again, or takes too long
        """
        assert self._pool is not None
        self._vocab_size = vocab_size
        self.workers.open(self._pool, num_pages, num_states, digest)

    # -- the connector

    def offers(self, request: Request, found: int) -> int:
        """All known tokens, where enough are uncached to be worth a transfer and a worker is ready.

        A worker samples the first token, and a logits processor is a function of this process.
        """
        worth_it = request.num_tokens - found >= self._config.min_tokens and not request.params.logits_processor
        return request.num_tokens if worth_it and self.workers.ready else found

    def start(self, request: Request, upto: int, checkpoints: list[tuple[int, int]]) -> None:
        """Sends the prompt to the worker with the fewest tokens before it."""
        assert self._pool is not None
        if self._pool.tensor.is_cuda:
            torch.cuda.synchronize(self._pool.tensor.device)  # every step that reads or writes the pages has finished
        slot = min(self.workers.ready, key=lambda one: sum(grant.tokens for grant in one.grants.values()))
        assert slot.peer is not None
        self._attempts += 1
        grant = Grant(request, self._attempts, request.num_to_compute, time.monotonic())
        slot.grants[grant.attempt] = grant  # before the message: Ctrl-C in between loses no page
        slot.peer.channel.send(prefill_message(request, grant.attempt, self.generation, checkpoints))
        self._counters["remote_prefills"] += 1
        self._counters["remote_tokens"] += grant.tokens

    def save(self, moves: Moves, store: CacheStore) -> None:
        """Takes nothing: prefill processes keep no evicted pages."""

    def abort(self, request: Request) -> bool:
        """Whether the request is in transfer or not collected yet; its worker is asked to stop."""
        for slot in self.workers.slots:
            for grant in slot.grants.values():
                if grant.request is request:
                    if not grant.aborted:
                        grant.aborted = True  # before the message: ABORT_ACK of another attempt breaks the protocol
                        if slot.state == "ready" and slot.peer is not None:
                            slot.peer.channel.send(self._abort_message(grant))
                    return True
        return any(one.request is request for one in self._results)

    def collect(self, wait: bool) -> deque[Delivery]:
        """Attempts that have ended. `wait`: up to WAIT_S, if some are open and none has ended."""
        self._listen()
        if wait and not self._results and any(slot.grants for slot in self.workers.slots):
            self.workers.select(WAIT_S)
            self._listen()
        return self._results

    def close(self) -> None:
        """Ends every worker and frees the pool. Does nothing in a forked child: the workers work for the parent."""
        if os.getpid() != self._pid:
            return
        self.workers.close()
        if self._pool is not None:
            self._pool.close()

    def stats(self) -> dict[str, int | float]:
        """Its numbers, by names of core/stats.py."""
        return {
            "prefill_workers_ready": len(self.workers.ready),
            "requests_remote": sum(len(slot.grants) for slot in self.workers.slots),
            **self._counters,
        }

    # -- attempts

    def _listen(self) -> None:
        self._close_grants()
        self.workers.listen()

    def _close_grants(self) -> None:
        """Drops grants of attempts that have results: Ctrl-C may have come between the two."""
        ended = {one.request for one in self._results}
        for slot in self.workers.slots if ended else ():
            slot.grants = {number: grant for number, grant in slot.grants.items() if grant.request not in ended}

    def _close_attempt(self, slot: WorkerSlot, message: AnyMessage) -> None:
        """Raises ProtocolError for a message that no prefill process may send."""
        if not isinstance(message, (Done, Failed, AbortAck)):
            raise ProtocolError(f"{message.kind} is not for a decode process")
        grant = slot.grants.get(message.attempt)
        if grant is None or grant.request.request_id != message.request:
            self._counters["stale_messages"] += 1
            return
        request = grant.request
        delivery = Delivery(request, 0)
        if isinstance(message, Done):
            num_samples = 1 + request.num_forks
            if not len(message.tokens) == len(message.logprobs) == num_samples:
                raise ProtocolError(f"DONE with {len(message.tokens)} tokens for {num_samples} samples")
            if not all(token is None or 0 <= token < self._vocab_size for token in message.tokens):
                raise ProtocolError(f"DONE with tokens {message.tokens} of a vocabulary of {self._vocab_size}")
            slot.deaths = 0
            self.last_finished = message.finished
            if not grant.aborted:
                delivery = Delivery(request, request.num_tokens, message.tokens, message.logprobs)
        elif isinstance(message, Failed):
            logger.warning("%s: request %s failed: %s", slot.name, message.request, printable(message.reason))
            self._counters["remote_lost"] += 1
        elif not grant.aborted:
            raise ProtocolError("ABORT_ACK of an attempt that was not aborted")
        self._results.append(delivery)  # before the grant is dropped: Ctrl-C in between loses no page
        slot.grants.pop(message.attempt, None)

    def _lose(self, grants: Iterable[Grant]) -> None:
        """Open attempts of a process that is gone."""
        for grant in grants:
            self._counters["remote_lost"] += not grant.aborted
            self._results.append(Delivery(grant.request, 0))

    def _abort_message(self, grant: Grant) -> Abort:
        return Abort(generation=self.generation, request=str(grant.request.request_id), attempt=grant.attempt)

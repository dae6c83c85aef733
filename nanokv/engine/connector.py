"""The contract between an engine and a source of computed pages, such as another process or a tier of memory.

    waiting --admit: match, reserve--> running, in_transfer --collect: pages--> running
       ^                                      |
       +-------- preempt: nothing came -------+

While a request is in transfer, its pages are quarantined: the request holds them, aborted or not, until `collect`
returns it, because until then the connector may write into them. Knows no process and no tier.
Source: the KV connectors of vLLM (Kwon et al. 2023), whose requests wait as WAITING_FOR_REMOTE_KVS.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from nanokv.cache.contract import Moves
from nanokv.cache.store import CacheStore
from nanokv.core.request import Request


@dataclass(frozen=True)
class Delivery:
    """The end of a transfer: the connector writes no more for this request.

    num_tokens   the first num_tokens tokens of the request are in its pages and states; num_computed or fewer: nothing
                 came
    tokens       the next token of each sample, where the connector has computed all known tokens and sampled; None for
                 logits that are not finite
    logprobs     {token id: log-probability} or None for each of `tokens`, as the sampler returns them
    """

    request: Request
    num_tokens: int
    tokens: tuple[int | None, ...] = ()
    logprobs: tuple[dict[int, float] | None, ...] = ()


class PageSource(Protocol):
    """The part of a connector that the scheduler uses."""

    def offers(self, request: Request, found: int) -> int:
        """How many tokens, from the first on, the connector would bring; `found`, the tokens in the cache: none.

        All known tokens only if the connector samples the next one. The connector decides whether a transfer is worth
        its cost.
        """

    def abort(self, request: Request) -> bool:
        """Cancels a transfer. True: its pages may still be written, and `collect` returns the request later. False also
        for a request that is not in transfer here."""


class Connector(PageSource, Protocol):
    """Brings computed pages into this engine's pool."""

    def start(self, request: Request, upto: int, checkpoints: list[tuple[int, int]]) -> None:
        """Starts to bring the tokens num_computed .. upto - 1, or fewer. Until `collect` returns the request, no step
        reads or writes their pages and states.

        checkpoints   (position, state): the connector leaves the recurrent state of each position in this state, and
                      that of the last token in the request's own
        """

    def save(self, moves: Moves, store: CacheStore) -> None:
        """Copies the pages that it wants of `moves.saves`: they are about to be overwritten.

        Their keys tell models apart where the engine has Observers, which bring the model's identity.
        """

    def collect(self, wait: bool) -> deque[Delivery]:
        """The transfers that have ended, oldest first. The caller removes each that it has processed; the others are
        returned again by the next call.

        wait   if no transfer has ended and one is open, wait a moment for it
        """

    def close(self) -> None:
        """Stops writing; the next `collect` returns every request that was in transfer."""

    def stats(self) -> dict[str, int | float]:
        """Its numbers, by the names of core/stats.py."""

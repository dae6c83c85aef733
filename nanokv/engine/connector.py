"""What an engine needs of a source of computed pages: another process, a tier of memory. Knows no process and no tier.

    waiting --admit: match, reserve--> running, in_transfer --collect: pages--> running
       ^                                  |  |
       |                                  |  +-- collect: nothing came: preempt --+
       +----------------------------------+---------------------------------------+

While a request is in transfer, its pages are quarantined: they stay its own, aborted or not, until `collect` returns
it, because until then the connector may write into them.
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
    """The end of a transfer: the connector writes nothing more for this request.

    num_tokens   the first tokens of the request that are in its pages and states now; no more than its num_computed:
                 nothing came
    tokens       the next token of each of its samples, where the connector has sampled: all known tokens are there then
                 (None: logits are not finite)
    logprobs     of each of these tokens, as the sampler returns them
    """

    request: Request
    num_tokens: int
    tokens: tuple[int | None, ...] = ()
    logprobs: tuple[dict[int, float] | None, ...] = ()


class PageSource(Protocol):
    """What a scheduler asks of connectors."""

    def offers(self, request: Request, found: int) -> int:
        """The number of tokens, from the first on, that can be brought; `found`, which are cached already: none.

        All known tokens only if the next one is sampled as well. Whether a transfer is worth its cost is decided here.
        """
        ...

    def abort(self, request: Request) -> bool:
        """Cancels a transfer. True: its pages may still be written, and `collect` returns the request later."""
        ...


class Connector(PageSource, Protocol):
    """Brings computed pages into this engine's pool."""

    def start(self, request: Request, upto: int, checkpoints: list[tuple[int, int]]) -> None:
        """Starts to bring the tokens num_computed .. upto - 1. No step reads or writes these pages and states now.

        checkpoints   (position, state): where recurrent states are to be left on the way; the request's own state is
                      to be that of `upto` in the end
        """
        ...

    def save(self, moves: Moves, store: CacheStore) -> None:
        """Takes what it wants of `moves.saves`: the pages that are about to be overwritten."""
        ...

    def collect(self, wait: bool) -> deque[Delivery]:
        """Transfers that have ended, oldest first. The caller takes out what it has dealt with; the rest is returned
        again next time.

        wait   if nothing has ended but something is on its way, wait for a moment
        """
        ...

    def close(self) -> None:
        """Stops writing; the next `collect` returns every request that was in transfer."""
        ...

    def stats(self) -> dict[str, int | float]:
        """Its numbers, by names of core/stats.py."""
        ...

"""GrantedCache: the verbs of a cache over pages that another process has granted. Nothing is found, taken or evicted.

match     the pages and the state that came with PREFILL; computed up to its cached_length
reserve   always room: all pages of the prompt are there already
commit    a checkpoint that is due is listed as a copy of the state
release   forgets the request; the pages stay with the process that granted them
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from nanokv.cache.contract import Moves
from nanokv.core.errors import CacheError
from nanokv.core.request import Request


@dataclass(frozen=True)
class GrantedPages:
    """The pages, state and checkpoints of one PREFILL: see messages.Prefill."""

    pages: array[int]
    cached_length: int
    state: int | None
    checkpoints: dict[int, int]


class GrantedCache:
    """The contract of a cache (cache.contract.Cache) over the pages that `give` was told."""

    num_available = sys.maxsize  # every page was reserved by the process that granted it

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._given: dict[Request, GrantedPages] = {}
        self._copies: list[tuple[int, int]] = []

    def give(self, request: Request, given: GrantedPages) -> None:
        """Takes note of the pages of a request, before it is scheduled."""
        self._given[request] = given

    def given(self, request: Request) -> GrantedPages:
        """What `give` was told."""
        return self._given[request]

    def match(self, request: Request) -> int:
        """Hands the given pages and state to the request, computed and cached up to the given length; returns that."""
        given = self._given[request]
        request.held.pages, request.held.state_id = given.pages, given.state
        request.num_computed = request.held.num_cached = given.cached_length
        return request.num_computed

    def reserve(self, request: Request, num_tokens: int) -> bool:
        if self.pages_for(request.num_computed + num_tokens) > len(request.held.pages):
            raise CacheError(f"{request} was given too few pages")
        return True

    def commit(self, request: Request, in_flight: int = 0) -> None:
        """Lists a copy (from, to) of the request's state where a checkpoint is due at the tokens that have arrived:
        those computed, without the `in_flight` last ones.
        """
        checkpoint = self._given[request].checkpoints.get(request.num_computed - in_flight)
        if checkpoint is not None:
            self._copies.append((request.held.state_id, checkpoint))

    def release(self, request: Request) -> None:
        self._given.pop(request, None)
        # A checkpoint that was listed and not copied yet: its slot is about to have another owner.
        self._copies = [copy for copy in self._copies if copy[0] != request.held.state_id]

    def prefix_length(self, request: Request) -> int:
        return self._given[request].cached_length

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def limit_chunk(self, request: Request, num_tokens: int) -> int:
        """Up to the next checkpoint: a state can be copied only between steps."""
        start = request.num_computed
        return min([num_tokens, *(p - start for p in self._given[request].checkpoints if p > start)])

    def request_checkpoint(self, request: Request, position: int) -> bool:
        return False

    def drain_moves(self) -> Moves:
        moves, self._copies = Moves(states=self._copies), []
        return moves

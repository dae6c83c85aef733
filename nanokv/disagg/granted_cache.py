"""GrantedCache: the verbs of a cache over pages that another process has granted. It searches and evicts nothing.

match     gives the request the pages and the state of its PREFILL, computed up to cached_length
reserve   has room: PREFILL names the pages of the whole prompt
commit    lists a copy of the state where a checkpoint is due
release   forgets the request; its pages belong to the process that granted them
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from nanokv.cache.contract import Moves
from nanokv.core.errors import CacheError
from nanokv.core.request import Holding, Request


@dataclass(frozen=True)
class GrantedPages:
    """The pages, state and checkpoints of one PREFILL (messages.Prefill).

    checkpoints   position -> the state to copy into
    """

    pages: array[int]
    cached_length: int
    state: int | None
    checkpoints: dict[int, int]


class GrantedCache:
    """A cache (cache.contract.Cache) over granted pages."""

    num_available = sys.maxsize  # every page was reserved by the process that granted it

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._given: dict[Request, GrantedPages] = {}
        self._copies: list[tuple[int, int]] = []

    def give(self, request: Request, given: GrantedPages) -> None:
        """Sets the pages of a request. Called before the request is scheduled."""
        self._given[request] = given

    def match(self, request: Request) -> int:
        """Gives the request its pages and its state, computed and cached up to cached_length; returns that length."""
        given = self._given[request]
        request.held.pages, request.held.state_id = given.pages, given.state
        request.num_computed = request.held.num_cached = given.cached_length
        return request.num_computed

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """True: the granted pages have room. Raises CacheError where they have none."""
        if self.pages_for(request.num_computed + num_tokens) > len(request.held.pages):
            raise CacheError(f"{request}: too few pages were granted")
        return True

    def commit(self, request: Request, in_flight: int = 0) -> None:
        """Lists a copy (from, to) of the request's state where a checkpoint is due at the tokens that have arrived:
        those computed, without the `in_flight` last ones.
        """
        checkpoint = self._given[request].checkpoints.get(request.num_computed - in_flight)
        if checkpoint is not None:
            assert request.held.state_id is not None
            self._copies.append((request.held.state_id, checkpoint))

    def release(self, request: Request) -> None:
        """Forgets a request, and copies of its state that have not run: their targets will have other owners."""
        self._given.pop(request, None)
        self._copies = [copy for copy in self._copies if copy[0] != request.held.state_id]
        request.held, request.num_computed = Holding(), 0

    def prefix_length(self, request: Request) -> int:
        """Tokens whose pages hold their keys and values already."""
        return self._given[request].cached_length

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self._page_size)

    def limit_chunk(self, request: Request, num_tokens: int) -> int:
        """At most `num_tokens`, and no further than the next checkpoint: a state is copied only between steps."""
        start = request.num_computed
        return min([num_tokens, *(p - start for p in self._given[request].checkpoints if p > start)])

    def request_checkpoint(self, request: Request, position: int) -> bool:
        """False: only PREFILL asks for checkpoints."""
        return False

    def drain_moves(self) -> Moves:
        """The copies of states listed since the last call."""
        moves, self._copies = Moves(states=self._copies), []
        return moves

"""FixedPages: the four verbs of a cache over pages that another process has given. Nothing is found, taken or evicted.

match     the pages and the state that came with PREFILL; computed up to its cached_length
reserve   always room: all pages of the prompt are there already
commit    a checkpoint that is due is listed as a copy of the state
release   forgotten; the pages stay whose they are
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass

from nanokv.core.errors import CacheError
from nanokv.core.request import Request


@dataclass(frozen=True)
class Given:
    """What came with one PREFILL: see messages.Prefill."""

    pages: array[int]
    cached_length: int
    state: int | None
    checkpoints: dict[int, int]


class FixedPages:
    """What a Scheduler needs (cache.manager.Cache), over what `give` was told."""

    num_available = sys.maxsize  # whoever gave the pages has reserved them all

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._given: dict[Request, Given] = {}
        self._copies: list[tuple[int, int]] = []

    def give(self, request: Request, given: Given) -> None:
        self._given[request] = given

    def given(self, request: Request) -> Given:
        return self._given[request]

    def match(self, request: Request) -> int:
        """Hands the given pages and state to the request, computed and cached up to the given length; returns that."""
        given = self._given[request]
        request.pages, request.state_id = given.pages, given.state
        request.num_computed = request.num_cached = given.cached_length
        return request.num_computed

    def reserve(self, request: Request, num_tokens: int) -> bool:
        if self.pages_for(request.num_computed + num_tokens) > len(request.pages):
            raise CacheError(f"{request} was given too few pages")
        return True

    def commit(self, request: Request, in_flight: int = 0) -> None:
        """Lists a copy (from, to) of the request's state where a checkpoint is due at the tokens that have arrived:
        those computed, without the `in_flight` last ones.
        """
        checkpoint = self._given[request].checkpoints.get(request.num_computed - in_flight)
        if checkpoint is not None:
            self._copies.append((request.state_id, checkpoint))

    def release(self, request: Request) -> None:
        self._given.pop(request, None)
        # A checkpoint that was listed and not copied yet: its slot is about to be somebody else's.
        self._copies = [copy for copy in self._copies if copy[0] != request.state_id]

    def prefix_length(self, request: Request) -> int:
        return self._given[request].cached_length

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def chunk(self, request: Request, num_tokens: int) -> int:
        """Up to the next checkpoint: a state can be copied only between steps."""
        start = request.num_computed
        return min([num_tokens, *(p - start for p in self._given[request].checkpoints if p > start)])

    def expect(self, request: Request, position: int) -> bool:
        return False

    def take_copies(self) -> list[tuple[int, int]]:
        return []

    def take_state_copies(self) -> list[tuple[int, int]]:
        copies, self._copies = self._copies, []
        return copies

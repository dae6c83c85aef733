"""Sharing: the part of CacheManager for pages that are not filled by their own request's steps alone.

    fork       |== published: both lock the node ==|-- private pages: one more owner --|  empty pages: not shared
transfer   reserve_checkpoints -> (a connector writes pages and states) -> adopt
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from nanokv.cache.pool import PagePool
from nanokv.cache.radix import RadixTree
from nanokv.cache.states import States
from nanokv.core.errors import CacheError
from nanokv.core.events import PageEvent, Shared
from nanokv.core.request import Holding, Request


class Sharing(ABC):
    """Base of CacheManager, which provides what is declared here."""

    page_size: int
    prefix_cache: bool
    _pool: PagePool
    _tree: RadixTree
    _states: States | None
    _live: set[Request]

    @abstractmethod
    def _publish(self, request: Request, num_tokens: int) -> None:
        """Moves full pages of the first `num_tokens` tokens into the tree."""

    @abstractmethod
    def _log(self, event: type[PageEvent], request: Request | None, pages: Iterable[int]) -> None:
        """Emits an event if anything listens."""

    def _expect_live(self, request: Request) -> None:
        if request not in self._live:
            raise CacheError(f"{request} holds nothing here: match it first")

    # -- forks

    def fork(self, parent: Request, child: Request) -> None:
        """Gives `child`, whose tokens begin like the parent's, everything computed for the parent so far.

        The parent's full pages are published first, so with a prefix cache only a partial page is ever private and
        shared; the first request that writes into it copies it. Raises CacheError when the tokens or the namespaces
        differ.
        """
        self._expect_live(parent)
        length = min(parent.num_computed, child.num_tokens)
        alike = parent.tokens[:length] == child.tokens[:length]
        if child in self._live or not alike or parent.params.cache_salt != child.params.cache_salt:
            raise CacheError(f"{child} is served already, or does not begin like {parent}")
        if self.prefix_cache:
            self._publish(parent, length)
        held = parent.held
        if held.num_published * self.page_size > length:
            raise CacheError(f"{child} ends before the published pages of {parent}: match it instead")
        pages = held.pages[: -(-length // self.page_size)]
        child.held = Holding(
            pages, held.num_published, held.node, num_cached=held.num_cached, num_kv_matched=held.num_kv_matched,
            admitted=True,
        )  # fmt: skip
        child.num_computed = length
        if self._states is not None:
            self._states.fork(parent, child)
        self._tree.lock(held.node)
        self._pool.share(pages[held.num_published :])
        self._live.add(child)
        self._log(Shared, child, pages)

    # -- transfers

    def reserve_checkpoints(self, request: Request, upto: int) -> list[tuple[int, int]]:
        """(position, state) of each checkpoint that a connector is to write on its way to position `upto`."""
        self._expect_live(request)
        if self._states is None or not self.prefix_cache:
            return []
        return sorted(self._states.reserve_checkpoints(request, upto).items())

    def adopt(self, request: Request, num_tokens: int) -> None:
        """The first `num_tokens` of a request are in its pages and states, brought by a connector; it goes on there.

        Publishes page by page up to each checkpoint, which goes to the node that ends there, and then the rest.
        """
        self._expect_live(request)
        if self.prefix_cache:
            if self._states is not None:
                for position, state in sorted(self._states.take_reserved(request).items()):
                    self._publish(request, position)
                    self._states.attach(request.held.node, state)
            self._publish(request, num_tokens)
        request.num_computed = num_tokens

    def lose_states(self, lost: set[int]) -> None:
        """Forgets the checkpoints in these states: their copies were listed and never made."""
        if lost and self._states is not None:
            self._states.lose(lost, self._live)

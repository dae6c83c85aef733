"""Sharing: the part of CacheManager for pages that other requests or a connector have filled.

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
    """Base of CacheManager, which defines the attributes and abstract methods."""

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
        """Emits an event where there is a subscriber."""

    def _expect_live(self, request: Request) -> None:
        if request not in self._live:
            raise CacheError(f"{request} holds nothing here: match it first")

    # -- forks

    def fork(self, parent: Request, child: Request) -> None:
        """Shares the pages of the parent's computed tokens with `child`, whose tokens begin like the parent's.

        The parent's full pages are published first, so with a prefix cache at most a partial page is private and
        shared; the first request that writes into it copies it.
        Raises   CacheError when the tokens or the namespaces differ, or the child has pages already
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
        """Reserves states for the checkpoints that a connector writes between num_computed and `upto`.

        Returns   (position, state) of each, in order of position; empty where no layer is recurrent
        """
        self._expect_live(request)
        if self._states is None or not self.prefix_cache:
            return []
        return sorted(self._states.reserve_checkpoints(request, upto).items())

    def adopt(self, request: Request, num_tokens: int) -> None:
        """Publishes the first `num_tokens` tokens of a request, which a connector has brought, and sets num_computed.

        Publishes up to each reserved checkpoint first: the checkpoint belongs to the node that ends there.
        """
        self._expect_live(request)
        if self.prefix_cache:
            if self._states is not None:
                for position, state in sorted(self._states.take_reserved(request, num_tokens).items()):
                    self._publish(request, position)
                    self._states.attach(request.held.node, state)
            self._publish(request, num_tokens)
        request.num_computed = num_tokens

    def lose_states(self, lost: set[int]) -> None:
        """Drops the checkpoints in these states, whose copies were listed and never made."""
        if lost and self._states is not None:
            self._states.lose(lost, self._live)

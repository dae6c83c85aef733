"""Sharing: the part of CacheManager for pages that other requests or a connector have filled.

    fork       |== published: both lock the node ==|-- private pages: one more owner --|  empty pages: not shared
transfer   reserve_checkpoints -> (a connector writes pages and states) -> adopt
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from nanokv.cache.contract import Moves
from nanokv.cache.pool import PagePool
from nanokv.cache.radix import RadixTree
from nanokv.cache.states import States
from nanokv.core.errors import CacheError
from nanokv.core.events import Freed, PageEvent, Shared
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
    def drain_moves(self) -> Moves:
        """The listed moves, which are forgotten."""

    @abstractmethod
    def _leaves(self, pages: list[int]) -> list[bytes]:
        """Tells observers that these pages leave the tree. Returns their keys."""

    @abstractmethod
    def _log(self, event: type[PageEvent], request: Request | None, pages: Iterable[int]) -> None:
        """Emits an event where there is a subscriber."""

    @abstractmethod
    def _expect_live(self, request: Request) -> None:
        """Raises CacheError for a request that holds nothing."""

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

    def rebuild(self, kept: Collection[Request]) -> None:
        """Makes the books anew after an interrupt that may have left them wrong: no page is cached, every request gives
        up its pages, and those in `kept`, into whose pages a connector writes, hold theirs as private ones."""
        lost = self._tree.clear()
        for request in {*self._live, *kept}:
            held = request.held
            if request in kept:
                held.num_published, held.node = 0, self._tree.match_prefix(b"", request.params.cache_salt)[0]
                self._tree.lock(held.node)
            else:
                request.held = Holding(num_cached=held.num_cached, num_kv_matched=held.num_kv_matched, admitted=True)
                request.num_computed = 0
        self._live = set(kept)
        self._pool.restart(page for request in kept for page in request.held.pages)
        if self._states is not None:
            self._states.restart(kept)
        self.drain_moves()
        self._leaves(lost)
        self._log(Freed, None, lost)

    def lose_states(self, lost: set[int]) -> None:
        """Drops the checkpoints in these states, whose copies were listed and never made."""
        if lost and self._states is not None:
            self._states.lose(lost, self._live)

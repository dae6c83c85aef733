"""CacheManager: the cache as the scheduler sees it (contract.py). Knows requests, pages and states; knows no tensors.

Ownership, for one request (P = page_size; the boundaries are whole pages):

    [0, num_published * P)      the tree owns these pages; the request locks `node`, the node that ends here
    [num_published * P, ...)    private: the PagePool counts the requests that hold the page (1, or more after a fork)

    match     |== tree ==|                                    pages found; node locked
    reserve   |== tree ==|-- private --|-- private, empty --|  room for the tokens of the next step
    commit    |======== tree ========|-- private ------------| full pages of computed tokens move to the tree
    release   (nothing)                                       the tree keeps its pages, private ones are freed

Every page is in exactly one of: free, held (private to requests), cached and evictable, cached and locked.

Where layers are recurrent, a request starts at the deepest state of the tree (states.py). It computes again the tokens
between that state and the end of the pages found, into private pages that are freed as duplicates at their publication:

    |== pages found and held ==| pages found, without a state: computed again |     num_cached, then num_kv_matched
"""

from __future__ import annotations

from collections.abc import Iterable

from nanokv.cache.audit import check_pages
from nanokv.cache.contract import Moves
from nanokv.cache.observers import Observers
from nanokv.cache.pool import PagePool
from nanokv.cache.radix import RadixTree
from nanokv.cache.sharing import Sharing
from nanokv.cache.states import States
from nanokv.core.errors import CacheError
from nanokv.core.events import Allocated, Copied, Events, Evicted, Freed, Matched, PageEvent, Published
from nanokv.core.request import Holding, Request
from nanokv.core.spec import PageLayout


class CacheManager(Sharing):
    """Pages of requests: found in the prefix tree, allocated from the pool, published, shared and freed.

    layout           PageLayout; only its page_size and is_recurrent are used
    num_pages        pages in the pool
    prefix_cache     False: no page is published or found
    events           Events, or None
    num_states       states in the pool: two for each running request where a layer is recurrent, one where layers keep
                     partial pages alone, else 0
    state_interval   tokens between further checkpoints of states, or None
    observers        receive the changes of the prefix tree; None: page keys never leave the process
    """

    def __init__(
        self,
        layout: PageLayout,
        num_pages: int,
        prefix_cache: bool = True,
        events: Events | None = None,
        num_states: int = 0,
        state_interval: int | None = None,
        observers: Observers | None = None,
    ) -> None:
        self.page_size = layout.page_size
        self._layout = layout
        self.prefix_cache = prefix_cache
        self._is_recurrent = layout.is_recurrent
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(layout.page_size, observers.identity if observers is not None else b"")
        self._states = None
        if num_states:
            self._states = States(num_states, layout.page_size, state_interval, self._tree, layout.is_recurrent)
        self._events = events if events is not None else Events()
        self._observers = observers
        self._live: set[Request] = set()
        self._moves = Moves()
        self._counters = dict.fromkeys(("evictions", "hit_tokens", "kv_hit_tokens", "queried_tokens", "copies"), 0)

    @property
    def tree(self) -> RadixTree:
        """The prefix tree, for inspection."""
        return self._tree

    @property
    def num_available(self) -> int:
        """Pages that `reserve` could allocate now: free ones, and cached ones that no request locks."""
        return self._pool.num_free + self._tree.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return self._layout.pages_for(num_tokens)

    # -- the life of a request

    def match(self, request: Request) -> int:
        """Finds the longest cached prefix of the request's known tokens and holds it. Returns its tokens.

        At least the last known token is left to compute, because the cache holds no logits; whole pages only.
        num_computed becomes the end of the match. A request that wants the logits of every row has to compute every
        row, so it looks nothing up. Raises CacheError when the request is already served.
        """
        if request in self._live:
            raise CacheError(f"{request} is matched twice without a release between")
        # A text that is scored, or was scored before its answer, counts as neither a hit nor a query.
        request.held.admitted |= request.wants_all_logits or request.prompt_logprobs is not None
        self._open(request, b"" if request.wants_all_logits else self._matchable(request))
        self._log(Matched, request, request.held.pages)
        return request.num_computed

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Allocates pages for the `num_tokens` after num_computed; evicts cached pages where it must.

        All or nothing: False changes nothing. Where the next token falls into a page that a forked request also holds,
        the request gets a page of its own, and its copy is listed for the next step's moves.
        """
        self._expect_live(request)
        held = request.held
        first = request.num_computed // self.page_size
        copy = first < len(held.pages) and self._pool.count(held.pages[first]) > 1
        missing = max(0, self.pages_for(request.num_computed + num_tokens) - len(held.pages))
        if missing + copy > self.num_available:
            return False
        self._make_room(missing + copy)
        if copy:
            self._copy_on_write(request, first)
        if missing:
            pages = self._pool.allocate(missing)
            held.pages.extend(pages)
            self._log(Allocated, request, pages)
        if not held.admitted:
            held.admitted = True
            self._counters["hit_tokens"] += held.num_cached
            self._counters["kv_hit_tokens"] += held.num_kv_matched
            self._counters["queried_tokens"] += request.num_tokens
        if self._states is not None and self.prefix_cache:
            self._states.capture(request)
        return True

    def commit(self, request: Request, in_flight: int = 0) -> None:
        """Publishes the full pages of computed tokens, of the prompt and of the answer alike.

        in_flight   tokens in num_computed whose step has been dispatched and is not resolved yet
        A page whose tokens are in the tree already, computed by another request, is freed; the tree's page takes its
        place in held.pages. A page still shared with a fork is published once the others have their own copy.
        """
        self._expect_live(request)
        if self.prefix_cache:
            self._publish(request, min(request.num_computed - in_flight, request.num_tokens))
            if self._states is not None:
                self._states.file_checkpoint(request)

    def release(self, request: Request) -> None:
        """Ends the hold of a request that has finished, was aborted or is preempted. Published pages stay cached.

        Does nothing for a request without pages: one that waits, or was released before.
        A copy into a page freed here may still be listed. It is harmless: copies run before the step and in their
        order, so the next owner of the page writes after it.
        """
        if request not in self._live:
            return
        self._live.remove(request)
        if self._states is not None:
            self._states.release(request)
        held = request.held
        self._tree.unlock(held.node)
        freed = self._pool.release(held.pages[held.num_published :])
        request.held = Holding(num_cached=held.num_cached, num_kv_matched=held.num_kv_matched, admitted=held.admitted)
        request.num_computed = 0
        self._log(Freed, request, freed)

    def drain_moves(self) -> Moves:
        """The moves listed since the last call; the next step runs them before its forward pass."""
        moves, self._moves = self._moves, Moves()
        if self._states is not None:
            moves.states = self._states.take_copies()
        return moves

    # -- for the scheduler's plan

    def prefix_length(self, request: Request) -> int:
        """Tokens that `match` would find now. Changes nothing."""
        look = self._tree.state_length if self._is_recurrent else self._tree.prefix_length
        return look(self._matchable(request), request.params.cache_salt) * self.page_size

    def limit_chunk(self, request: Request, num_tokens: int) -> int:
        """How many of the next `num_tokens` of a running request one step may compute: up to the next checkpoint."""
        if self._states is None or not self.prefix_cache:
            return num_tokens
        return self._states.limit_chunk(request, num_tokens)

    def request_checkpoint(self, request: Request, position: int) -> bool:
        """Requests a checkpoint of a running request after `position` tokens, where another request will branch off.

        False where that request could not start there: the recurrent state has passed the position.
        """
        return self._states is None or self._states.request_checkpoint(request, position)

    def stats(self) -> dict[str, int]:
        """Pages and states by owner, and counters since the start (core/stats.py)."""
        return {
            "pages_total": self._pool.num_pages,
            "pages_free": self._pool.num_free,
            "pages_held": self._pool.num_pages - self._pool.num_free - self._tree.num_pages,
            "pages_cached": self._tree.num_pages,
            "pages_locked": self._tree.num_protected,
            **(self._states.stats() if self._states is not None else {}),
            **self._counters,
        }

    def reset(self) -> None:
        """Evicts every cached page that no request holds."""
        self._log(Freed, None, self._evict(self._tree.num_evictable))

    def check(self) -> None:
        """Recounts every page, lock and state from the live requests. Raises CacheError for a difference."""
        check_pages(self._pool, self._tree, self._live, self.page_size)
        if self._states is not None:
            self._states.check(self._live)

    # -- inside

    def _expect_live(self, request: Request) -> None:
        if request not in self._live:
            raise CacheError(f"{request} holds nothing here: match it first")

    def _matchable(self, request: Request) -> bytes:
        return request.tokens[: max(0, request.num_tokens - 1)].tobytes()

    def _open(self, request: Request, tokens: bytes) -> None:
        held = request.held
        node, held.pages = self._tree.match_prefix(tokens, request.params.cache_salt)
        num_found = len(held.pages) * self.page_size
        if self._states is not None:
            start = self._states.reachable(node)
            if start is not node:
                node = start
                del held.pages[sum(len(one.pages) for one in node.path()) :]
        held.node = node
        self._tree.lock(node)
        self._live.add(request)
        if self._states is not None:
            self._states.open(request, node, num_found)
        held.num_published = len(held.pages)
        request.num_computed = held.num_published * self.page_size
        if not held.admitted:
            held.num_cached, held.num_kv_matched = request.num_computed, num_found

    def _make_room(self, num_pages: int) -> None:
        short = num_pages - self._pool.num_free
        if short > 0:
            evicted = self._evict(short)
            self._counters["evictions"] += len(evicted)
            self._log(Evicted, None, evicted)

    def _evict(self, num_pages: int) -> list[int]:
        evicted = self._pool.release(self._tree.evict(num_pages))
        if self._states is not None:
            self._states.drop(self._tree.take_cut())
        self._moves.saves += zip(self._leaves(evicted), evicted, strict=True)
        return evicted

    def _leaves(self, pages: list[int]) -> list[bytes]:
        keys = self._tree.keys_of(pages)
        if self._observers is not None and pages:
            self._observers.evicting(keys, pages)
        return keys

    def _copy_on_write(self, request: Request, index: int) -> None:
        """Lists the copy of the shared page held.pages[index] to a page of the request alone, which takes its place."""
        shared = request.held.pages[index]
        (own,) = self._pool.allocate(1)
        self._pool.release([shared])
        request.held.pages[index] = own
        self._moves.pages.append((shared, own))
        self._counters["copies"] += 1
        self._log(Copied, request, [shared, own])

    def _publish(self, request: Request, num_tokens: int) -> None:
        held = request.held
        first, last = held.num_published, num_tokens // self.page_size
        last = next((i for i in range(first, last) if self._pool.count(held.pages[i]) > 1), last)
        if last <= first:
            return
        tokens = request.tokens[first * self.page_size : last * self.page_size].tobytes()
        own = held.pages[first:last]
        held.node, in_tree = self._tree.insert(held.node, tokens, own)
        held.pages[first:last] = in_tree
        held.num_published = last
        duplicates = [page for page, kept in zip(own, in_tree, strict=True) if page != kept]
        freed = self._pool.release(duplicates)
        self._log(Published, request, in_tree)
        adopted = own[len(duplicates) :]  # the tree held a prefix of them, so its new pages are the last
        if self._observers is not None and adopted:
            self._observers.stored(self._tree.keys_of(adopted), adopted)
        if freed:
            self._log(Freed, request, freed)

    def _log(self, event: type[PageEvent], request: Request | None, pages: Iterable[int]) -> None:
        if self._events:
            name, index = (None, None) if request is None else (request.request_id, request.index)
            self._events.emit(event(name, index, list(pages)))

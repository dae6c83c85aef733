"""CacheManager: the one door between the scheduler and the cache. Knows requests, pages, states; knows no tensors.

Who owns what, for one request (P = page_size; boundaries of ownership are whole pages):

    [0, num_published * P)      the tree owns these pages; the request locks `node`, the node that ends here
    [num_published * P, ...)    private: the PagePool counts the requests that hold the page (1, or more after a fork)

    match     |== tree ==|                                    pages found; node locked
    reserve   |== tree ==|-- private --|-- private, empty --|  room for the tokens of the next step
    commit    |======== tree ========|-- private ------------| full pages whose tokens are computed change hands
    release   (nothing)                                       the tree keeps its pages, private ones are freed

Every page is in exactly one of: free, held (private to requests), cached and evictable, cached and locked.

Where layers are recurrent, a request starts at the deepest state of the tree (states.py) and computes again what lies
between it and the end of the pages found, into private pages that fall as duplicates when they are published:

    |== pages found and held ==| pages found, without a state: computed again |     num_cached, then num_kv_matched
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Protocol

from nanokv.cache.audit import check_pages
from nanokv.cache.pool import PagePool
from nanokv.cache.radix import RadixTree
from nanokv.cache.states import States
from nanokv.core.errors import CacheError
from nanokv.core.events import EventLog
from nanokv.core.request import Request
from nanokv.core.spec import PageLayout


class Cache(Protocol):
    """What a scheduler needs: four verbs and some looks, over a prefix tree or over pages given by another process."""

    def match(self, request: Request) -> int: ...
    def reserve(self, request: Request, num_tokens: int) -> bool: ...
    def commit(self, request: Request, in_flight: int = 0) -> None: ...
    def release(self, request: Request) -> None: ...
    def prefix_length(self, request: Request) -> int: ...
    def pages_for(self, num_tokens: int) -> int: ...
    def chunk(self, request: Request, num_tokens: int) -> int: ...
    def expect(self, request: Request, position: int) -> bool: ...
    def take_copies(self) -> list[tuple[int, int]]: ...
    def take_state_copies(self) -> list[tuple[int, int]]: ...
    @property
    def num_available(self) -> int: ...


class CacheManager:
    """Pages for requests: found in the prefix tree, taken from the pool, published, shared and given back.

    layout         PageLayout, of which only page_size and is_recurrent matter here
    num_pages      pages in the pool
    prefix_cache   False: nothing is published and nothing is found
    events         EventLog, or None
    num_states     states in the pool: two for each request that runs where a layer is recurrent, one where layers only
                   keep tails of unfinished pages, else 0
    state_interval tokens between further checkpoints of states, or None
    """

    def __init__(
        self,
        layout: PageLayout,
        num_pages: int,
        prefix_cache: bool = True,
        events: EventLog | None = None,
        num_states: int = 0,
        state_interval: int | None = None,
    ) -> None:
        self.page_size = layout.page_size
        self._layout = layout
        self.prefix_cache = prefix_cache
        self._is_recurrent = layout.is_recurrent
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(layout.page_size)
        self._states = (
            States(num_states, layout.page_size, state_interval, self._tree, layout.is_recurrent)
            if num_states
            else None
        )
        self._events = events if events is not None else EventLog(None)
        self._live: set[Request] = set()
        self._copies: list[tuple[int, int]] = []
        self._counters = dict.fromkeys(("evictions", "hit_tokens", "kv_hit_tokens", "queried_tokens", "copies"), 0)

    @property
    def tree(self) -> RadixTree:
        """The prefix tree, to look at."""
        return self._tree

    @property
    def num_available(self) -> int:
        """Pages that `reserve` could hand out now: free ones, and cached ones that nobody locks."""
        return self._pool.num_free + self._tree.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return self._layout.pages_for(num_tokens)

    # -- the four verbs

    def match(self, request: Request) -> int:
        """Finds the longest cached prefix of the request's known tokens and holds it. Returns its tokens.

        At least the last known token is left to compute, because the cache holds no logits; whole pages only. On the
        way out num_computed stands at the end of the match. A request that wants the logits of every row has to compute
        every row, so it looks nothing up. Raises CacheError when the request is already served.
        """
        if request in self._live:
            raise CacheError(f"{request} is matched twice without a release between")
        if request.wants_all_logits:
            self._open(request, b"")
            request.admitted = True  # neither a hit nor a query is counted
        else:
            self._open(request, self._matchable(request))
        self._log("match", request, request.pages)
        return request.num_computed

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Makes room for the next `num_tokens` after num_computed; evicts cached pages where it must.

        All or nothing: False changes nothing. Where the next token falls into a page that a forked request holds too,
        the request gets a page of its own, and a copy is listed that has to run before the step does.
        """
        self._expect_live(request)
        first = request.num_computed // self.page_size
        copy = first < len(request.pages) and self._pool.count(request.pages[first]) > 1
        missing = max(0, self.pages_for(request.num_computed + num_tokens) - len(request.pages))
        if missing + copy > self.num_available:
            return False
        self._make_room(missing + copy)
        if copy:
            self._copy_on_write(request, first)
        if missing:
            pages = self._pool.allocate(missing)
            request.pages.extend(pages)
            self._log("alloc", request, pages)
        if not request.admitted:
            request.admitted = True
            self._counters["hit_tokens"] += request.num_cached
            self._counters["kv_hit_tokens"] += request.num_kv_matched
            self._counters["queried_tokens"] += request.num_tokens
        if self._states is not None and self.prefix_cache:
            self._states.capture(request)
        return True

    def commit(self, request: Request, in_flight: int = 0) -> None:
        """Publishes the full pages whose tokens are computed: prompt and answer alike.

        in_flight   tokens counted in num_computed whose step has been dispatched but has not come back
        A page whose tokens stand in the tree already (another request computed the same) is dropped; the tree's page
        takes its place in request.pages. A page still shared with a fork waits until the others have their own copy.
        """
        self._expect_live(request)
        if self.prefix_cache:
            self._publish(request, min(request.num_computed - in_flight, request.num_tokens))
            if self._states is not None:
                self._states.settle(request)

    def release(self, request: Request) -> None:
        """The request lets go of everything: it has finished, was aborted, or is preempted. What is published stays.

        A request that holds nothing (still waiting, or released before) lets go of nothing.
        A copy into a page freed here may still be listed. It does no harm: copies run before the step and in the order
        they were listed, so whoever gets the page next writes after it.
        """
        if request not in self._live:
            return
        self._live.remove(request)
        if self._states is not None:
            self._states.release(request)
        self._tree.unlock(request.node)
        freed = self._pool.release(request.pages[request.num_published :])
        request.node, request.pages = None, array("i")
        request.num_published = request.num_computed = 0
        self._log("free", request, freed)

    # -- computed elsewhere

    def lend(self, request: Request) -> list[tuple[int, int]]:
        """(position, state) of each checkpoint that whoever computes this request elsewhere is to leave on the way."""
        self._expect_live(request)
        if self._states is None or not self.prefix_cache:
            return []
        return sorted(self._states.lend(request).items())

    def adopt(self, request: Request) -> None:
        """All known tokens of a request have been computed elsewhere, into its pages and states: it goes on from there.

        Publishes page by page up to each checkpoint, which goes to the node that ends there, and then the rest.
        """
        self._expect_live(request)
        if self.prefix_cache:
            if self._states is not None:
                for position, state in sorted(self._states.take_lent(request).items()):
                    self._publish(request, position)
                    self._states.place(request.node, state)
            self._publish(request, request.num_tokens)
        request.num_computed = request.num_tokens

    # -- forks

    def fork(self, parent: Request, child: Request) -> None:
        """Gives `child`, whose tokens begin like the parent's, everything computed for the parent so far.

            |== published: both lock the node ==|-- private pages: one more owner --|   parent's empty pages: not shared

        The parent's full pages are published first, so with a prefix cache only an unfinished tail is ever private and
        shared; whoever writes into it first copies it. Raises CacheError when the tokens or the namespaces differ.
        """
        self._expect_live(parent)
        length = min(parent.num_computed, child.num_tokens)
        alike = parent.tokens[:length] == child.tokens[:length]
        if child in self._live or not alike or parent.params.cache_salt != child.params.cache_salt:
            raise CacheError(f"{child} is served already, or does not begin like {parent}")
        if self.prefix_cache:
            self._publish(parent, length)
        if parent.num_published * self.page_size > length:
            raise CacheError(f"{child} ends before the published pages of {parent}: match it instead")
        child.node, child.num_published = parent.node, parent.num_published
        child.pages = parent.pages[: self.pages_for(length)]
        child.num_computed = length
        child.num_cached, child.num_kv_matched, child.admitted = parent.num_cached, parent.num_kv_matched, True
        if self._states is not None:
            self._states.fork(parent, child)
        self._tree.lock(child.node)
        self._pool.share(child.pages[child.num_published :])
        self._live.add(child)
        self._log("share", child, child.pages)

    def take_copies(self) -> list[tuple[int, int]]:
        """The page copies (src, dst) listed since the last call: to run in this order, before the step's forward pass.

        In this order each source still holds what it held when its copy was listed: a source that was freed since can
        only be overwritten by a later copy, or by the forward pass.
        """
        copies, self._copies = self._copies, []
        return copies

    def take_state_copies(self) -> list[tuple[int, int]]:
        """The same for states."""
        return [] if self._states is None else self._states.take_copies()

    def lose_states(self, lost: set[int]) -> None:
        """Forgets checkpoints in these states: their copies were taken and never made."""
        if lost and self._states is not None:
            self._states.lose(lost, self._live)

    # -- looking

    def prefix_length(self, request: Request) -> int:
        """Tokens that `match` would find right now. Holds, splits and touches nothing."""
        look = self._tree.state_length if self._is_recurrent else self._tree.length
        return look(self._matchable(request), request.params.cache_salt) * self.page_size

    def chunk(self, request: Request, num_tokens: int) -> int:
        """How many of the next `num_tokens` of a request that runs one step may compute: up to the next checkpoint."""
        if self._states is None or not self.prefix_cache:
            return num_tokens
        return self._states.chunk(request, num_tokens)

    def expect(self, request: Request, position: int) -> bool:
        """Tells that another request will begin with the first `position` tokens (whole pages) of a running one.

        False when it could not start there: a recurrent state has moved past, and pages alone are no use.
        """
        return self._states is None or self._states.expect(request, position)

    def stats(self) -> dict[str, int]:
        """Plain numbers: pages by state, and counters since the start.

        hit_tokens of queried_tokens were found when requests were first admitted; later resumptions are not counted.
        """
        return {
            "pages_total": self._pool.num_pages,
            "pages_free": self._pool.num_free,
            "pages_held": self._pool.num_pages - self._pool.num_free - self._tree.num_pages,
            "pages_cached": self._tree.num_pages,
            "pages_locked": self._tree.num_locked,
            **(self._states.stats() if self._states is not None else {}),
            **self._counters,
        }

    def reset(self) -> None:
        """Forgets every cached page that no request holds."""
        self._log("free", None, self._evict(self._tree.num_evictable))

    def check(self) -> None:
        """Recounts every page and every lock from the live requests. Raises CacheError where the books disagree."""
        check_pages(self._pool, self._tree, self._live, self.page_size)
        if self._states is not None:
            self._states.check(self._live)

    # -- inside

    def _expect_live(self, request: Request) -> None:
        if request not in self._live:
            raise CacheError(f"{request} holds nothing here: match it first")

    def _matchable(self, request: Request) -> bytes:
        return request.tokens[: max(0, request.num_tokens - 1)].tobytes()

    def _open(self, request: Request, blob: bytes) -> None:
        node, request.pages = self._tree.match(blob, request.params.cache_salt)
        num_found = len(request.pages) * self.page_size
        if self._states is not None:
            start = self._states.reachable(node)
            while node is not start:
                del request.pages[len(request.pages) - len(node.pages) :]
                node = node.parent
        request.node = node
        self._tree.lock(node)
        self._live.add(request)
        if self._states is not None:
            self._states.open(request, node, num_found)
        request.num_published = len(request.pages)
        request.num_computed = request.num_published * self.page_size
        if not request.admitted:
            request.num_cached, request.num_kv_matched = request.num_computed, num_found

    def _make_room(self, num_pages: int) -> None:
        short = num_pages - self._pool.num_free
        if short > 0:
            evicted = self._evict(short)
            self._counters["evictions"] += len(evicted)
            self._log("evict", None, evicted)

    def _evict(self, num_pages: int) -> list[int]:
        evicted = self._pool.release(self._tree.evict(num_pages))
        if self._states is not None:
            self._states.drop(self._tree.take_cut())
        return evicted

    def _copy_on_write(self, request: Request, index: int) -> None:
        """A page of its own for `request` in the place of its shared page request.pages[index].

        The copy (from, to) is listed for `take_copies`, counted as "copies" and logged. The request owns the shared
        page no longer.
        """
        shared = request.pages[index]
        (own,) = self._pool.allocate(1)
        self._pool.release([shared])
        request.pages[index] = own
        self._copies.append((shared, own))
        self._counters["copies"] += 1
        self._log("copy", request, [shared, own])

    def _publish(self, request: Request, num_tokens: int) -> None:
        first, last = request.num_published, num_tokens // self.page_size
        last = next((i for i in range(first, last) if self._pool.count(request.pages[i]) > 1), last)
        if last <= first:
            return
        run = request.tokens[first * self.page_size : last * self.page_size].tobytes()
        own = request.pages[first:last]
        request.node, standing = self._tree.extend(request.node, run, own)
        request.pages[first:last] = standing
        request.num_published = last
        self._log("publish", request, standing)
        duplicates = [page for page, kept in zip(own, standing, strict=True) if page != kept]
        if duplicates:
            self._log("free", request, self._pool.release(duplicates))

    def _log(self, event: str, request: Request | None, pages: Iterable[int]) -> None:
        if self._events.on:
            who = {} if request is None else {"request": request.request_id, "index": request.index}
            self._events.write(event, **who, pages=list(pages))

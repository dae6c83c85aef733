"""Simple models of the cache, for tests: a prefix tree as a dict, and an engine that stores tokens instead of K and V.

NaivePrefixes keeps one entry for each cached page, under the key (namespace, all tokens up to its end). House runs
requests over a real CacheManager and writes into each token slot the values on which K and V depend: the namespace and
all tokens up to that position. A wrong hit, copy or eviction makes a request read another value, and a check fails.
"""

from __future__ import annotations

from array import array

import torch

from nanokv.cache.manager import CacheManager
from nanokv.core.event_log import EventLog
from nanokv.core.events import Events
from nanokv.core.request import Request, SamplingParams
from nanokv.core.spec import LayerSpec, PageLayout, Plane


def prompt(length: int, start: int = 0) -> list[int]:
    """Tokens that count up from `start`."""
    return list(range(start, start + length))


def blob(tokens) -> bytes:
    return array("i", tokens).tobytes()


def layout_of(page_size: int, recurrent: bool = False) -> PageLayout:
    plane = Plane("k", (1, page_size, 4), torch.float32, 1)
    state = (Plane("state", (1,), torch.float32, token_axis=None),) if recurrent else ()
    return PageLayout([LayerSpec(paged=(plane,)), LayerSpec(paged=(plane,), state=state)], page_size)


class NaivePrefixes:
    """Pages by prefix. Each operation scans all entries."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[tuple, int] = {}
        self.used: dict[tuple, int] = {}
        self.handles: list[tuple] = []
        self.clock = 0

    def steps(self, salt, tokens) -> list[tuple]:
        """The keys of the whole pages of these tokens, nearest to the root first."""
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def find(self, salt, tokens) -> list[tuple]:
        found = []
        for key in self.steps(salt, tokens):
            if key not in self.pages:
                break
            found.append(key)
        return found

    def touch(self, keys) -> None:
        self.clock += 1
        for key in keys:
            self.used[key] = self.clock

    def lock(self, salt, tokens) -> None:
        self.handles.append((salt, tuple(tokens)))

    def unlock(self, salt, tokens) -> None:
        self.handles.remove((salt, tuple(tokens)))
        self.touch(self.steps(salt, tokens))

    def extend(self, salt, tokens, pages) -> list[int]:
        """Moves one handle to the end of `tokens`, whose last pages are `pages`; returns the pages now in the tree."""
        keys = self.steps(salt, tokens)
        self.handles.remove((salt, tuple(tokens[: (len(keys) - len(pages)) * self.page_size])))
        self.handles.append((salt, tuple(tokens)))
        standing = []
        for key, page in zip(keys[len(keys) - len(pages) :], pages, strict=True):
            standing.append(self.pages.setdefault(key, page))
            self.used.setdefault(key, self.clock)
        return standing

    def locked(self) -> set[tuple]:
        return {key for salt, tokens in self.handles for key in self.steps(salt, tokens)}

    def evict(self, num_pages: int) -> list[int]:
        evicted, locked = [], self.locked()
        while len(evicted) < num_pages:
            parents = {(salt, tokens[: -self.page_size]) for salt, tokens in self.pages}
            leaves = [key for key in self.pages if key not in parents and key not in locked]
            if not leaves:
                break
            oldest = min(leaves, key=self.used.get)
            evicted.append(self.pages.pop(oldest))
            del self.used[oldest]
        return evicted


class House:
    """Requests over a CacheManager, and a store that records the tokens from which each slot of each page and each
    recurrent state was computed."""

    def __init__(
        self,
        num_pages: int,
        page_size: int = 4,
        prefix_cache: bool = True,
        event_log=None,
        num_states=0,
        interval=None,
        observers=None,
    ) -> None:
        self.page_size = page_size
        self.events = Events()
        if event_log is not None:
            self.events.subscribe(EventLog(event_log))
        self.cache = CacheManager(
            layout_of(page_size, num_states > 0), num_pages, prefix_cache, self.events, num_states, interval, observers
        )
        self.states = [None] * num_states
        self.slots = [[None] * page_size for _ in range(num_pages)]
        self.running: list[Request] = []
        self.num_made = 0

    def request(self, tokens, salt: str | None = None) -> Request:
        self.num_made += 1
        request = Request(list(tokens), SamplingParams(cache_salt=salt), f"r{self.num_made}")
        request.tokens = array("i", tokens)
        request.num_prompt = len(request.tokens)
        return request

    def admit(self, request: Request, num_tokens: int | None = None) -> bool:
        """Matches and reserves, as the scheduler does: all tokens still to compute, or `num_tokens` of them."""
        self.cache.match(request)
        wanted = request.num_to_compute if num_tokens is None else min(num_tokens, request.num_to_compute)
        if not self.schedule(request, self.cache.limit_chunk(request, wanted)):
            self.cache.release(request)
            return False
        self.running.append(request)
        return True

    def schedule(self, request: Request, num_tokens: int) -> bool:
        if not self.cache.reserve(request, num_tokens):
            return False
        request.num_scheduled = num_tokens
        return True

    def drop(self, request: Request) -> None:
        """Releases a finished, aborted or preempted request: the cache treats all three alike."""
        request.num_scheduled = 0
        self.cache.release(request)
        self.running.remove(request)

    def fork(self, parent: Request, token: int) -> Request:
        child = self.request([*parent.tokens[: parent.num_computed], token], parent.params.cache_salt)
        self.cache.fork(parent, child)
        self.running.append(child)
        return child

    def run(self, next_token: int = 0, come_back: bool = True) -> None:
        """One step: copies, forward pass, commit. With come_back=False its tokens stay in flight."""
        moves = self.cache.drain_moves()
        for src, dst in moves.pages:
            self.slots[dst] = list(self.slots[src])
        for src, dst in moves.states:
            self.states[dst] = self.states[src]
        for page, slots in enumerate(self.slots):
            if self.cache._pool.count(page) == 0:
                slots[:] = ["freed"] * self.page_size
        in_tree = {page for node in self.cache._tree.nodes() for page in node.pages}
        stepped = [(request, request.num_scheduled) for request in self.running]
        for request, count in stepped:
            for position in range(request.num_computed, request.num_computed + count):
                page = request.held.pages[position // self.page_size]
                assert page not in in_tree, "a published page must not be written"
                self.slots[page][position % self.page_size] = self._value(request, position)
            if request.held.state_id is not None and count:
                start = request.num_computed
                assert start == 0 or self.states[request.held.state_id] == self._value(request, start - 1), (
                    "the state of other tokens"
                )
                self.states[request.held.state_id] = self._value(request, start + count - 1)
            request.advance()
        for request, count in stepped:
            self.cache.commit(request, in_flight=0 if come_back else count)
            if count and request.num_to_compute == 0:
                request.tokens.append(next_token)
        self.verify()

    def prefill(self, request: Request, next_token: int = 0) -> None:
        """Runs steps until the prompt is computed: one step, or one for each checkpoint on the way."""
        self.run(next_token)
        while request.num_to_compute > 1:
            assert self.schedule(request, self.cache.limit_chunk(request, request.num_to_compute))
            self.run(next_token)

    def serve(self, tokens, answer=(), salt: str | None = None) -> Request:
        """Runs one request from its admission to its end."""
        request = self.request(tokens, salt)
        assert self.admit(request)
        answer = [*answer, 0]
        while True:
            self.run(answer[0])
            if request.num_to_compute == 1 and request.num_tokens > request.num_prompt:
                answer.pop(0)
                if not answer:
                    break
            assert self.schedule(request, self.cache.limit_chunk(request, request.num_to_compute))
        self.drop(request)
        return request

    def verify(self) -> None:
        """Checks between steps that the counts agree and that every request reads the values of its own tokens."""
        self.cache.check()
        for request in self.running:
            for position in range(request.num_computed):
                slot = self.slots[request.held.pages[position // self.page_size]][position % self.page_size]
                assert slot == self._value(request, position), f"{request} reads {slot} at {position}"
        for (salt, tokens), page in standing(self.cache._tree).items():
            for slot, end in enumerate(range(len(tokens) - self.page_size + 1, len(tokens) + 1)):
                assert self.slots[page][slot] == (salt, blob(tokens[:end])), f"page {page} is filed under other tokens"

        for src, dst in self.cache._states._copies if self.states else ():  # the next step makes these copies first
            self.states[dst] = self.states[src]
        for node in self.cache._tree.nodes() if self.states else ():
            if node.state is not None:
                assert self.states[node.state] == _end_of(node), "a state is filed under other tokens"

    @staticmethod
    def _value(request: Request, position: int) -> tuple:
        return request.params.cache_salt, request.tokens[: position + 1].tobytes()


def _end_of(node) -> tuple:
    """The expected value of the state at the end of a node: its namespace and all tokens from the root."""
    run = b""
    while node.parent is not None:
        run = bytes(node.tokens) + run
        node = node.parent
    return node.salt, run


def standing(tree) -> dict[tuple, int]:
    """The tree's contents in the format of NaivePrefixes.pages."""
    contents, before = {}, {}
    for node in tree.nodes():
        salt, tokens = before[node.parent] if node.parent is not None else (node.salt, ())
        own = tuple(array("i", bytes(node.tokens)))
        before[node] = salt, tokens + own
        size = len(own) // len(node.pages) if node.pages else 0
        for place, page in enumerate(node.pages):
            contents[salt, tokens + own[: (place + 1) * size]] = page
    return contents

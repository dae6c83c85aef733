"""Property tests: random sequences of operations on the tree and the manager, checked against simple models."""

import random
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from naive_cache import House, NaivePrefixes, blob, standing

from nanokv.cache.radix import RadixTree


class TreeAgainstADict(RuleBasedStateMachine):
    """Applies every rule to NaivePrefixes too; contents, counts and the order of eviction must be equal."""

    prompts = st.lists(st.integers(0, 1), max_size=11)
    salts = st.sampled_from([None, "", "a"])

    def __init__(self):
        super().__init__()
        self.tree, self.naive = RadixTree(2), NaivePrefixes(2)
        self.held: list[tuple] = []  # (node, salt, tokens)
        self.num_made = 0

    def take(self, salt, tokens):
        node, matched = self.tree.match_prefix(blob(tokens), salt)
        keys = self.naive.find(salt, tokens)
        assert list(matched) == [self.naive.pages[key] for key in keys]
        self.naive.touch(keys)
        self.tree.lock(node)
        self.naive.lock(salt, tokens[: 2 * len(keys)])
        self.held.append((node, salt, tokens[: 2 * len(keys)]))

    @rule(salt=salts, tokens=prompts)
    def hold(self, salt, tokens):
        self.take(salt, tokens)

    @rule(salt=salts, tokens=prompts)
    def length(self, salt, tokens):
        assert self.tree.prefix_length(blob(tokens), salt) == len(self.naive.find(salt, tokens))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), more=prompts)
    def extend(self, which, more):
        node, salt, tokens = self.held.pop(which % len(self.held))
        more = more[: len(more) // 2 * 2]
        fresh = list(range(self.num_made, self.num_made + len(more) // 2))
        self.num_made += len(fresh)
        node, stands = self.tree.insert(node, blob(more), array("i", fresh))
        assert list(stands) == self.naive.extend(salt, tokens + more, fresh)
        self.held.append((node, salt, tokens + more))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def let_go(self, which):
        node, salt, tokens = self.held.pop(which % len(self.held))
        self.tree.unlock(node)
        self.naive.unlock(salt, tokens)

    @rule(count=st.integers(0, 6))
    def evict(self, count):
        assert self.tree.evict(count) == self.naive.evict(count)

    @invariant()
    def agree(self):
        self.tree.check(node for node, _, _ in self.held)
        assert standing(self.tree) == self.naive.pages
        assert (self.tree.num_pages, self.tree.num_protected) == (len(self.naive.pages), len(self.naive.locked()))


TestTreeAgainstADict = TreeAgainstADict.TestCase
TestTreeAgainstADict.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Walk:
    """Requests arrive, decode, fork and are preempted or aborted in random order, over few pages. House checks that
    each request reads its own tokens; NaivePrefixes predicts every match, publication and eviction."""

    NUM_PAGES = 16
    MOST = 5  # requests at once

    def __init__(self, rng):
        self.rng = rng
        self.house, self.naive = House(self.NUM_PAGES, page_size=2), NaivePrefixes(2)
        self.waiting = []

    def pick(self):
        return self.rng.choice(self.house.running)

    def boundary(self, request):
        return request.params.cache_salt, list(request.tokens[: request.held.num_published * 2])

    def reserve(self, request, count) -> bool:
        cache, first = self.house.cache, request.num_computed // 2
        copy = first < len(request.held.pages) and cache._pool.count(request.held.pages[first]) > 1
        needed = max(0, -(-(request.num_computed + count) // 2) - len(request.held.pages)) + copy
        held = {page for live in cache._live for page in live.held.pages[live.held.num_published :]}
        free = self.NUM_PAGES - len(held) - len(self.naive.pages)
        fits = needed <= free + len(self.naive.pages) - len(self.naive.locked())
        before = list(request.held.pages)
        assert self.house.schedule(request, count) == fits
        if fits:
            assert len(request.held.pages) == len(before) + needed - copy
            self.naive.evict(needed - free)
        else:
            assert list(request.held.pages) == before
        return fits

    def drop(self, request):
        self.naive.unlock(*self.boundary(request))
        self.house.drop(request)

    def publish(self, request, before, pages, num_resolved):
        """Checks the commit of a request that held `pages`, of which `before` were published."""
        shared = [place for place in range(before, len(pages)) if self.counts[pages[place]] > 1]
        assert request.held.num_published == max(before, min([num_resolved // 2, *shared]))
        if request.held.num_published > before:
            salt, tokens = self.boundary(request)
            stands = self.naive.extend(salt, tokens, pages[before : request.held.num_published])
            assert list(request.held.pages) == pages[:before] + stands + pages[request.held.num_published :]

    def count_owners(self):
        self.counts = [self.house.cache._pool.count(page) for page in range(self.NUM_PAGES)]

    def admit(self, request) -> bool:
        salt, known = request.params.cache_salt, list(request.tokens[:-1])
        keys = self.naive.find(salt, known)
        assert self.house.cache.prefix_length(request) == 2 * len(keys)
        assert self.house.cache.match(request) == 2 * len(keys)
        assert list(request.held.pages) == [self.naive.pages[key] for key in keys]
        self.naive.touch(keys)
        self.naive.lock(salt, known[: 2 * len(keys)])
        self.house.running.append(request)
        fits = self.reserve(request, self.rng.randint(1, request.num_to_compute))
        if not fits:
            self.drop(request)
        return fits

    # The moves. A move that does not apply changes nothing.

    def arrive(self):
        if len(self.house.running) < self.MOST:
            tokens = [self.rng.randint(0, 1) for _ in range(self.rng.randint(1, 9))]
            self.admit(self.house.request(tokens, self.rng.choice([None, None, "a"])))

    def resume(self):
        if self.waiting and self.admit(self.waiting[0]):
            self.waiting.pop(0)

    def schedule(self):
        request = self.pick()
        if request.num_scheduled == 0:
            self.reserve(request, self.rng.randint(1, request.num_to_compute))

    def preempt(self):
        self.waiting.append(request := self.pick())
        self.drop(request)

    def finish(self):
        self.drop(self.pick())

    def fork(self):
        if len(self.house.running) < self.MOST:
            self.count_owners()
            parent = self.pick()
            before, pages = parent.held.num_published, list(parent.held.pages)
            child = self.house.fork(parent, self.rng.randint(0, 1))
            self.publish(parent, before, pages, parent.num_computed)
            self.naive.lock(*self.boundary(child))
            assert child.num_computed == parent.num_computed and child.held.num_published == parent.held.num_published
            if self.rng.random() < 0.5:  # a copy of a copy, if the parent has just copied the partial page
                self.reserve(child, 1)

    def step(self):
        for request in self.house.running:
            if request.num_scheduled == 0 and self.rng.random() < 0.7:
                self.reserve(request, 1)
        self.count_owners()
        come_back = self.rng.random() < 0.7
        before = [
            (r, r.held.num_published, list(r.held.pages), 0 if come_back else r.num_scheduled)
            for r in self.house.running
        ]
        self.house.run(self.rng.randint(0, 1), come_back)
        for request, published, pages, in_flight in before:
            self.publish(request, published, pages, request.num_computed - in_flight)
        for request in [request for request in self.house.running if request.num_tokens > 11]:
            self.drop(request)

    def reset(self):
        self.house.cache.reset()
        self.naive.evict(self.NUM_PAGES)

    def agree(self):
        cache, stats = self.house.cache, self.house.cache.stats()
        cache.check()
        assert standing(cache._tree) == self.naive.pages
        assert (stats["pages_cached"], stats["pages_locked"]) == (len(self.naive.pages), len(self.naive.locked()))
        assert cache.num_available == stats["pages_free"] + stats["pages_cached"] - stats["pages_locked"]
        assert sum(stats[f"pages_{state}"] for state in ("free", "held", "cached")) == self.NUM_PAGES


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), num_moves=st.integers(1, 250))
def test_the_manager_agrees_with_the_naive_model_under_random_moves(seed, num_moves):
    """A failing walk shrinks to its shortest failing prefix."""
    walk = Walk(random.Random(seed))
    anytime = {walk.arrive: 3, walk.resume: 2, walk.reset: 0.1}
    with_requests = {walk.schedule: 2, walk.preempt: 1, walk.finish: 1, walk.fork: 2, walk.step: 5}
    for _ in range(num_moves):
        moves = {**anytime, **with_requests} if walk.house.running else anytime
        walk.rng.choices(list(moves), list(moves.values()))[0]()
        walk.agree()

"""Hidden checks of lesson 02: random histories against the engine's own functions."""

from array import array
from types import SimpleNamespace

import torch

from nanokv.cache.manager import CacheManager
from nanokv.cache.pool import PagePool
from nanokv.cache.store import CacheStore
from nanokv.core.errors import CacheError
from nanokv.core.request import Request
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.learn.expect import equal, random_of, refuses
from nanokv.learn.patching import reference


def layout_of(page_size: int) -> PageLayout:
    return PageLayout([LayerSpec(paged=(Plane("k", (page_size, 3), torch.float32, 0),))], page_size)


def test_02_1_random_numbers():
    random = random_of("pages")
    for _ in range(100):
        size, tokens = random.choice([1, 2, 4, 8, 16, 32, 64]), random.randrange(10**6)
        got = PageLayout.pages_for(SimpleNamespace(page_size=size), tokens)
        equal(got, -(-tokens // size), f"pages of {size} tokens for {tokens} tokens")


def test_02_2_random_layers():
    random = random_of("layers")
    for _ in range(50):
        layers = [
            tuple(Plane(name, (random.randint(1, 50),), torch.uint8, None) for name in "abc"[: random.randint(0, 3)])
            for _ in range(random.randint(0, 5))
        ]
        got, expected = [], []
        end = PageLayout._place(got, layers)
        equal(end, reference(PageLayout)._place(expected, layers), "bytes of a page")
        equal(got, expected, "the tables of slots")


def history(kind: type[PagePool], random) -> list:
    """The results of a pool in a random history of allocations, shares and releases."""
    pool, owned, seen = kind(random.randint(1, 12)), [], []
    for _ in range(60):
        verb = random.choice(["allocate", "share", "release"])
        if verb == "allocate":
            wanted = random.randint(0, 4)
            try:
                pages = pool.allocate(wanted)
            except CacheError:
                pages = "refused"
            else:
                owned += pages
            seen.append((verb, wanted, pages))
        elif owned:
            picked = random.sample(owned, random.randint(1, min(3, len(owned))))
            if verb == "share":
                pool.share(picked)
                owned += picked
            else:
                for page in picked:
                    owned.remove(page)
                seen.append((verb, picked, pool.release(picked)))
        pool.check()
        seen.append(("free", pool.num_free))
    return seen


def test_02_3_random_histories():
    for case in range(30):
        got, expected = history(PagePool, random_of(f"{case}")), history(reference(PagePool), random_of(f"{case}"))
        for one, other in zip(got, expected, strict=True):
            equal(one, other, "the pool's result in a random history")


def test_02_4_random_histories():
    test_02_3_random_histories()


def test_02_4_a_page_released_three_times_by_two_owners():
    pool = PagePool(random_of("size").randint(2, 9))
    (page,) = pool.allocate(1)
    pool.share([page])
    refuses(CacheError, lambda: pool.release([page, page, page]), "three releases of a page with two owners")


def test_02_5_random_copies():
    random = random_of("copies")
    for _ in range(30):
        size = random.randint(2, 9)
        store = CacheStore(layout_of(4), size)
        store.pages.data[:] = torch.arange(size, dtype=torch.uint8)[:, None]
        copies = [tuple(random.sample(range(size), 2)) for _ in range(random.randint(0, 12))]
        expected = list(range(size))
        for source, target in copies:
            expected[target] = expected[source]
        store.pages.copy(copies)
        equal(store.pages.data[:, -1].tolist(), expected, f"pages after the copies {copies}")


def test_02_6_random_forks():
    random = random_of("forks")
    for _ in range(30):
        size = random.choice([2, 4, 8])
        cache, requests = _forks(size, random)
        cache.check()
        tails = [request.held.pages[-1] for request in requests]
        equal(len(set(tails)), len(tails), "different pages that the forked requests write to")


def _forks(size: int, random) -> tuple[CacheManager, list[Request]]:
    """Some forks of one request, each with room for its next token."""
    cache, length = CacheManager(layout_of(size), 64), random.randint(1, 3 * size)
    tokens = [random.randrange(100) for _ in range(length)]
    requests = []
    for _ in range(random.randint(2, 4)):
        request = Request(tokens)
        request.tokens, request.num_prompt = array("i", tokens), length
        requests.append(request)
    parent = requests[0]
    cache.match(parent)
    cache.reserve(parent, length)
    parent.num_computed = length
    for child in requests[1:]:
        cache.fork(parent, child)
    shared = parent.held.pages[-1]
    random.shuffle(requests)
    expected = []
    for request in requests:
        before = request.held.pages[-1]
        if not cache.reserve(request, 1):
            raise AssertionError("a pool of 64 pages has no room for one more token")
        if length % size and request.held.pages[-1] != before:
            expected.append((shared, request.held.pages[-1]))
    equal(cache.drain_moves().pages, expected, "copies in the order in which requests wrote")
    return cache, requests

"""Public checks of lesson 02."""

from array import array
from types import SimpleNamespace

import torch

from nanokv.cache.manager import CacheManager
from nanokv.cache.pool import PagePool
from nanokv.cache.store import CacheStore
from nanokv.core.errors import CacheError
from nanokv.core.request import Request
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.learn.expect import close, equal, refuses


def key(numbers: int, page_size: int = 4, name: str = "k") -> Plane:
    return Plane(name, (page_size, numbers), torch.float32, token_axis=0)


def layout_of(page_size: int = 4) -> PageLayout:
    return PageLayout([LayerSpec(paged=(key(2, page_size),))], page_size)


def test_02_1_a_page_more_for_each_token_that_does_not_fit():
    got = [PageLayout.pages_for(SimpleNamespace(page_size=4), tokens) for tokens in range(10)]
    equal(got, [0, 1, 1, 1, 1, 2, 2, 2, 2, 3], "pages of 4 tokens for 0 to 9 tokens")


def test_02_1_large_numbers_stay_whole():
    got = PageLayout.pages_for(SimpleNamespace(page_size=16), 16 * 10**17 + 1)
    equal(got, 10**17 + 1, "pages of 16 tokens for 16 * 10**17 + 1 tokens")


def test_02_2_planes_follow_each_other_at_multiples_of_16():
    table = []
    end = PageLayout._place(table, [(key(3), key(1, name="v")), (key(5),)])
    offsets = [{name: slot.offset for name, slot in slots.items()} for slots in table]
    equal(offsets, [{"k": 0, "v": 48}, {"k": 64}], "offsets of planes of 48, 16 and 80 bytes")
    equal(end, 144, "bytes of a page")


def test_02_2_odd_planes_are_padded():
    table = []
    small = Plane("s", (3,), torch.uint8, None)
    end = PageLayout._place(table, [(small,), (small,)])
    equal([slots["s"].offset for slots in table], [0, 16], "offsets of two planes of 3 bytes")
    equal(end, 32, "bytes of both")


def test_02_2_a_layer_that_keeps_nothing_has_an_empty_table():
    table = []
    end = PageLayout._place(table, [(), (key(4),), ()])
    equal([list(slots) for slots in table], [[], ["k"], []], "names of the planes, layer by layer")
    equal(end, 64, "bytes of a page")
    equal(PageLayout._place([], []), 0, "bytes of a page of no layers")


def test_02_3_the_first_pages_are_the_lowest():
    pool = PagePool(5)
    equal(pool.allocate(3), [0, 1, 2], "the first three of five pages")
    equal(pool.num_free, 2, "pages left free")


def test_02_3_each_allocated_page_has_one_owner():
    pool = PagePool(5)
    pages = pool.allocate(2)
    equal([pool.count(page) for page in pages], [1, 1], "owners of the two allocated pages")
    pool.check()


def test_02_3_the_page_freed_last_is_allocated_first():
    pool = PagePool(5)
    pool.allocate(4)
    for page in (1, 3):  # what `release` does
        pool._counts[page] = 0
        pool._free.append(page)
    equal(pool.allocate(2), [3, 1], "the next two pages, after 1 and then 3 were freed")


def test_02_3_too_many_are_refused_and_nothing_is_taken():
    pool = PagePool(3)
    refuses(CacheError, lambda: pool.allocate(4), "4 pages of a pool of 3")
    equal(pool.num_free, 3, "pages free after the refusal")
    equal(pool.allocate(0), [], "no pages")


def test_02_4_the_last_owner_frees_the_page():
    pool = PagePool(4)
    pages = pool.allocate(2)
    equal(pool.release(pages), pages, "pages that became free")
    equal(pool.num_free, 4, "pages free")
    pool.check()


def test_02_4_a_shared_page_stays():
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.share([pages[1]])
    equal(pool.release(pages), [pages[0]], "pages that became free, when the second has another owner")
    equal(pool.count(pages[1]), 1, "owners left of the shared page")
    equal(pool.release([pages[1]]), [pages[1]], "pages that became free when the other owner released it")
    pool.check()


def test_02_4_releasing_a_page_twice_is_an_error():
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.release([page])
    refuses(CacheError, lambda: pool.release([page]), "a page released twice")


def test_02_4_pages_may_come_from_a_generator():
    pool = PagePool(4)
    equal(pool.release(page for page in pool.allocate(3)), [0, 1, 2], "pages that became free")


def numbered(num_pages: int) -> CacheStore:
    """A store whose page i holds the byte i."""
    store = CacheStore(layout_of(), num_pages)
    store.pages.data[:] = torch.arange(num_pages, dtype=torch.uint8)[:, None]
    return store


def test_02_5_a_page_is_copied_whole():
    store = numbered(4)
    store.pages.copy([(2, 0)])
    width = store.pages.data.shape[1]
    expected = torch.tensor([2, 1, 2, 3], dtype=torch.uint8)[:, None].expand(4, width)
    close(store.pages.data, expected, "the pool after copying page 2 over page 0", ("page", "byte"))


def test_02_5_a_copy_sees_what_an_earlier_one_wrote():
    store = numbered(4)
    store.pages.copy([(0, 1), (1, 2), (3, 0)])
    equal(store.pages.data[:, 0].tolist(), [3, 0, 0, 3], "pages 0 to 3 after the copies 0 to 1, 1 to 2, 3 to 0")


def test_02_5_a_source_may_be_overwritten_later():
    store = numbered(3)
    store.pages.copy([(0, 2), (1, 0)])
    equal(store.pages.data[:, 0].tolist(), [1, 1, 0], "pages 0 to 2 after the copies 0 to 2, 1 to 0")


def sharing() -> tuple[CacheManager, list[Request]]:
    """Two requests with a full first page and a half-full second one, both shared."""
    cache, requests = CacheManager(layout_of(4), 8), [Request([1]), Request([1])]
    pages = cache._pool.allocate(2)
    cache._pool.share(pages)
    for request in requests:
        request.held.pages = array("i", pages)
    return cache, requests


def test_02_6_the_request_that_writes_gets_a_page_of_its_own():
    cache, (one, two) = sharing()
    cache._copy_on_write(two, 1)
    equal(one.held.pages, [0, 1], "pages of the request that did not write")
    equal(two.held.pages, [0, 2], "pages of the request that wrote: page 2 is the next free one")


def test_02_6_the_copy_is_listed_and_counted():
    cache, (_, two) = sharing()
    cache._copy_on_write(two, 1)
    equal(cache.drain_moves().pages, [(1, 2)], "copies (from, to) before the step")
    equal(cache.stats()["copies"], 1, "stats()['copies']")


def test_02_6_each_of_the_two_pages_has_one_owner_afterwards():
    cache, (_, two) = sharing()
    cache._copy_on_write(two, 1)
    equal([cache._pool.count(page) for page in range(4)], [2, 1, 1, 0], "owners of pages 0 to 3")
    cache._pool.check()

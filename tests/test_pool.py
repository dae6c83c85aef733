"""Page ids, reference counts and the free list: no page is allocated twice, and no page is lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanokv.cache.pool import PagePool
from nanokv.core.errors import CacheError


def test_pages_are_allocated_once_and_released_once():
    pool = PagePool(3)
    assert pool.allocate(2) == [0, 1]
    assert pool.num_free == 1
    assert pool.release([0, 1]) == [0, 1]
    assert sorted(pool.allocate(3)) == [0, 1, 2]


def test_the_page_freed_last_is_allocated_first():
    pool = PagePool(8)
    pages = pool.allocate(5)
    pool.release([pages[3]])
    assert pool.allocate(1) == [pages[3]]


def test_a_shared_page_is_freed_by_its_last_owner():
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.share(pages)
    assert pool.release(pages) == []
    assert pool.count(pages[0]) == 1
    assert pool.release(pages) == pages


def test_an_allocation_of_more_pages_than_are_free_takes_none():
    pool = PagePool(2)
    with pytest.raises(CacheError, match="3 pages wanted, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_double_release_is_an_error():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(CacheError, match="twice"):
        pool.release(pages)
    pool.check()


def test_a_free_page_cannot_be_shared():
    with pytest.raises(CacheError, match="free"):
        PagePool(2).share([0])


def test_a_pool_without_pages_is_refused():
    with pytest.raises(ValueError, match="num_pages=0"):
        PagePool(0)


def test_check_detects_a_lost_page():
    pool = PagePool(2)
    pool._free.pop()
    with pytest.raises(CacheError, match="disagree"):
        pool.check()


class PoolAgainstADict(RuleBasedStateMachine):
    """Compares the pool with a dict: page -> number of owners."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(12)
        self.owners: dict[int, int] = {}

    def pick(self, data, **kwargs):
        return data.draw(st.lists(st.sampled_from(sorted(self.owners)), unique=True, **kwargs))

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        if count > 12 - len(self.owners):
            with pytest.raises(CacheError):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and not set(pages) & self.owners.keys()
        self.owners.update(dict.fromkeys(pages, 1))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share(self, data):
        pages = self.pick(data)
        self.pool.share(pages)
        for page in pages:
            self.owners[page] += 1

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data):
        pages = self.pick(data)
        last = [page for page in pages if self.owners[page] == 1]
        assert self.pool.release(pages) == last
        for page in pages:
            self.owners[page] -= 1
        for page in last:
            del self.owners[page]

    @invariant()
    def books_balance(self):
        self.pool.check()
        assert self.pool.num_free == 12 - len(self.owners)
        assert all(self.pool.count(page) == self.owners.get(page, 0) for page in range(12))


TestPoolAgainstADict = PoolAgainstADict.TestCase
TestPoolAgainstADict.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

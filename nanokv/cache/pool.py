"""PagePool, StatePool: ids, reference counts and free lists. They know no tensors, no tokens and no requests.

A PagePool keeps two records, which must agree:

    free ids   a stack: the page freed last is allocated first, while its bytes are still in the processor's caches
    counts     0 free; 1 one owner (a request, or the prefix tree); more: a page that forked requests share
"""

from __future__ import annotations

from collections.abc import Iterable

from nanokv.core.errors import CacheError


class PagePool:
    """The ids 0 .. num_pages - 1, each free or owned.

    num_pages   pages in the pool
    Raises      ValueError for fewer than one page
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages}: a pool needs at least one page")
        self.num_pages = num_pages
        self._counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def count(self, page: int) -> int:
        """Owners of the page; 0 for a free page."""
        return self._counts[page]

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` free pages, the last freed first, each with one owner now. CacheError when there are fewer."""
        if num_pages > len(self._free):
            raise CacheError(f"{num_pages} pages wanted, {len(self._free)} free: the caller makes room first")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each page. Raises CacheError for a page that is free."""
        for page in pages:
            if self._counts[page] == 0:
                raise CacheError(f"page {page} is free and cannot be shared")
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """One owner less for each page. Returns the pages that became free. Raises CacheError for a double release."""
        freed = []
        for page in pages:
            if self._counts[page] == 0:
                raise CacheError(f"page {page} is released twice")
            self._counts[page] -= 1
            if self._counts[page] == 0:
                freed.append(page)
        self._free.extend(freed)
        return freed

    def restart(self, held: Iterable[int]) -> None:
        """Frees every page but those in `held`, one entry an owner."""
        self._counts = [0] * self.num_pages
        for page in held:
            self._counts[page] += 1
        self._free = [page for page in range(self.num_pages - 1, -1, -1) if self._counts[page] == 0]

    def check(self) -> None:
        """Raises CacheError unless the free list holds exactly the pages without an owner, each once."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise CacheError("a page is in the free list twice")
        ownerless = {page for page, count in enumerate(self._counts) if count == 0}
        if free != ownerless:
            raise CacheError(f"free list and counts disagree about pages {sorted(free ^ ownerless)[:8]}")


class StatePool:
    """The ids 0 .. num_states - 1, each free or owned by one request or one node of the tree; states are not shared."""

    def __init__(self, num_states: int) -> None:
        self.num_states = num_states
        self._free = list(range(num_states - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """States without an owner."""
        return len(self._free)

    def allocate(self) -> int | None:
        """A free state, or None."""
        return self._free.pop() if self._free else None

    def release(self, state: int) -> None:
        """Frees a state. `check` finds a double release."""
        self._free.append(state)

    def restart(self, owned: list[int]) -> None:
        """Frees every state but those in `owned`."""
        self._free = [state for state in range(self.num_states - 1, -1, -1) if state not in owned]

    def check(self, owned: list[int]) -> None:
        """Raises CacheError unless every state is either free or in `owned`, exactly once."""
        if sorted([*self._free, *owned]) != list(range(self.num_states)):
            raise CacheError(f"states free {sorted(self._free)[:8]} and owned {sorted(owned)[:8]}: some twice, or lost")

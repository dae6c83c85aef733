"""Observers: all observers of one cache as one, which no fault of theirs can hurt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nanokv.cache.contract import CacheObserver

logger = logging.getLogger("nanokv")


class Observers:
    """Tells each CacheObserver; one that raises is logged, and the others are told all the same.

    observers   CacheObserver each
    identity    of the model (models/identity.py): keys leave the process, so they have to tell models apart
    """

    def __init__(self, observers: Sequence[CacheObserver], identity: bytes) -> None:
        self.identity = identity
        self._observers = tuple(observers)

    def stored(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """As CacheObserver.stored."""
        for observer in self._observers:
            try:
                observer.stored(keys, pages)
            except Exception:
                logger.exception("an observer of the cache failed; it misses %d stored pages", len(pages))

    def evicting(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """As CacheObserver.evicting."""
        for observer in self._observers:
            try:
                observer.evicting(keys, pages)
            except Exception:
                logger.exception("an observer of the cache failed; it misses %d evicted pages", len(pages))

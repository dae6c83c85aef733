"""What is kept, where, for whom: page ids (pool), their bytes (store), a prefix tree (radix), one door (manager)."""

from nanokv.cache.contract import Cache
from nanokv.cache.manager import CacheManager
from nanokv.cache.pool import PagePool
from nanokv.cache.radix import RadixTree
from nanokv.cache.store import CacheStore

__all__ = ["Cache", "CacheManager", "CacheStore", "PagePool", "RadixTree"]

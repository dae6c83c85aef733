"""The cache: page ids (pool), their bytes (store), the prefix tree (radix), and one interface to them (manager)."""

from nanokv.cache.contract import Cache
from nanokv.cache.manager import CacheManager
from nanokv.cache.pool import PagePool
from nanokv.cache.radix import RadixTree
from nanokv.cache.store import CacheStore

__all__ = ["Cache", "CacheManager", "CacheStore", "PagePool", "RadixTree"]

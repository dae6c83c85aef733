"""An audit of the cache: every page and every lock counted again from the live requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

from nanokv.cache.node import Node
from nanokv.cache.pool import PagePool
from nanokv.cache.radix import RadixTree
from nanokv.core.errors import CacheError
from nanokv.core.request import Request


def check_pages(pool: PagePool, tree: RadixTree, live: Set[Request], page_size: int) -> None:
    """Checks that pool, tree and requests agree about the owners of every page and the locks of every node.

    live        the requests that hold pages
    page_size   tokens in a page
    Raises      CacheError where they disagree
    """
    pool.check()
    tree.check(request.held.node for request in live)
    owners = Counter(page for node in tree.nodes() for page in node.pages)
    if owners and max(owners.values()) > 1:
        raise CacheError("a page is in the tree twice")
    held = Counter(page for request in live for page in request.held.pages[request.held.num_published :])
    if held.keys() & owners.keys():
        raise CacheError(f"pages {sorted(held.keys() & owners.keys())[:8]} are private and in the tree")
    owners.update(held)
    for page in range(pool.num_pages):
        if pool.count(page) != owners[page]:
            raise CacheError(f"page {page} counts {pool.count(page)} owners and has {owners[page]}")
    for request in live:
        _check_request(request, page_size)


def _check_request(request: Request, page_size: int) -> None:
    path: list[Node] = request.held.node.path()
    published = request.held.num_published * page_size
    if path[0].salt != request.params.cache_salt:
        raise CacheError(f"{request} is in namespace {path[0].salt!r}")
    if [page for node in path for page in node.pages] != list(request.held.pages[: request.held.num_published]):
        raise CacheError(f"{request} and its node disagree about the published pages")
    if b"".join(node.tokens for node in path) != request.tokens[:published].tobytes():
        raise CacheError(f"{request} and its node disagree about the published tokens")
    if not published <= request.num_computed <= len(request.held.pages) * page_size:
        raise CacheError(f"{request} has computed tokens without a page, or published pages it has not computed")

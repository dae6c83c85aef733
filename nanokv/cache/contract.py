"""The contract between the scheduler and a cache, and what a cache tells its observers. Knows no tree and no tensors.

    match -> reserve -> (a step) -> commit -> ... -> release        the four verbs, for each request

Two caches implement it: CacheManager (a prefix tree over a pool) and disagg's GrantedCache (pages of another process).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nanokv.core.request import Request


@dataclass
class Moves:
    """What a step has to run before its forward pass: first the saves, then the copies in their order.

    pages    (source, destination) of page copies
    states   (source, destination) of state copies
    saves    (key, page) of pages that were evicted: the page still holds what the key names
    done     whether they have run: after that, no failure loses a copy

    A source still holds what it held when its copy was listed: a source that was freed since can only be overwritten by
    a later copy, or by the forward pass.
    """

    pages: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)
    saves: list[tuple[bytes, int]] = field(default_factory=list)
    done: bool = False


class Cache(Protocol):
    """What a scheduler needs of a cache. `request.held` is written by these methods and by nothing else."""

    @property
    def num_available(self) -> int:
        """Pages that `reserve` could hand out now."""
        ...

    def match(self, request: Request) -> int:
        """Finds and holds the longest cached prefix of the request's tokens; sets num_computed to it and returns it.

        At least the last known token is left to compute. Until `release` the request is held: matching it again raises
        CacheError.
        """
        ...

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Makes room for the next `num_tokens` after num_computed. False: no room, and nothing has changed."""
        ...

    def commit(self, request: Request, in_flight: int = 0) -> None:
        """Takes note of computed tokens; full pages may be published.

        in_flight   tokens in num_computed whose step has not come back yet
        """
        ...

    def release(self, request: Request) -> None:
        """The request holds nothing any more. Safe for a request that holds nothing."""
        ...

    def prefix_length(self, request: Request) -> int:
        """Tokens that `match` would find now. Changes nothing."""
        ...

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        ...

    def limit_chunk(self, request: Request, num_tokens: int) -> int:
        """How many of the next `num_tokens` one step may compute: a checkpoint can be taken only between two steps."""
        ...

    def request_checkpoint(self, request: Request, position: int) -> bool:
        """Asks for a checkpoint of a running request at `position`, a page boundary, for requests that share its
        first tokens. False when its state has passed the position already."""
        ...

    def drain_moves(self) -> Moves:
        """The moves listed since the last call."""
        ...


class CacheObserver(Protocol):
    """Is told what happens to the cached pages of a CacheManager. Keys are those of core/keys.py."""

    def stored(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages were published: pages[i] holds what keys[i] names, and is immutable until it is evicted."""
        ...

    def evicting(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages leave the cache and will be reused. Their bytes are there until the moves of the plan that is being
        made have run."""
        ...

"""The contract between the scheduler and a cache, and between a cache and its observers. Knows no tree and no tensors.

    match -> reserve -> (a step) -> commit -> ... -> release        the life of a request in the cache

Two classes implement Cache: CacheManager (a prefix tree over a pool) and disagg's GrantedCache (pages of another
process).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nanokv.core.request import Request


@dataclass
class Moves:
    """The work of a step before its forward pass: first the saves, then the copies, each list in its order.

    pages    (source, destination) of page copies
    states   (source, destination) of state copies
    saves    (key, page) of evicted pages: the page still holds the tokens that the key names
    done     the copies have run, so a failure of the step loses none

    A source keeps its content until its copy has run, even if it was freed meanwhile: only later copies and the forward
    pass overwrite it.
    """

    pages: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)
    saves: list[tuple[bytes, int]] = field(default_factory=list)
    done: bool = False


class Cache(Protocol):
    """The cache as the scheduler sees it. An implementation of it alone writes `request.held`."""

    @property
    def num_available(self) -> int:
        """Pages that `reserve` could allocate now."""

    def match(self, request: Request) -> int:
        """Finds and holds the longest cached prefix of the request's tokens. Sets num_computed to its tokens.

        At least the last known token is left to compute.
        Returns   num_computed
        Raises    CacheError for a request that was matched before and not released
        """

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Allocates pages for the `num_tokens` after num_computed. False: there are too few, and nothing changes."""

    def commit(self, request: Request, in_flight: int = 0) -> None:
        """Publishes full pages of computed tokens, where the cache keeps prefixes.

        in_flight   tokens in num_computed whose step is still in flight
        """

    def release(self, request: Request) -> None:
        """Ends the request's hold on pages and states. Does nothing for a request that holds none."""

    def prefix_length(self, request: Request) -> int:
        """Tokens that `match` would find now. Changes nothing."""

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""

    def limit_chunk(self, request: Request, num_tokens: int) -> int:
        """How many of the next `num_tokens` one step may compute. A step ends where a checkpoint is due: a state can be
        copied only between two steps."""

    def request_checkpoint(self, request: Request, position: int) -> bool:
        """Requests a checkpoint of a running request at `position`, a page boundary, for requests with the same first
        tokens. False where its state has passed the position."""

    def drain_moves(self) -> Moves:
        """The moves listed since the last call; the next step runs them."""


class CacheObserver(Protocol):
    """Receives the changes of a CacheManager's prefix tree. Keys are those of core/keys.py."""

    def stored(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages entered the tree: pages[i] holds the tokens that keys[i] names, and is immutable until its eviction."""

    def evicting(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Pages left the tree and will be reused. Their bytes stay until the next moves run (Moves.saves)."""

"""What an engine needs of whoever computes prompts for it elsewhere (disagg/). Knows no processes and no sockets.

    waiting --admit: match, reserve all--> running, is_remote --collect: tokens--> running
       ^                                       |  |
       |                                       |  +-- collect: nothing (the other process is gone): preempt --+
       +---------------------------------------+--------------------------------------------------------------+

`is_remote` is the state "prefilling remotely". The request's pages are quarantined: they stay its own, aborted or not,
until `collect` returns it, because until then somebody else may write into them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from nanokv.core.request import Request


@dataclass(frozen=True)
class Prefilled:
    """A request that nobody else writes for any more.

    tokens     the next token of each of its samples (None: its logits are not finite); None where nothing came of it
    logprobs   of each sample, as the sampler returns them
    """

    request: Request
    tokens: tuple[int | None, ...] | None = None
    logprobs: tuple[dict[int, float] | None, ...] = ()


class Prefiller(Protocol):
    """Computes prompts elsewhere, in pages and states of this engine's pool."""

    def allocate(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Zeroed uint8 [num_bytes] for pages and states."""

    def wants(self, request: Request, num_uncached: int) -> bool:
        """Whether the request is to be handed over rather than computed here."""

    def start(self, request: Request, checkpoints: list[tuple[int, int]]) -> None:
        """Hands a request over. Nothing that still runs reads or writes its uncached pages or its states."""

    def abort(self, request: Request) -> bool:
        """Nobody waits for this request any more. Whether it is out of the house: `collect` returns it then."""

    def collect(self, wait: bool) -> deque[Prefilled]:
        """What has come back, oldest first; `wait`: for a moment, if anything is out. The caller takes out of it what
        it has dealt with: what is left is there again next time."""

    def close(self) -> None:
        """Ends whoever writes; the next `collect` returns everything that is out."""

    def stats(self) -> dict[str, int | float]: ...

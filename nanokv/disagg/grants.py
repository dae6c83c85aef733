"""The prefill processes as the decode process knows them, and the pages that each of them may write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from nanokv.core.request import Request
from nanokv.disagg.channel import Channel
from nanokv.disagg.messages import PoolMemory, Prefill, Sampling, pack_ints


class Peer(Protocol):
    """A prefill process. `fileno` becomes readable when it is gone.

    why   it ended, where this side of it knows
    """

    name: str
    channel: Channel
    why: str | None

    def fileno(self) -> int: ...
    def kill(self) -> None: ...
    @property
    def gone(self) -> bool: ...
    def close(self) -> None: ...


@dataclass
class Grant:
    """One attempt that is out: its pages and states are quarantined."""

    request: Request
    attempt: int
    tokens: int
    since: float
    aborted: bool = False


@dataclass
class WorkerSlot:
    """One worker, started again when it has died. `peer` is None while there is none.

    memory  what HELLO tells it of the pool; None: it maps this one
    state   "starting" (HELLO not answered yet), "ready", or "terminating" (killed, not gone yet)
    since   when it was started, or became ready, time.monotonic()
    why     the last one ended
    """

    start: Callable[[], Peer]
    memory: PoolMemory | None
    peer: Peer | None = None
    state: str = "starting"
    grants: dict[int, Grant] = field(default_factory=dict)
    since: float = 0.0
    heard: float = 0.0
    deaths: int = 0
    refusal: str | None = None
    why: str = ""

    @property
    def is_elsewhere(self) -> bool:
        """On another host, where it is started and ended by others: from here it is only reached, or not."""
        return self.memory is not None


def prefill_message(request: Request, attempt: int, generation: int, checkpoints: list[tuple[int, int]]) -> Prefill:
    """PREFILL of one attempt at a request that holds pages for all its known tokens."""
    params = request.params
    sampling = Sampling(
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
        min_tokens=params.min_tokens, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos,
        logprobs=params.logprobs, repetition_penalty=params.repetition_penalty, seed=str(request.seed),
        index=request.index, samples=1 + request.num_forks,
    )  # fmt: skip
    return Prefill(
        generation=generation, request=request.request_id, attempt=attempt, tokens=pack_ints(request.tokens),
        prompt_length=request.num_prompt, cached_length=request.num_computed, pages=pack_ints(request.held.pages),
        state=request.held.state_id, checkpoints=tuple(checkpoints), sampling=sampling,
    )  # fmt: skip

"""The prefill processes of one decode process, and the pages that each of them may write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from nanokv.core.request import Request
from nanokv.disagg.channel import Channel
from nanokv.disagg.messages import PoolMemory, Prefill, Sampling, pack_ints


class Peer(Protocol):
    """A prefill process, as the decode process holds it.

    name      in log lines
    channel   of messages
    why       why it ended, where this process knows
    """

    name: str
    channel: Channel
    why: str | None

    def fileno(self) -> int:
        """A descriptor that is readable once the process is gone."""

    def kill(self) -> None:
        """Ends it. It may still write until `gone`."""

    @property
    def gone(self) -> bool:
        """Whether it can write no more."""

    def close(self) -> None:
        """Frees its descriptors. Called once, after its end."""


@dataclass
class Grant:
    """One open attempt: the pages and states of `request` are quarantined.

    tokens   to be computed
    since    when it was sent, time.monotonic()
    """

    request: Request
    attempt: int
    tokens: int
    since: float
    aborted: bool = False


@dataclass
class WorkerSlot:
    """One worker, which is started again after its death.

    name     of the worker
    start    starts the worker, or connects to it
    memory   what HELLO says about the pool to a worker of another host; None: the worker maps the pool
    peer     the worker; None between its end and the next start
    state    "starting" (HELLO is not sent), "greeted" (not answered), "ready", or "terminating" (killed, not gone)
    grants   open attempts by their number
    since    when it was greeted, or became ready, time.monotonic()
    heard    when its last message came, time.monotonic()
    deaths   in a row
    refusal  why the worker can serve none of these prompts
    why      the last worker ended
    """

    name: str
    start: Callable[[], Peer]
    memory: PoolMemory | None
    peer: Peer | None
    state: str = "starting"
    grants: dict[int, Grant] = field(default_factory=dict)
    since: float = 0.0
    heard: float = 0.0
    deaths: int = 0
    refusal: str | None = None
    why: str = ""

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is on another host, where other programs start and end it; this process connects to it."""
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
        generation=generation, request=str(request.request_id), attempt=attempt, tokens=pack_ints(request.tokens),
        prompt_length=request.num_prompt, cached_length=request.num_computed, pages=pack_ints(request.held.pages),
        state=request.held.state_id, checkpoints=tuple(checkpoints), sampling=sampling,
    )  # fmt: skip

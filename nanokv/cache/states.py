"""States: what recurrent layers keep, slot by slot: where each running request works, and the checkpoints it leaves.

A recurrent layer sums the past up in a state that moves on with every token and cannot be wound back. So a prefix can
be reused only from a position at which somebody kept a copy, a checkpoint:

    a running request    one slot that its layers move on, and one more (its tail): the copy at the last page boundary
    a node of the tree   at most one: the copy at the end of the node's run

Checkpoints go into the tree (1) where prompts branch: a request found more pages than state and computes the difference
again, or another one waits for the prefix it computes; (2) at the last page boundary of the prompt; (3) at that of the
answer, when the request lets go; (4) every `interval` tokens. The first, second and last end a prefill chunk: a state
can be copied only between steps. States leave the tree least recently used first, and with the pages they stand on;
pages stay behind when a state goes.

A checkpoint is copied when the next step is planned, before the state moves on, and filed in the tree when the pages up
to it are published. Where a step is still on its way that comes later: until then the copy waits as the tail.

Copies are listed and run in order before the next step. In this order each source still holds what it held when its
copy was listed: who gets a freed slot writes into it later. No request ever waits for a slot: each may have two, and
the engine runs at most half as many requests as there are slots. A codec that writes a page when it is full keeps the
unfinished page of each request in a slot, too; that is empty at page boundaries and needs none of the above.
Source: the state checkpoints of SGLang's MambaRadixCache and of vLLM's aligned mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nanokv.cache.pool import StatePool
from nanokv.cache.radix import Node, RadixTree
from nanokv.core.errors import CacheError
from nanokv.core.request import Request

NUM_LENT = 2
"""Checkpoints that a request may have in the making in another process: they cannot be evicted, so few."""


@dataclass
class Recurrence:
    """What a request holds here.

    slot      the state its layers move on; it stands at num_computed
    tail      the slot of its latest private checkpoint, or None
    tail_at   position of that checkpoint
    wanted    positions at which a checkpoint for the tree is to be taken, page boundaries
    lent      position -> slot of the checkpoints that another process takes; None where this one computes
    """

    slot: int
    tail: int | None = None
    tail_at: int = 0
    wanted: set[int] = field(default_factory=set)
    lent: dict[int, int] | None = None


class States:
    """Slots for requests and for nodes of the tree.

    num_states   slots in all
    page_size    tokens in a page: checkpoints stand at its multiples
    interval     tokens between further checkpoints, or None
    recurrent    False: states hold only what belongs to unfinished pages and are empty at every page boundary; then
                 requests start anywhere, and no checkpoint is taken
    """

    def __init__(
        self, num_states: int, page_size: int, interval: int | None, tree: RadixTree, recurrent: bool = True
    ) -> None:
        self._recurrent = recurrent
        self.num_evictions = 0
        self._pool = StatePool(num_states)
        self._page_size = page_size
        self._interval = interval
        self._tree = tree
        self._cached: dict[Node, int] = {}  # node -> its state, least recently used first
        self._copies: list[tuple[int, int]] = []

    # -- for the manager

    def reachable(self, node: Node) -> Node:
        """The deepest node on the way up that has a state: where a request may start; a root when there is none."""
        while self._recurrent and node.parent is not None and node.state is None:
            node = node.parent
        return node

    def open(self, request: Request, node: Node, branch: int) -> None:
        """A slot for a request that starts at `node`, with a copy of the node's state if it has one.

        branch   tokens whose pages were found, beyond the node perhaps: a checkpoint will be taken there
        """
        source = node.state
        if source is not None:
            self._cached[node] = self._cached.pop(node)  # used just now
        slot = self._begin(request, branch)
        if source is not None and source != slot:  # with very few slots the node's own becomes the request's
            self._copies.append((source, slot))

    def chunk(self, request: Request, num_tokens: int) -> int:
        """How many of the next `num_tokens` to compute in one step, so that it ends where a checkpoint is due."""
        if not self._recurrent:
            return num_tokens
        start, size = request.num_computed, self._page_size
        stops = {*request.recurrence.wanted, (request.num_tokens - 1) // size * size}
        if self._interval is not None:
            stops.add((start // self._interval + 1) * self._interval)
        return min([num_tokens, *(stop - start for stop in stops if stop > start)])

    def expect(self, request: Request, position: int) -> bool:
        """Somebody will want to start at `position` of this request's tokens; False when it has moved past."""
        if not self._recurrent:
            return True
        if request.num_computed > position:
            return False
        if request.recurrence.lent is not None:
            return position in request.recurrence.lent  # too late to ask for more
        request.recurrence.wanted.add(position)
        return True

    def capture(self, request: Request) -> None:
        """Before a step moves the state on: copies it where it stands at a page boundary. `settle` files the copy."""
        position, held = request.num_computed, request.recurrence
        if not self._recurrent or position == 0 or position % self._page_size:
            return
        if self._ends_at(request, position) and request.node.state is not None:
            held.wanted.discard(position)
            return
        held.tail = held.tail if held.tail is not None else self._slot()
        if held.tail is not None:
            held.tail_at = position
            self._copies.append((held.slot, held.tail))
            self.settle(request)

    def settle(self, request: Request) -> None:
        """Hands the tail over to the tree where it is meant for it, once the pages up to there are published."""
        held = request.recurrence
        at = held.tail_at
        if held.tail is None or not self._ends_at(request, at) or not self._is_kept(request, at):
            return
        held.wanted.discard(at)
        if request.node.state is None:
            self._attach(request.node, held.tail)
            held.tail = None

    def lend(self, request: Request) -> dict[int, int]:
        """Slots for the checkpoints that another process is to take while it computes all known tokens.

        The end of the prompt first, which the next turn starts from, then the deepest other one; as many as there are
        slots for.
        """
        start, end, size = request.num_computed, request.num_tokens, self._page_size
        if not self._recurrent:
            start = end  # nothing between the pages: a tail is empty there
        ends = {(request.num_prompt - 1) // size * size}
        others = set(request.recurrence.wanted)
        if self._interval is not None:
            others |= set(range(self._interval, end, self._interval))
        order = [*ends, *sorted(others - ends, reverse=True)]
        lent: dict[int, int] = {}
        for position in [position for position in order if start < position < end][:NUM_LENT]:
            if (slot := self._slot()) is not None:
                lent[position] = slot
        request.recurrence.lent = lent
        return lent

    def take_lent(self, request: Request) -> dict[int, int]:
        """The same, written by now: the caller brings each to its node with `place`."""
        lent, request.recurrence.lent = request.recurrence.lent or {}, None
        return lent

    def place(self, node: Node, slot: int) -> None:
        """A checkpoint for `node`, at whose end it stands; free again where the node has one."""
        if node.state is None and node.parent is not None:
            self._attach(node, slot)
        else:
            self._pool.release(slot)

    def fork(self, parent: Request, child: Request) -> None:
        """A slot for `child` with a copy of the parent's state. Raises CacheError where the child ends before it."""
        if child.num_computed != parent.num_computed:
            raise CacheError(f"{child} ends before {parent}, and a state cannot be wound back")
        self._begin(child, child.num_computed)
        self._copies.append((parent.recurrence.slot, child.recurrence.slot))

    def release(self, request: Request) -> None:
        """Gives the slots back; one that stands where the request's published pages end stays in the tree.

        The slot that moves is trusted only between steps: one that failed halfway may have torn it, here or elsewhere.
        """
        held, request.recurrence, request.state_id = request.recurrence, None, None
        is_whole = self._recurrent and request.num_scheduled == 0 and held.lent is None
        slots = {held.slot: request.num_computed if is_whole else None}
        if held.tail is not None:
            slots[held.tail] = held.tail_at
        for slot, position in slots.items():
            if position and self._ends_at(request, position) and request.node.state is None:
                self._attach(request.node, slot)
            else:
                self._pool.release(slot)
        for slot in (held.lent or {}).values():
            self._pool.release(slot)

    def drop(self, nodes: Iterable[Node]) -> None:
        """Frees the states of nodes whose last pages are gone."""
        for node in nodes:
            self._pool.release(self._cached.pop(node))
            node.state = None

    def lose(self, lost: set[int], requests: Iterable[Request]) -> None:
        """Forgets the checkpoints in these slots, of nodes and of requests; the slots are free again."""
        self.drop([node for node, state in self._cached.items() if state in lost])
        for request in requests:
            held = request.recurrence
            if held.tail in lost:
                self._pool.release(held.tail)
                held.tail = None

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies (src, dst) listed since the last call: to run in this order, before the step's forward pass."""
        copies, self._copies = self._copies, []
        return copies

    def stats(self) -> dict[str, int]:
        return {
            "states_total": self._pool.num_states,
            "states_free": self._pool.num_free,
            "states_held": self._pool.num_states - self._pool.num_free - len(self._cached),
            "states_cached": len(self._cached),
            "state_evictions": self.num_evictions,
        }

    def check(self, requests: Iterable[Request]) -> None:
        """Recounts every slot. Raises CacheError where the books disagree."""
        owned = [request.recurrence.slot for request in requests]
        owned += [request.recurrence.tail for request in requests if request.recurrence.tail is not None]
        owned += [slot for request in requests for slot in (request.recurrence.lent or {}).values()]
        in_tree = {node: node.state for node in self._tree.nodes() if node.state is not None}
        if in_tree != self._cached:
            raise CacheError("the tree and the list of cached states disagree")
        self._pool.check([*owned, *in_tree.values()])

    # -- inside

    def _begin(self, request: Request, branch: int) -> int:
        slot = self._slot()
        if slot is None:
            raise CacheError(f"{request} gets no state: more requests run than half the number of states")
        request.recurrence, request.state_id = Recurrence(slot, wanted={branch}), slot
        return slot

    def _ends_at(self, request: Request, position: int) -> bool:
        """Whether the request's published pages end at `position`, and so at a node of the tree."""
        return request.num_published * self._page_size == position and request.node.parent is not None

    def _is_kept(self, request: Request, position: int) -> bool:
        """Whether a checkpoint at this boundary is for the tree, rather than the tail that the next replaces."""
        prompt_end = (request.num_prompt - 1) // self._page_size * self._page_size
        every = self._interval is not None and position % self._interval == 0
        return every or position == prompt_end or position in request.recurrence.wanted

    def _slot(self) -> int | None:
        """A free slot, or that of the state of the tree that was used longest ago; None when all are in use."""
        if not self._pool.num_free and self._cached:
            self.drop([next(iter(self._cached))])
            self.num_evictions += 1
        return self._pool.allocate()

    def _attach(self, node: Node, slot: int) -> None:
        node.state = slot
        self._cached[node] = slot

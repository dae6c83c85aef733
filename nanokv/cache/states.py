"""States: the slots of recurrent states: one for each running request, and checkpoints in the prefix tree.

A recurrent state is updated in place with every token and cannot be rolled back. So a prefix can be reused only from a
position at which a copy was kept, a checkpoint:

    a running request    one slot that its layers update, and at most one checkpoint, at the last page boundary
    a node of the tree   at most one checkpoint, at the end of the node

Checkpoints enter the tree (1) where prompts branch: a request found more pages than state and computes the difference
again, or another request waits for the prefix that it computes; (2) at the last page boundary of the prompt; (3) at
that of the answer, when the request is released; (4) every `interval` tokens. The first, second and last end a prefill
chunk: a state can be copied only between steps. States are evicted least recently used first, or with the last pages of
their node; evicting a state leaves its pages.

A checkpoint is copied when the next step is planned, before the step updates the state. It is filed in the tree when
the pages up to it are published, which a step in flight delays: until then the request keeps the copy.

Copies are listed and run in order before the next step (contract.Moves). No request waits for a slot: each may have
two, and the engine runs at most half as many requests as there are slots. A codec that writes whole pages only keeps
the partial page of each request in a slot, too; it is empty at page boundaries and needs no checkpoint.
Source: the state checkpoints of SGLang's MambaRadixCache and of vLLM's aligned mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nanokv.cache.node import Node
from nanokv.cache.pool import StatePool
from nanokv.cache.radix import RadixTree
from nanokv.core.errors import CacheError
from nanokv.core.request import Request

MAX_RESERVED = 2
"""Most checkpoints that a connector writes for one request: they cannot be evicted during the transfer."""


@dataclass
class Recurrence:
    """The slots of one request.

    slot            the state that its layers update, at num_computed
    checkpoint      the slot of its latest private checkpoint, or None
    checkpoint_at   position of that checkpoint
    wanted          page boundaries at which a checkpoint for the tree will be taken
    reserved        position -> slot of the checkpoints that a connector writes; None outside a transfer
    """

    slot: int
    checkpoint: int | None = None
    checkpoint_at: int = 0
    wanted: set[int] = field(default_factory=set)
    reserved: dict[int, int] | None = None


class States:
    """Slots of requests and of nodes of the tree.

    num_states   slots in the pool
    page_size    tokens in a page: checkpoints are taken at its multiples
    interval     tokens between further checkpoints, or None
    tree         the RadixTree whose nodes carry checkpoints
    recurrent    False: states hold partial pages alone and are empty at every page boundary; then requests start
                 anywhere, and no checkpoint is taken
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
        """The deepest node from `node` up that has a state, where a request may start; the root without one."""
        while self._recurrent and node.parent is not None and node.state is None:
            node = node.parent
        return node

    def open(self, request: Request, node: Node, branch: int) -> None:
        """Allocates the slot of a request that starts at `node`, and lists the copy of the node's state.

        branch   tokens whose pages were found, at the node or beyond: a checkpoint will be taken there
        Raises   CacheError where all slots belong to requests
        """
        source = node.state
        if source is not None:
            self._cached[node] = self._cached.pop(node)  # most recently used
        slot = self._begin(request, branch)
        if source is not None and source != slot:  # with very few slots the node's own becomes the request's
            self._copies.append((source, slot))

    def limit_chunk(self, request: Request, num_tokens: int) -> int:
        """How many of the next `num_tokens` one step may compute, so that it ends where a checkpoint is due."""
        if not self._recurrent:
            return num_tokens
        start, size = request.num_computed, self._page_size
        stops: set[int] = {*request.held.recurrence.wanted, (request.num_tokens - 1) // size * size}
        if self._interval is not None:
            stops.add((start // self._interval + 1) * self._interval)
        return min([num_tokens, *(stop - start for stop in stops if stop > start)])

    def request_checkpoint(self, request: Request, position: int) -> bool:
        """Requests a checkpoint at `position` of a running request. False where its state has passed the position."""
        if not self._recurrent:
            return True
        if request.num_computed > position:
            return False
        if request.held.recurrence.reserved is not None:
            return position in request.held.recurrence.reserved  # a transfer has begun: its checkpoints are fixed
        request.held.recurrence.wanted.add(position)
        return True

    def capture(self, request: Request) -> None:
        """Lists a copy of the state at a page boundary, before the next step updates it, and files it if possible."""
        position, held = request.num_computed, request.held.recurrence
        if not self._recurrent or position == 0 or position % self._page_size:
            return
        if self._ends_at(request, position) and request.held.node.state is not None:
            held.wanted.discard(position)
            return
        held.checkpoint = held.checkpoint if held.checkpoint is not None else self._slot()
        if held.checkpoint is not None:
            held.checkpoint_at = position
            self._copies.append((held.slot, held.checkpoint))
            self.file_checkpoint(request)

    def file_checkpoint(self, request: Request) -> None:
        """Moves the request's checkpoint into the tree, if it belongs there and the pages up to it are published."""
        held = request.held.recurrence
        at = held.checkpoint_at
        if held.checkpoint is None or not self._ends_at(request, at) or not self._is_kept(request, at):
            return
        held.wanted.discard(at)
        if request.held.node.state is None:
            self._attach(request.held.node, held.checkpoint)
            held.checkpoint = None

    def reserve_checkpoints(self, request: Request, upto: int) -> dict[int, int]:
        """Reserves slots for the checkpoints that a connector writes between num_computed and `upto`.

        The end of the prompt comes first, where the next turn starts, then the deepest others; at most MAX_RESERVED,
        and as many as there are free slots.
        Returns   position -> slot
        """
        held: Recurrence = request.held.recurrence
        start, size = request.num_computed, self._page_size
        if not self._recurrent:
            start = upto  # a partial page is empty at every boundary
        ends = {(request.num_prompt - 1) // size * size}
        others = set(held.wanted)
        if self._interval is not None:
            others |= set(range(self._interval, upto, self._interval))
        order = [*ends, *sorted(others - ends, reverse=True)]
        held.reserved = {}
        for position in [position for position in order if start < position < upto][:MAX_RESERVED]:
            if (slot := self._slot()) is not None:
                held.reserved[position] = slot
        return held.reserved

    def take_reserved(self, request: Request, upto: int) -> dict[int, int]:
        """Ends a reservation of which positions up to `upto` were reached; frees the other slots.

        Returns position -> slot. The caller gives each slot to its node with `attach`.
        """
        held: Recurrence = request.held.recurrence
        reserved, held.reserved = held.reserved or {}, None
        for position in [position for position in reserved if position > upto]:
            self._pool.release(reserved.pop(position))
        return reserved

    def attach(self, node: Node, slot: int) -> None:
        """Gives `node` the checkpoint in `slot`; frees the slot where the node has a checkpoint already."""
        if node.state is None and node.parent is not None:
            self._attach(node, slot)
        else:
            self._pool.release(slot)

    def fork(self, parent: Request, child: Request) -> None:
        """Allocates a slot for `child` and lists the copy of the parent's state.

        Raises CacheError where the child has fewer computed tokens: a state cannot be rolled back.
        """
        if child.num_computed != parent.num_computed:
            raise CacheError(f"{child} ends before {parent}, and a state cannot be rolled back")
        self._begin(child, child.num_computed)
        self._copies.append((parent.held.recurrence.slot, child.held.recurrence.slot))

    def release(self, request: Request) -> None:
        """Frees the request's slots. A state at the end of its published pages stays in the tree.

        The slot that layers update is valid only between steps: a step that failed may have updated some layers alone.
        """
        held: Recurrence | None = request.held.recurrence
        if held is None:  # `open` has failed: it found no slot
            return
        request.held.recurrence, request.held.state_id = None, None
        is_whole = self._recurrent and request.num_scheduled == 0 and held.reserved is None
        slots = {held.slot: request.num_computed if is_whole else None}
        if held.checkpoint is not None:
            slots[held.checkpoint] = held.checkpoint_at
        for slot, position in slots.items():
            if position and self._ends_at(request, position) and request.held.node.state is None:
                self._attach(request.held.node, slot)
            else:
                self._pool.release(slot)
        for slot in (held.reserved or {}).values():
            self._pool.release(slot)

    def drop(self, nodes: Iterable[Node]) -> None:
        """Frees the states of these nodes."""
        for node in nodes:
            self._pool.release(self._cached.pop(node))
            node.state = None

    def lose(self, lost: set[int], requests: Iterable[Request]) -> None:
        """Frees the slots `lost`, checkpoints of nodes and of requests, whose copies were never made."""
        self.drop([node for node, state in self._cached.items() if state in lost])
        for request in requests:
            held = request.held.recurrence
            if held.checkpoint in lost:
                self._pool.release(held.checkpoint)
                held.checkpoint = None

    def restart(self, requests: Iterable[Request]) -> None:
        """Frees every slot but those of these requests."""
        self._cached, self._copies = {}, []
        self._pool.restart(self._owned(requests))

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies (source, destination) listed since the last call, in the order in which they run."""
        copies, self._copies = self._copies, []
        return copies

    def stats(self) -> dict[str, int]:
        """Slots by owner, and evictions (core/stats.py)."""
        return {
            "states_total": self._pool.num_states,
            "states_free": self._pool.num_free,
            "states_held": self._pool.num_states - self._pool.num_free - len(self._cached),
            "states_cached": len(self._cached),
            "state_evictions": self.num_evictions,
        }

    def check(self, requests: Iterable[Request]) -> None:
        """Recounts every slot from these live requests and the tree. Raises CacheError for a difference."""
        in_tree = {node: node.state for node in self._tree.nodes() if node.state is not None}
        if in_tree != self._cached:
            raise CacheError("the tree and the list of cached states disagree")
        self._pool.check([*self._owned(requests), *in_tree.values()])

    # -- inside

    def _owned(self, requests: Iterable[Request]) -> list[int]:
        owned: list[int] = []
        for request in requests:
            held: Recurrence = request.held.recurrence
            owned += [held.slot, *([] if held.checkpoint is None else [held.checkpoint])]
            owned += (held.reserved or {}).values()
        return owned

    def _begin(self, request: Request, branch: int) -> int:
        slot = self._slot()
        if slot is None:
            raise CacheError(f"{request} gets no state: more requests run than half the number of states")
        request.held.recurrence, request.held.state_id = Recurrence(slot, wanted={branch}), slot
        return slot

    def _ends_at(self, request: Request, position: int) -> bool:
        """Whether the request's published pages end at `position`, and so at a node of the tree."""
        return request.held.num_published * self._page_size == position and request.held.node.parent is not None

    def _is_kept(self, request: Request, position: int) -> bool:
        """Whether a checkpoint at this boundary is for the tree, rather than one that the next replaces."""
        prompt_end = (request.num_prompt - 1) // self._page_size * self._page_size
        every = self._interval is not None and position % self._interval == 0
        return every or position == prompt_end or position in request.held.recurrence.wanted

    def _slot(self) -> int | None:
        """A free slot, or that of the tree's least recently used state; None where requests hold all slots."""
        if not self._pool.num_free and self._cached:
            self.drop([next(iter(self._cached))])
            self.num_evictions += 1
        return self._pool.allocate()

    def _attach(self, node: Node, slot: int) -> None:
        node.state = slot
        self._cached[node] = slot

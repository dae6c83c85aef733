"""Pages between hosts: gathered, sent on the connection of the messages, scattered into the other pool.

    prefill process                                    decode process
    PageSender: Slots.read -> LAYERS, then bytes --->  PageReceiver: LAYERS -> bytes -> Slots.write

The bytes of layers follow the frame of LAYERS, so no second port is open and no second connection needs a proof of
its own. Layers travel in groups while later layers are still being computed: the socket takes what it has room for,
and the rest at the next message. DONE comes behind the pages that it reports, and counts
only if every layer of every page has come. The pages of a GPU pass through the memory of the host.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from nanokv.cache.store import CacheStore, Slots
from nanokv.disagg.channel import Channel
from nanokv.disagg.messages import Layers, ProtocolError, unpack_ints

GROUP_BYTES = 4 << 20
"""Layers are sent as soon as they have this size: large enough for full speed, small enough to overlap with compute."""
MAX_UNSENT = 8 * GROUP_BYTES
"""Bytes that wait to be sent, beyond which the sender waits for the receiver."""


def bind(address: tuple[str, int]) -> socket.socket:
    """Listens at (host, port), an address of this host, IPv4 or IPv6. Raises OSError where it cannot."""
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server(address, family=family)


def _slots(store: CacheStore, layers: Layers) -> Slots:
    return store.states if layers.states else store.pages


def _buffer(free: list[torch.Tensor], size: int) -> torch.Tensor:
    """uint8, at least `size` bytes. One of `free`, if possible: fresh memory costs a page fault every 4 KiB."""
    buffer = free.pop() if free else None
    return torch.empty(size, dtype=torch.uint8) if buffer is None or buffer.numel() < size else buffer


class PageSender:
    """The side of the prefill process.

    channel   to the decode process
    store     whose pages and states are sent
    announce  sends LAYERS
    seconds   for which the decode process may read nothing, when much is waiting
    """

    def __init__(self, channel: Channel, store: CacheStore, announce: Callable[[Layers], None], seconds: float) -> None:
        self._channel = channel
        self._store = store
        self._announce = announce
        self._seconds = seconds
        self._pending: deque[tuple[int, torch.Tensor]] = deque()  # what the channel has sent by then, buffer
        self._free: list[torch.Tensor] = []

    def send(self, layers: Layers, ids: Sequence[int]) -> None:
        """Sends layers of pages or states `ids` of this pool to `layers.places` of the other.

        Raises UnreadError where the decode process reads nothing for too long.
        """
        slots = _slots(self._store, layers)
        size = len(ids) * slots.width(layers.first, layers.last)
        if not size:
            return
        self._channel.drain(MAX_UNSENT, self._seconds)
        while self._pending and self._pending[0][0] <= self._channel.sent:
            self._free.append(self._pending.popleft()[1])
        buffer = _buffer(self._free, size)
        if self._store.device.type == "cpu":
            slots.read(ids, layers.first, layers.last, buffer)
        else:
            buffer[:size].copy_(slots.read(ids, layers.first, layers.last).view(-1))
        self._announce(layers)
        self._channel.send_bytes(buffer.numpy().data[:size])
        self._pending.append((self._channel.queued, buffer))


class Arrivals:
    """Which layers of the pages and states of one attempt have come.

    pages, states   ids that were granted to the attempt
    """

    def __init__(self, pages: Iterable[int], states: Iterable[int], store: CacheStore) -> None:
        self._kinds = [self._none_of(pages, store.pages, store), self._none_of(states, store.states, store)]

    @staticmethod
    def _none_of(places: Iterable[int], slots: Slots, store: CacheStore) -> tuple[dict[int, int], np.ndarray]:
        rows = {place: row for row, place in enumerate(places)}
        layers = range(store.layout.num_layers)
        empty = [slots.width(layer, layer + 1) == 0 for layer in layers] if rows else []  # nothing of them is sent
        return rows, np.tile(np.array(empty, bool), (len(rows), 1))

    def add(self, layers: Layers) -> None:
        """Notes what a message brings. Raises ProtocolError for places that were not granted."""
        rows, arrived = self._kinds[layers.states]
        places = unpack_ints(layers.places)
        if not rows.keys() >= set(places):
            raise ProtocolError("LAYERS for places that were not granted to that attempt")
        arrived[[rows[place] for place in places], layers.first : layers.last] = True

    @property
    def are_complete(self) -> bool:
        return all(arrived.all() for _, arrived in self._kinds)


class PageReceiver:
    """The side of the decode process.

    channel   to the prefill process
    store     whose pages and states are written
    seconds   for which the bytes behind LAYERS may stand still
    """

    def __init__(self, channel: Channel, store: CacheStore, seconds: float) -> None:
        self._channel = channel
        self._store = store
        self._seconds = seconds
        self._buffers: list[torch.Tensor] = []

    def receive(self, layers: Layers, tick: Callable[[bool], None]) -> None:
        """Reads the bytes behind LAYERS and writes them into the pool.

        tick     called at least every second, with whether bytes have come
        Raises   ProtocolError for layers or places that do not exist, EOFError where the other side is gone
        """
        places, store = unpack_ints(layers.places), self._store
        slots = _slots(store, layers)
        if not 0 <= layers.first < layers.last <= store.layout.num_layers:
            raise ProtocolError(f"LAYERS {layers.first} to {layers.last} of {store.layout.num_layers}")
        if not places or not 0 <= min(places) <= max(places) < len(slots) or len(set(places)) != len(places):
            raise ProtocolError("LAYERS names places that do not exist")
        width = slots.width(layers.first, layers.last)
        buffer = _buffer(self._buffers, len(places) * width)
        data = buffer[: len(places) * width]
        self._channel.read_into(data.numpy().data, self._seconds, tick)
        slots.write(places, data.view(len(places), width), layers.first, layers.last)
        self._buffers.append(buffer)

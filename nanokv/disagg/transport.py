"""Pages between hosts: gathered, sent point to point by torch.distributed, scattered into the other pool.

Each pair of processes has a group of two ranks and a TCPStore of its own, so the death of a rank affects no other pair.
The prefill process is rank 0 and keeps the TCPStore. Gloo over TCP for pools on a CPU, NCCL for pools on a GPU (not
tested yet: it needs two of them). Neither encrypts: trusted networks only.

LAYERS on the control connection announces each send, in the same order, so that the receiver posts receives of the
right size. Layers travel in groups while later layers are still being computed.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanokv.cache.store import CacheStore, Slots
from nanokv.disagg.messages import Layers, ProtocolError, unpack_ints

GROUP_BYTES = 4 << 20
"""Layers are sent as soon as they have this size: large enough for full speed, small enough to overlap with compute."""
MAX_PENDING = 8
"""Sends in flight, beyond which the sender waits for the oldest."""


def bind(address: tuple[str, int]) -> socket.socket:
    """Listens at (host, port), an address of this host, IPv4 or IPv6. Raises OSError where it cannot."""
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server(address, family=family)


def open_store(host: str, seconds: float) -> dist.TCPStore:
    """Rank 0's side of a rendezvous, at an address of this host, on a free port (`.port`).

    seconds   limit of each operation on it
    """
    # A TCPStore that binds by itself listens on every interface.
    with bind((host, 0)) as server:
        port = server.getsockname()[1]
        return dist.TCPStore(
            host, port, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds),
            master_listen_fd=server.detach(),
        )  # fmt: skip


def join_store(host: str, port: int, seconds: float) -> dist.TCPStore:
    """Rank 1's side. Raises RuntimeError where no rank 0 answers within `seconds`."""
    return dist.TCPStore(host, port, 2, is_master=False, timeout=timedelta(seconds=seconds))


def join_group(
    store: dist.TCPStore, rank: int, device: torch.device, address: str, seconds: float
) -> dist.ProcessGroup:
    """The group of two; returns when both have joined. Raises RuntimeError where the other rank does not.

    address   of the interface that faces the other host
    seconds   after which a send or receive without progress fails
    """
    backend: Any  # for torch's stubs it has no such options and is no ProcessGroup
    if device.type == "cuda":
        backend = dist.ProcessGroupNCCL
        options = backend.Options()
    else:
        backend = dist.ProcessGroupGloo
        options = backend._Options()
        options._devices = [backend.create_device(hostname=address)]
    options._timeout = timedelta(seconds=seconds)
    return backend(store, rank, 2, options)


@contextlib.contextmanager
def _peer_may_be_gone() -> Iterator[None]:
    """Raises EOFError for what a send raises: the peer is gone, and no step has failed."""
    try:
        yield
    except RuntimeError as error:
        raise EOFError(f"the data connection broke: {error}") from None


def _slots(store: CacheStore, layers: Layers) -> Slots:
    return store.states if layers.states else store.pages


def _buffer(free: list[torch.Tensor], size: int, device: torch.device) -> torch.Tensor:
    """uint8, at least `size` bytes. One of `free`, if possible: fresh memory costs a page fault every 4 KiB."""
    buffer = free.pop() if free else None
    if buffer is None or buffer.numel() < size:
        return torch.empty(size, dtype=torch.uint8, device=device)
    return buffer


class PageSender:
    """The side of the prefill process.

    group      from `join_group`
    store      whose pages and states are sent
    announce   sends LAYERS
    """

    def __init__(self, group: dist.ProcessGroup, store: CacheStore, announce: Callable[[Layers], None]) -> None:
        self._group = group
        self._store = store
        self._announce = announce
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._free: list[torch.Tensor] = []

    def send(self, layers: Layers, ids: Sequence[int]) -> None:
        """Sends layers of pages or states `ids` of this pool to `layers.places` of the other. Raises EOFError where the
        other side is gone."""
        slots = _slots(self._store, layers)
        size = len(ids) * slots.width(layers.first, layers.last)
        if not size:
            return
        self.drain(MAX_PENDING - 1)
        buffer = _buffer(self._free, size, self._store.device)
        data = slots.read(ids, layers.first, layers.last, buffer)
        self._announce(layers)
        with _peer_may_be_gone():
            self._pending.append((self._group.send([data], 1, 0), buffer))

    def drain(self, pending: int = 0) -> None:
        """Waits until at most `pending` sends are left. Raises EOFError where the other side is gone."""
        while len(self._pending) > pending:
            work, buffer = self._pending.popleft()
            with _peer_may_be_gone():
                work.wait()
            self._free.append(buffer)


class PageReceiver:
    """The side of the decode process.

    group   from `join_group`
    store   whose pages and states are written
    """

    def __init__(self, group: dist.ProcessGroup, store: CacheStore) -> None:
        self._group = group
        self._store = store
        self._pending: deque[tuple[dist.Work, torch.Tensor, torch.Tensor, Layers]] = deque()
        self._free: list[torch.Tensor] = []

    def post(self, layers: Layers) -> None:
        """Posts the receive of what LAYERS announces, so that it arrives while earlier layers are written.

        Raises ProtocolError for layers or places that do not exist, RuntimeError where the other side is gone.
        """
        places, store = unpack_ints(layers.places), self._store
        slots = _slots(store, layers)
        if not 0 <= layers.first < layers.last <= store.layout.num_layers:
            raise ProtocolError(f"LAYERS {layers.first} to {layers.last} of {store.layout.num_layers}")
        width = slots.width(layers.first, layers.last)
        if not places or not 0 <= min(places) <= max(places) < len(slots) or len(set(places)) != len(places):
            raise ProtocolError("LAYERS names places that do not exist")
        self.drain(MAX_PENDING - 1)
        size = len(places) * width
        buffer = _buffer(self._free, size, store.device)
        work = self._group.recv([buffer[:size]], 0, 0)
        self._pending.append((work, buffer, buffer[:size].view(len(places), width), layers))

    def drain(self, pending: int = 0) -> None:
        """Writes what has arrived into the pool, oldest first, until `pending` receives are left. Raises RuntimeError
        where the other side is gone."""
        while len(self._pending) > pending:
            work, buffer, data, layers = self._pending.popleft()
            work.wait()
            _slots(self._store, layers).write(unpack_ints(layers.places), data, layers.first, layers.last)
            self._free.append(buffer)

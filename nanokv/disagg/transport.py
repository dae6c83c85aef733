"""Pages between hosts: gathered, sent point to point by torch.distributed, scattered into the other pool.

One group of two ranks for each pair of processes, with a store of its own: a rank that dies takes down no other pair.
The prefill process is rank 0 and keeps the store. Gloo over TCP for pools on a CPU, NCCL for pools on a GPU (not tested
yet: it needs two of them). Trusted networks only: neither encrypts.

What is sent is announced first by LAYERS on the control connection, in the same order, so that the receiver posts
receives of the right size. Layers travel in groups while later layers are still being computed.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from nanokv.cache.store import CacheStore, Slots
from nanokv.disagg.messages import Layers, ProtocolError, unpack_ints

GROUP_BYTES = 4 << 20
"""Layers are sent as soon as this much is there: large enough for full speed, small enough to overlap with compute."""
MAX_PENDING = 8
"""Sends in the air before the sender waits for the oldest."""


def bind(address: tuple[str, int]) -> socket.socket:
    """Listens at an address of this host, IPv4 or IPv6. Raises OSError where it cannot be had."""
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server(address, family=family)


def open_store(host: str, seconds: float) -> dist.TCPStore:
    """Rank 0's side of a rendezvous, at an address of this host, on a port of its own choice (`.port`)."""
    # A TCPStore that binds by itself listens on every interface.
    with bind((host, 0)) as server:
        port = server.getsockname()[1]
        return dist.TCPStore(
            host, port, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds),
            master_listen_fd=server.detach(),
        )  # fmt: skip


def join_store(host: str, port: int, seconds: float) -> dist.TCPStore:
    return dist.TCPStore(host, port, 2, is_master=False, timeout=timedelta(seconds=seconds))


def join_group(
    store: dist.TCPStore, rank: int, device: torch.device, address: str, seconds: float
) -> dist.ProcessGroup:
    """The group of two; returns when both are there. Raises RuntimeError where the other does not come.

    address   of the interface that faces the other host
    seconds   after which a send or receive that makes no progress fails
    """
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=seconds)
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupGloo(store, rank, 2, options)


@contextlib.contextmanager
def _peer_may_be_gone() -> Iterator[None]:
    """What a send raises, as the EOFError that it means: no step has failed."""
    try:
        yield
    except RuntimeError as error:
        raise EOFError(f"the data connection broke: {error}") from None


def _slots(store: CacheStore, layers: Layers) -> Slots:
    return store.states if layers.states else store.pages


class PageSender:
    """Prefill's side. `announce` sends LAYERS."""

    def __init__(self, group: dist.ProcessGroup, store: CacheStore, announce: Callable[[Layers], None]) -> None:
        self._group = group
        self._store = store
        self._announce = announce
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._buffers: list[torch.Tensor] = []  # used before and free: fresh memory costs a page fault every 4 KiB

    def send(self, layers: Layers, ids: Sequence[int]) -> None:
        """Sends what LAYERS announces: pages or states of this pool to `layers.places` of the other. Raises EOFError,
        as `drain` does."""
        slots = _slots(self._store, layers)
        buffer = self._buffer(len(ids) * slots.width(layers.first, layers.last))
        data = slots.read(ids, layers.first, layers.last, buffer)
        if not data.numel():
            return
        self._announce(layers)
        with _peer_may_be_gone():
            self._pending.append((self._group.send([data], 1, 0), buffer))

    def drain(self, pending: int = 0) -> None:
        """Returns when all but `pending` sends are on their way. Raises EOFError where the other side is gone."""
        while len(self._pending) > pending:
            work, buffer = self._pending.popleft()
            with _peer_may_be_gone():
                work.wait()
            self._buffers.append(buffer)

    def _buffer(self, size: int) -> torch.Tensor:
        """uint8, at least `size` bytes, that no send reads any more."""
        self.drain(MAX_PENDING - 1)
        buffer = self._buffers.pop() if self._buffers else None
        if buffer is None or buffer.numel() < size:
            return torch.empty(size, dtype=torch.uint8, device=self._store.device)
        return buffer


class PageReceiver:
    """Decode's side."""

    def __init__(self, group: dist.ProcessGroup, store: CacheStore) -> None:
        self._group = group
        self._store = store
        self._pending: deque[tuple[dist.Work, torch.Tensor, torch.Tensor, Layers]] = deque()
        self._buffers: list[torch.Tensor] = []

    def post(self, layers: Layers) -> None:
        """Posts the receive of what was announced, so that it arrives while earlier layers are written. Raises
        ProtocolError, and what `drain` raises."""
        places, store = unpack_ints(layers.places), self._store
        slots = _slots(store, layers)
        if not 0 <= layers.first < layers.last <= store.layout.num_layers:
            raise ProtocolError(f"LAYERS {layers.first} to {layers.last} of {store.layout.num_layers}")
        width = slots.width(layers.first, layers.last)
        if not places or not 0 <= min(places) <= max(places) < len(slots) or len(set(places)) != len(places):
            raise ProtocolError("LAYERS names places that are not there")
        self.drain(MAX_PENDING - 1)
        size = len(places) * width
        buffer = self._buffers.pop() if self._buffers else None
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=store.device)
        work = self._group.recv([buffer[:size]], 0, 0)
        self._pending.append((work, buffer, buffer[:size].view(len(places), width), layers))

    def drain(self, pending: int = 0) -> None:
        """Writes what was posted, oldest first, all but the last `pending`. Raises RuntimeError (peer gone)."""
        while len(self._pending) > pending:
            work, buffer, data, layers = self._pending.popleft()
            work.wait()
            _slots(self._store, layers).write(unpack_ints(layers.places), data, layers.first, layers.last)
            self._buffers.append(buffer)

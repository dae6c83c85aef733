"""SharedBuffer: memory that several processes map. Its owner allocates it; each worker maps it once.

CPU     a memfd: it has no name to leak, and is freed with its last mapping. Sealed against shrinking, because reading a
        mapping beyond the end of its file raises SIGBUS.
CUDA    one allocation, exported by CUDA IPC through torch. The owner outlives its workers.
        Not tested yet: it needs a GPU. Synchronising before PREFILL and before DONE keeps the order.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import msgspec
import torch

from nanokv.disagg.messages import PoolMemory, ProtocolError


class SharedBuffer:
    """The owner's side.

    tensor       uint8 [num_bytes], zeroed
    descriptor   of the memfd; None on a GPU
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self.descriptor: int | None = None
        if device.type == "cuda":
            self.tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            return
        self.descriptor = os.memfd_create("nanokv-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, max(num_bytes, 1))
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.tensor = _mapped(self.descriptor, num_bytes)

    def export(self) -> PoolMemory:
        """What HELLO says about it; the descriptor of a memfd is sent with the frame."""
        if self.descriptor is not None:
            return PoolMemory(kind="memfd", num_bytes=self.num_bytes)
        handle = msgspec.msgpack.encode(list(self.tensor.untyped_storage()._share_cuda_()))
        return PoolMemory(kind="cuda", num_bytes=self.num_bytes, handle=handle)

    def close(self) -> None:
        """Drops the memory here: it is freed with the last tensor over it, here and in other processes."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def map_pool(memory: PoolMemory, descriptor: int | None, num_bytes: int) -> torch.Tensor:
    """The worker's side: the owner's bytes, uint8 [num_bytes].

    descriptor   of the memfd; it is closed
    Raises       ProtocolError for memory of another size or kind
    """
    if memory.num_bytes != num_bytes:
        raise ProtocolError(f"the pool has {memory.num_bytes:,} bytes where {num_bytes:,} are needed")
    if memory.kind == "cuda":
        device, *rest = msgspec.msgpack.decode(memory.handle)
        torch.cuda._lazy_init()
        storage = torch.UntypedStorage._new_shared_cuda(device, *rest)
        return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage, 0, (num_bytes,), (1,))
    if memory.kind != "memfd" or descriptor is None:
        raise ProtocolError(f"memory {memory.kind!r} without a descriptor: expected memfd or cuda")
    try:
        if os.fstat(descriptor).st_size < num_bytes:
            raise ProtocolError(f"the descriptor's file is shorter than {num_bytes:,} bytes")
        return _mapped(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] over the file; the mapping lives as long as the tensor."""
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8, count=num_bytes)

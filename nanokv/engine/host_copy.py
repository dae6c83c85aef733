"""HostCopy: asynchronous copies of a step's results from the device to the host."""

from __future__ import annotations

from typing import Any

import torch

from nanokv.codecs.pages import reason_unwritable


class HostCopy:
    """Copies of named tensors of any shape. `fetch` synchronises; later writes into the tensors change no copy."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._copies = {name: _to_host(tensor) for name, tensor in tensors.items()}
        self._event = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def fetch(self) -> dict[str, list[Any]]:
        """The tensors as lists. Waits for the device; the host waits nowhere else."""
        if self._event is not None:
            self._event.synchronize()
        return {name: copy.tolist() for name, copy in self._copies.items()}


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class UnwritableRows:
    """The rows of a step that a codec could not write.

    rows    bool [rows], as Batch.unwritable
    codec   name of the codec
    """

    def __init__(self, rows: torch.Tensor, codec: str) -> None:
        self._copy = HostCopy({"rows": rows})
        self.why = reason_unwritable(codec)

    def fetch(self) -> list[bool]:
        """Whether each row was refused. Waits for the device."""
        return self._copy.fetch()["rows"]

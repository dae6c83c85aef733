"""HostCopy: results of a step on their way from the device to the host."""

from __future__ import annotations

import torch

from nanokv.codecs.pages import reason_unwritable


class HostCopy:
    """Asynchronous copies of tensors; `fetch` synchronises. Later writes into the tensors change no copy."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._copies = {name: _to_host(tensor) for name, tensor in tensors.items()}
        self._event = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    def fetch(self) -> dict[str, list]:
        """Waits for the step: the only place where the host does."""
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
    codec   its name
    """

    def __init__(self, rows: torch.Tensor, codec: str) -> None:
        self._copy = HostCopy({"rows": rows})
        self.why = reason_unwritable(codec)

    def fetch(self) -> list[bool]:
        """Waits for the step."""
        return self._copy.fetch()["rows"]

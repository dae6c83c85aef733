"""KeyMean: the mean of a layer's keys, subtracted before they are coded (`center_keys`)."""

from __future__ import annotations

import torch


class KeyMean:
    """The mean of one layer's keys, None until it is measured.

    A constant added to all keys moves all scores of a row alike and leaves the softmax as it was, so nothing has to be
    added back. Without their mean, keys with a strong bias (Qwen2) are far smaller and code far better. The mean is
    fixed once it is measured: it is part of what a page means.

    is_lossy   the codes of this layer's keys lose what a large mean leaves small: one scale for each vector of keys
    offset     float32 []: length of the mean over the standard deviation around it, of the worst head; once measured
    """

    def __init__(self, is_lossy: bool = True) -> None:
        self.mean: torch.Tensor | None = None
        self.offset: torch.Tensor | None = None
        self.is_lossy = is_lossy
        self._is_wanted = self._is_offset_wanted = False

    def measure(self) -> None:
        """Takes the mean of the next step's keys."""
        self._is_wanted = True

    def measure_offset(self) -> None:
        """Measures `offset` in the next step, which subtracts nothing."""
        self._is_offset_wanted = True

    def subtract(self, keys: torch.Tensor) -> None:
        """Subtracts the mean from keys, float32 [rows, heads, dim], IN PLACE, and before they are checked: the
        difference may be larger than the keys were."""
        if self._is_offset_wanted:
            mean = keys.mean(0)
            deviation = (keys - mean).square().sum(-1).mean(0).sqrt()
            self.offset, self._is_offset_wanted = (mean.norm(dim=-1) / deviation).amax(), False
        if self._is_wanted:
            self.mean, self._is_wanted = keys.mean(0), False
        if self.mean is not None:
            keys.sub_(self.mean)

    def add(self, keys: torch.Tensor) -> torch.Tensor:
        """Decoded keys with the mean again: float32 [pages, heads, page_size, dim]."""
        return keys if self.mean is None else keys + self.mean[:, None]

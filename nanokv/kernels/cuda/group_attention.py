"""Attention over codes in groups on a GPU: torch decodes each page once, and the kernel of plain pages attends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanokv.kernels.cuda.attention import paged_attention
from nanokv.kernels.reference import group_batch

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import GroupPlanes, KVPlanes, OwnPages


def group_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    planes: GroupPlanes,
    memory: torch.Tensor,
    own_planes: KVPlanes,
    own: OwnPages,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """As reference.group_attention."""
    return paged_attention(q, *group_batch(pool, planes, memory, own_planes, own, batch, q.dtype), scale)

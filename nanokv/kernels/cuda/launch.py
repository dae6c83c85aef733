"""How a Triton kernel is launched, and the helpers all kernels share. Knows no op.

Under TRITON_INTERPRET=1 (set before the first import) kernels run in triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels are interpreted. Only `dot` may read it: all other code must be the code that is compiled."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of a launch: what the compile report builds.

    kernel      the @triton.jit function
    args        its arguments by name, compile-time ones included
    options     num_warps, num_stages
    """

    kernel: Any
    args: dict[str, Any]
    options: dict[str, int]


_recorders: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 2, **args: Any) -> None:
    """Runs `grid` programs of a kernel on the device of its tensors, or records them (`recording`). Returns at once."""
    if _recorders:
        _recorders[-1].append(Launch(kernel, args, {"num_warps": num_warps, "num_stages": num_stages}))
        return
    if 0 in grid:
        return
    tensor = next(value for value in args.values() if isinstance(value, torch.Tensor))
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(tensor):  # triton launches on the current device, not on that of the tensors
            kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)
    else:
        kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Records launches instead of running them, so that the compile report gets each configuration from the ops.

    Tensors may be on any device, "meta" too; results are undefined.
    """
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.remove(launches)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two >= size and >= least, as a block of a kernel must be."""
    return max(triton.next_power_of_2(size), least)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, summed in float32. float32 operands keep their precision: each is split into three tf32 numbers
    (tf32x3) for the tensor cores. Plain float32 products would be unrolled: minutes of compilation, kilobytes of stack.

    The interpreter multiplies bfloat16 wrongly (triton 3.9), so operands are widened there, and only there.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def tile_of(starts, requests, tile, ROWS: tl.constexpr):
    """The request of a tile of up to ROWS rows, the tile's first row, and the request's end.

    Request r owns the tiles from starts[r] // ROWS + r on, so `num_tiles` are enough for any batch, and the host need
    not know where requests begin. A tile past the rows of its request begins at the request's end or later: no work.
    """
    low, high = 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        is_later = tl.load(starts + middle) // ROWS + middle > tile
        low, high = tl.where(is_later, low, middle), tl.where(is_later, middle, high)
    start = tl.load(starts + low)
    return low, start + (tile - start // ROWS - low) * ROWS, tl.load(starts + low + 1)


def num_tiles(rows: int, requests: int, tile_rows: int) -> int:
    """The number of tiles that `tile_of` needs for a batch."""
    return rows // tile_rows + requests

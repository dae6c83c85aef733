"""Times paged attention on this CPU: the shapes that docs/benchmarks.md speaks of, bfloat16 pages, SmolLM2's heads.

python scripts/bench_attention.py
"""

from __future__ import annotations

import time

import torch

from nanokv.codecs.raw import RawCodec
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import ops

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, REPEATS = 9, 3, 64, 16, 30, 9


def batch_of(requests: int, length: int, rows: int) -> tuple[Batch, int]:
    """The last `rows` positions of each request, its pages shuffled; and how many pages there are."""
    pages = -(-length // PAGE_SIZE)
    tables = torch.randperm(requests * pages).int().view(requests, pages)
    positions = torch.arange(length - rows, length).repeat(requests).int()
    unused = torch.zeros_like(positions)
    starts = torch.arange(0, requests * rows + 1, rows).int()
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        unused.long(), positions, unused, unused, starts, tables, none, none.int(), PAGE_SIZE
    ), requests * pages


def milliseconds(requests: int, length: int, rows: int, layers: int) -> list[float]:
    """Times of all `layers` calls of one step, fastest first."""
    codec = RawCodec(torch.bfloat16)
    layout = PageLayout([LayerSpec(codec.planes(KV_HEADS, HEAD_DIM, PAGE_SIZE))] * LAYERS, PAGE_SIZE)
    planes = [codec.bind(layout, layer) for layer in range(layers)]
    batch, pages = batch_of(requests, length, rows)
    pool = torch.randn(pages * layout.page_bytes // 2).bfloat16().view(torch.uint8).view(pages, layout.page_bytes)
    q = torch.randn(requests * rows, HEADS, HEAD_DIM)
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        for layer in planes:
            ops.paged_attention(q, pool, layer, batch, HEAD_DIM**-0.5)
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times[1:])


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; milliseconds: fastest, median, slowest of {REPEATS}")
    for name, shape in {
        "decode, 1 x 256 tokens, 30 layers": (1, 256, 1, LAYERS),
        "decode, 16 x 320 tokens, 30 layers": (16, 320, 1, LAYERS),
        "decode, 16 x 1,024 tokens, 30 layers": (16, 1024, 1, LAYERS),
        "prefill, 2,048 tokens, 1 layer": (1, 2048, 2048, 1),
    }.items():
        times = milliseconds(*shape)
        print(f"{name:40} {times[0]:8.2f} {times[REPEATS // 2]:8.2f} {times[-1]:8.2f}")


if __name__ == "__main__":
    main()

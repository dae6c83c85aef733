"""Times decode attention on codes on this CPU, against raw bfloat16, in turns: SmolLM2-135M's heads, 30 layers.

python scripts/bench_codes.py [REQUESTS [TOKENS]]
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
from bench_attention import LAYERS, PAGE_SIZE, REPEATS, batch_of, smollm2

from nanokv.codecs import tables
from nanokv.kernels import ops
from nanokv.kernels.planes import CodePlane, CodePlanes

KV_HEADS, DIM = 3, 64
TABLES = {
    "tq4": tables.lloyd_max(4, DIM),
    "rot4": tables.uniform(4),
    "tq3": tables.lloyd_max(3, DIM),
    "tq2": tables.lloyd_max(2, DIM),
    "int8": tables.int8(),
    "fp8": tables.e4m3(),
}


def planes_of(table: torch.Tensor) -> list[CodePlanes]:
    """The planes of all layers, K and V alike."""
    bits, end, layers = len(table).bit_length() - 1, 0, []
    vectors = KV_HEADS * PAGE_SIZE
    for _ in range(2 * LAYERS):
        starts = []
        for size in (vectors * DIM * (2 if bits == 3 else bits) // 8, vectors * DIM // 8 * (bits == 3), 2 * vectors):
            starts.append(end)
            end += size
        layers.append(CodePlane(*starts, bits=bits, dim=DIM, table=table, scaling="absmax"))
    return [CodePlanes(k, v, end, PAGE_SIZE, KV_HEADS) for k, v in zip(layers[::2], layers[1::2], strict=True)]


def main(requests: int, length: int) -> None:
    torch.manual_seed(0)
    layout, raw, heads = smollm2(torch.bfloat16)
    batch, pages = batch_of(requests, length, 1)
    q = torch.randn(requests, heads, DIM)
    numbers = torch.randn(pages * layout.page_bytes // 2).bfloat16()
    runs = {"raw": (ops.paged_attention, numbers.view(torch.uint8).view(pages, -1), raw)}
    for name, table in TABLES.items():
        planes = planes_of(table)
        pool = torch.full((pages, planes[0].page_bytes), 0x35, dtype=torch.uint8)  # as a float16 about a third
        runs[name] = ops.code_attention, pool, planes
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS + 1):
        for name, (attend, pool, planes) in runs.items():
            begin = time.perf_counter()
            for layer in planes:
                attend(q, pool, layer, batch, DIM**-0.5)
            times[name].append((time.perf_counter() - begin) * 1e3)
    print(f"{requests} x {length} tokens, {torch.get_num_threads()} threads: ms, median and range of {REPEATS}; to raw")
    for name, own in times.items():
        own = sorted(own[1:])
        ratio = median(a / b for a, b in zip(times[name][1:], times["raw"][1:], strict=True))
        print(f"{name:6} {median(own):8.2f} {own[0]:8.2f} {own[-1]:8.2f}   x {ratio:.2f}")


if __name__ == "__main__":
    main(*([int(number) for number in sys.argv[1:]] + [1, 2048][len(sys.argv) - 1 :]))

"""Times decode attention on codes against raw bfloat16 on this CPU, in turn: SmolLM2-135M's heads, 30 layers.

python scripts/bench_codes.py [--requests 1] [--tokens 2048] [--json docs/benchmarks/codes.json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import bounded_spins  # noqa: F401
import torch
from bench_attention import LAYERS, PAGE_SIZE, REPEATS, batch_of, smollm2

from nanokv.cli.common import hardware
from nanokv.codecs import tables
from nanokv.kernels.ops import AUTO
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
    """The planes of all layers; K and V use the same table."""
    bits, end, layers = len(table).bit_length() - 1, 0, []
    vectors = KV_HEADS * PAGE_SIZE
    for _ in range(2 * LAYERS):
        starts = []
        for size in (vectors * DIM * (2 if bits == 3 else bits) // 8, vectors * DIM // 8 * (bits == 3), 2 * vectors):
            starts.append(end)
            end += size
        layers.append(CodePlane(*starts, bits=bits, dim=DIM, table=table, scaling="absmax"))
    return [CodePlanes(k, v, end, PAGE_SIZE, KV_HEADS) for k, v in zip(layers[::2], layers[1::2], strict=True)]


def measure(requests: int, length: int) -> list[dict]:
    """A row for raw and for each table: milliseconds of all layers, and the ratio to raw in the same round."""
    torch.manual_seed(0)
    layout, raw, heads = smollm2(torch.bfloat16)
    batch, pages = batch_of(requests, length, 1)
    q = torch.randn(requests, heads, DIM)
    numbers = torch.randn(pages * layout.page_bytes // 2).bfloat16()
    runs = {"raw": (AUTO.paged_attention, numbers.view(torch.uint8).view(pages, -1), raw)}
    for name, table in TABLES.items():
        planes = planes_of(table)
        pool = torch.full((pages, planes[0].page_bytes), 0x35, dtype=torch.uint8)  # a scale of about a third in float16
        runs[name] = AUTO.code_attention, pool, planes
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS + 1):  # the first one compiles
        for name, (attend, pool, planes) in runs.items():
            begin = time.perf_counter()
            for layer in planes:
                attend(q, pool, layer, batch, DIM**-0.5)
            times[name].append((time.perf_counter() - begin) * 1e3)
    ratios = {name: [a / b for a, b in zip(own[1:], times["raw"][1:], strict=True)] for name, own in times.items()}
    return [
        {"codec": name, "ms": own[1:], "ratio": median(ratios[name]), "ratios": ratios[name]}
        for name, own in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of context (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to FILE")
    options = parser.parse_args()
    runs = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rows = measure(options.requests, options.tokens)
        runs.append({"requests": options.requests, "tokens": options.tokens, "threads": threads, "rows": rows})
        print(f"{options.requests} x {options.tokens} tokens, {threads} threads: ms, median and range; to raw")
        for row in rows:
            print(
                f"{row['codec']:6} {median(row['ms']):8.2f} {min(row['ms']):8.2f} {max(row['ms']):8.2f}   "
                f"x {row['ratio']:.2f}"
            )
    if options.json is not None:
        found = {"command": "scripts/bench_codes.py", "date": time.strftime("%Y-%m-%d"), "hardware": hardware()}
        options.json.write_text(json.dumps(found | {"runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

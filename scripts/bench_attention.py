"""Times paged attention on this CPU: SmolLM2-135M's heads, and DeepSeek-V2-Lite's over latents (absorbed MLA).

python scripts/bench_attention.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import bounded_spins  # noqa: F401
import torch

from nanokv.codecs.raw import RawCodec
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import KVPlanes

PAGE_SIZE, LAYERS, REPEATS = 16, 30, 9


def smollm2(dtype: torch.dtype) -> tuple[PageLayout, list[KVPlanes], int]:
    """Pages of 30 layers with 3 KV heads of 64 dimensions. Returns the layout, the planes and the 9 query heads."""
    codec = RawCodec(dtype)
    layout = PageLayout([LayerSpec(codec.planes(3, 64, PAGE_SIZE))] * LAYERS, PAGE_SIZE)
    return layout, [codec.bind(layout, layer) for layer in range(LAYERS)], 9


def deepseek_v2_lite(dtype: torch.dtype) -> tuple[PageLayout, list[KVPlanes], int]:
    """Pages of one layer with latents of 512 and rotated keys of 64. Returns as `smollm2`, with 16 query heads."""
    planes = Plane("latent", (PAGE_SIZE, 512), dtype, 0), Plane("k_rope", (PAGE_SIZE, 64), dtype, 0)
    layout, size = PageLayout([LayerSpec(planes)], PAGE_SIZE), dtype.itemsize
    return layout, [
        KVPlanes(
            k_offset=0, v_offset=0, rope_offset=layout.paged(0, "k_rope").offset, page_bytes=layout.page_bytes,
            page_size=PAGE_SIZE, token_stride=512 * size, head_stride=0, rope_stride=64 * size, kv_heads=1,
            head_dim=512, value_dim=512, rope_dim=64, dtype=dtype,
        )
    ], 16  # fmt: skip


def batch_of(requests: int, length: int, rows: int) -> tuple[Batch, int]:
    """A step over the last `rows` positions of each request, with shuffled pages; and the number of pages."""
    pages = -(-length // PAGE_SIZE)
    tables = torch.randperm(requests * pages).int().view(requests, pages)
    positions = torch.arange(length - rows, length).repeat(requests).int()
    unused = torch.zeros_like(positions)
    starts = torch.arange(0, requests * rows + 1, rows).int()
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        unused.long(), positions, unused, unused, starts, tables, none, none.int(), PAGE_SIZE
    ), requests * pages


def milliseconds(
    model: Callable, dtype: torch.dtype, requests: int, length: int, rows: int, layers: int
) -> list[float]:
    """Milliseconds of the attention of one step over `layers` layers, fastest first."""
    layout, planes, heads = model(dtype)
    batch, pages = batch_of(requests, length, rows)
    pool = torch.randn(pages * layout.page_bytes // dtype.itemsize).to(dtype).view(torch.uint8)
    pool = pool.view(pages, layout.page_bytes)
    depth = planes[0].head_dim + planes[0].rope_dim
    q = torch.randn(requests * rows, heads, depth)
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        for layer in planes[:layers]:
            AUTO.paged_attention(q, pool, layer, batch, depth**-0.5)
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times[1:])


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; milliseconds: fastest, median, slowest of {REPEATS}")
    f32, bf16 = torch.float32, torch.bfloat16
    for name, shape in {
        "decode, 1 x 256 tokens, 30 layers": (smollm2, bf16, 1, 256, 1, LAYERS),
        "decode, 16 x 320 tokens, 30 layers": (smollm2, bf16, 16, 320, 1, LAYERS),
        "decode, 16 x 1,024 tokens, 30 layers": (smollm2, bf16, 16, 1024, 1, LAYERS),
        "prefill, 2,048 tokens, 1 layer": (smollm2, bf16, 1, 2048, 2048, 1),
        "latents, decode, 1 x 4,096 tokens, 1 layer": (deepseek_v2_lite, bf16, 1, 4096, 1, 1),
        "the same in float32": (deepseek_v2_lite, f32, 1, 4096, 1, 1),
    }.items():
        times = milliseconds(*shape)
        print(f"{name:44} {times[0]:8.2f} {times[REPEATS // 2]:8.2f} {times[-1]:8.2f}")


if __name__ == "__main__":
    main()

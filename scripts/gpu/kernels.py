"""Kernels alone, through nanokv.kernels.ops: time, bytes that must move, share of the copy bandwidth reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gpu.common import Row, Run, seconds

from nanokv.codecs import resolve_codec
from nanokv.codecs.pages import Heads
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import KVPlanes, StatePlanes

PAGE = 16
HEADS = {"Qwen3-0.6B": (16, 8, 128), "8B": (32, 8, 128)}
CODECS = ("tq4", "fp8")


def limits(run: Run) -> list[Row]:
    """The limits of the device: copying, and multiplying matrices."""
    size, width = (1 << 22, 256) if run.quick else (1 << 30, 8192)
    source = torch.ones(size // 4, device=run.device)
    target = torch.empty_like(source)
    copy = seconds([lambda: target.copy_(source)], run)
    a = torch.randn(width, width, device=run.device, dtype=run.dtype)
    multiply = seconds([lambda: a @ a], run, count=4)
    return [
        {"name": "copy", "seconds": copy, "bytes_per_s": 2 * size / copy},
        {"name": f"matmul {width}^3 {run.dtype}", "seconds": multiply, "flops_per_s": 2 * width**3 / multiply},
    ]


def step(rows: int, context: int, run: Run) -> Batch:
    """`rows` decodes after context - 1 tokens each; or, where rows is 0, one prompt of `context` tokens."""
    requests, count = (rows, 1) if rows else (1, context)
    positions = torch.full((rows,), context - 1) if rows else torch.arange(context)
    pages = -(-context // PAGE)
    tables = torch.randperm(requests * pages).view(requests, pages)
    owners = torch.arange(requests).repeat_interleave(count)
    batch = {
        "positions": positions,
        "write_pages": tables[owners, positions // PAGE],
        "write_slots": positions % PAGE,
        "request_starts": torch.arange(requests + 1) * count,
        "page_tables": tables,
        "state_ids": torch.arange(requests),
    }
    ids = torch.zeros(len(positions), dtype=torch.int64, device=run.device)
    return Batch(
        token_ids=ids, logit_rows=ids[:0], page_size=PAGE, **{n: t.int().to(run.device) for n, t in batch.items()}
    )


def noise(run: Run, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(*shape, device=run.device, dtype=dtype or run.dtype)


def pages_of(planes: KVPlanes, num_pages: int, run: Run) -> torch.Tensor:
    return noise(run, num_pages * planes.page_bytes // run.dtype.itemsize).view(torch.uint8).view(num_pages, -1)


def grouped(kv_heads: int, dim: int, dtype: torch.dtype) -> KVPlanes:
    token, plane = dim * dtype.itemsize, kv_heads * PAGE * dim * dtype.itemsize
    return KVPlanes(0, plane, 0, 2 * plane, PAGE, token, PAGE * token, 0, kv_heads, dim, dim, 0, dtype)


def latent(dtype: torch.dtype) -> KVPlanes:
    token, tail = 512 * dtype.itemsize, 64 * dtype.itemsize
    return KVPlanes(0, 0, PAGE * token, PAGE * (token + tail), PAGE, token, 0, tail, 1, 512, 512, 64, dtype)


def kernels(run: Run) -> Iterator[Row]:
    """A row for each kernel and shape. Bytes are the least that must move; the report computes shares of the limits."""
    for cases in (_attention, _latent_attention, _codes, _delta_rule, _elementwise, _stores):
        for case in cases(run):
            yield _row(run, *case)


Case = tuple[str, str, Callable[[], Callable[[], object]], float, float]
"""Kernel, shape, a function that makes a call over tensors of its own, bytes, floating-point operations."""


def _row(run: Run, name: str, shape: str, make: Callable[[], Callable[[], object]], num_bytes: float, flops: float):
    row: Row = {"name": name, "shape": shape}
    try:
        taken = seconds([make() for _ in range(run.copies(num_bytes))], run)
    except Exception as error:  # one kernel that fails must not hide the others
        return {**row, "error": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "seconds": taken, "bytes_per_s": num_bytes / taken, "flops_per_s": flops / taken}


def _attention(run: Run) -> Iterator[Case]:
    sizes = [(1, 64), (2, 64)] if run.quick else [(1, 4096), (16, 1024), (16, 4096), (16, 16_384), (64, 4096)]
    for model, (heads, kv_heads, dim) in HEADS.items():
        planes = grouped(kv_heads, dim, run.dtype)
        for rows, context in [*sizes, (0, sizes[1][1] * 2)]:
            batch = step(rows, context, run)
            read = max(rows, 1) * context * 2 * kv_heads * dim * run.dtype.itemsize
            pairs = rows * context if rows else context * context / 2
            shape = f"{model}, {rows} x {context:,}" if rows else f"{model}, prompt of {context:,}"

            def make(planes=planes, batch=batch, heads=heads, dim=dim) -> Callable[[], object]:
                pool, q = pages_of(planes, batch.page_tables.numel(), run), noise(run, batch.num_rows, heads, dim)
                return lambda: AUTO.paged_attention(q, pool, planes, batch, dim**-0.5)

            yield "attention decode" if rows else "attention prefill", shape, make, read, 4 * pairs * heads * dim


def _latent_attention(run: Run) -> Iterator[Case]:
    planes = latent(run.dtype)
    for heads, rows, context in [(16, 1, 64)] if run.quick else [(16, 1, 4096), (16, 16, 4096), (128, 16, 4096)]:
        batch = step(rows, context, run)

        def make(batch=batch, rows=rows, heads=heads) -> Callable[[], object]:
            pool, q = pages_of(planes, batch.page_tables.numel(), run), noise(run, rows, heads, 576)
            return lambda: AUTO.paged_attention(q, pool, planes, batch, 192**-0.5)

        read = rows * context * 576 * run.dtype.itemsize
        yield "MLA decode", f"{heads} heads, {rows} x {context:,}", make, read, 2 * rows * context * heads * 1088


def _codes(run: Run) -> Iterator[Case]:
    """Attention on codes, and writing them from float32, as a codec does after its rotation."""
    heads, kv_heads, dim = HEADS["8B"]
    cos_sin = torch.empty(1, dim, device=run.device)  # its device is that of the tables
    for codec in CODECS:
        own = resolve_codec(codec, run.dtype)
        layout = PageLayout([own.spec(kv_heads, dim, PAGE)], PAGE)
        planes = own.pages(layout, 0, Heads(heads, kv_heads, dim, dim**-0.5, cos_sin))._planes

        def pool_of(batch: Batch, layout=layout) -> torch.Tensor:
            shape = batch.page_tables.numel(), layout.page_bytes
            return torch.randint(0x3C, shape, dtype=torch.uint8, device=run.device)  # scales below 1

        for rows, context in [(2, 64)] if run.quick else [(1, 4096), (16, 4096), (16, 16_384)]:
            batch = step(rows, context, run)

            def make(batch=batch, planes=planes, pool_of=pool_of) -> Callable[[], object]:
                pool, q = pool_of(batch), noise(run, batch.num_rows, heads, dim)
                return lambda: AUTO.code_attention(q, pool, planes, batch, dim**-0.5)

            read, flops = rows * context * layout.bytes_per_token, 4 * rows * context * heads * dim
            yield "code_attention", f"8B {codec}, {rows} x {context:,}", make, read, flops
        for rows in (1, 16, 2048):
            batch = step(0, rows, run)

            def make(batch=batch, planes=planes, pool_of=pool_of, rows=rows) -> Callable[[], object]:
                pool = pool_of(batch)
                k, v = (noise(run, rows, kv_heads, dim, dtype=torch.float32) for _ in range(2))
                return lambda: AUTO.store_codes(k, v, pool, planes, batch)

            yield (
                "store_codes",
                f"8B {codec}, {rows} rows",
                make,
                rows * (8 * kv_heads * dim + layout.bytes_per_token),
                0,
            )


def _delta_rule(run: Run) -> Iterator[Case]:
    key_heads, value_heads, dim = (2, 4, 32) if run.quick else (16, 32, 128)
    state = value_heads * dim * dim * 4
    planes = StatePlanes(0, 0, state, key_heads, value_heads, dim, dim, 4, run.dtype)
    width = 2 * key_heads * dim + value_heads * dim
    a_log, dt_bias = (torch.rand(value_heads, device=run.device) - 2 for _ in range(2))
    for rows in (1, 2, 0) if run.quick else (1, 16, 64, 0):
        batch = step(rows, 64 if run.quick else 2048, run)

        def make(rows=rows, batch=batch) -> Callable[[], object]:
            rule = AUTO.delta_rule_step if rows else AUTO.delta_rule_chunk
            states = torch.zeros(max(rows, 1), state, dtype=torch.uint8, device=run.device)
            qkv, gates = noise(run, batch.num_rows, width), noise(run, batch.num_rows, 2 * value_heads)
            return lambda: rule(qkv, gates, a_log, dt_bias, states, planes, batch)

        moved = 2 * max(rows, 1) * state
        flops = 8 * batch.num_rows * value_heads * dim * dim
        name, shape = ("GDN step", f"{rows} requests") if rows else ("GDN chunk", f"prompt of {batch.num_rows:,}")
        yield name, f"Qwen3.5-4B, {shape}", make, moved, flops


def _elementwise(run: Run) -> Iterator[Case]:
    width = 64 if run.quick else 2560
    weight, size = noise(run, width), run.dtype.itemsize
    calls: dict[str, tuple[int, Callable[..., object]]] = {
        "rms_norm": (1, lambda x: AUTO.rms_norm(x, weight, 1e-6)),
        "add_rms_norm": (2, lambda x: AUTO.add_rms_norm(*x.chunk(2), weight, 1e-6)),
        "silu_mul": (8, lambda x: AUTO.silu_mul(x.view(-1, 8 * width))),
    }
    for rows in (1, 16, 2048):
        for name, (parts, call) in calls.items():

            def make(rows=rows, parts=parts, call=call) -> Callable[[], object]:
                x = noise(run, parts * rows, width)
                return lambda: call(x)

            moved = rows * width * size * {"rms_norm": 2, "add_rms_norm": 4, "silu_mul": 12}[name]
            yield name, f"{rows} rows of {width}", make, moved, 0


def _stores(run: Run) -> Iterator[Case]:
    """The writes of a step into raw pages."""
    size, cos_sin = run.dtype.itemsize, noise(run, 4096, 128, dtype=torch.float32)
    heads, kv_heads, dim = (4, 2, 16) if run.quick else HEADS["8B"]
    planes, latents = grouped(kv_heads, dim, run.dtype), latent(run.dtype)
    turn, turn_latent = cos_sin[:, :dim].contiguous(), cos_sin[:, :64].contiguous()
    weight = noise(run, 512)
    for rows in (1, 16, 2048):
        batch = step(0, rows, run)
        pages, width = batch.page_tables.numel(), (heads + 2 * kv_heads) * dim

        def grouped_call(batch=batch, pages=pages, rows=rows, width=width) -> Callable[[], object]:
            qkv, pool = noise(run, rows, width), pages_of(planes, pages, run)
            return lambda: AUTO.rope_and_store(qkv, turn, pool, planes, batch, heads)

        yield "rope_and_store", f"{rows} rows, 8B", grouped_call, rows * size * (2 * width + 2 * kv_heads * dim), 0

        def latent_call(batch=batch, pages=pages, rows=rows) -> Callable[[], object]:
            q_rope, kv, pool = noise(run, rows, 16, 64), noise(run, rows, 576), pages_of(latents, pages, run)
            return lambda: AUTO.store_latent(q_rope, kv, weight, 1e-6, turn_latent, pool, latents, batch)

        yield "store_latent", f"{rows} rows, 16 heads", latent_call, rows * size * (2 * 16 * 64 + 2 * 576), 0

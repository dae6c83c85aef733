"""Kernels alone, through nanokv.kernels.ops: time, bytes that must move, share of the copy bandwidth reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gpu.common import Row, Run, seconds

from nanokv.core.batch import Batch
from nanokv.kernels import ops

PAGE = 16
HEADS = {"Qwen3-0.6B": (16, 8, 128), "8B": (32, 8, 128)}


def limits(run: Run) -> list[Row]:
    """What the device reaches at all: copying, and multiplying matrices."""
    size, width = (1 << 22, 256) if run.quick else (1 << 30, 8192)
    source = torch.ones(size // 4, device=run.device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), run)
    a = torch.randn(width, width, device=run.device, dtype=run.dtype)
    multiply = seconds(lambda: a @ a, run, calls=4)
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


def pages_of(planes: ops.KVPlanes, num_pages: int, run: Run) -> torch.Tensor:
    return noise(run, num_pages * planes.page_bytes // run.dtype.itemsize).view(torch.uint8).view(num_pages, -1)


def grouped(kv_heads: int, dim: int, dtype: torch.dtype) -> ops.KVPlanes:
    token, plane = dim * dtype.itemsize, kv_heads * PAGE * dim * dtype.itemsize
    return ops.KVPlanes(0, plane, 0, 2 * plane, PAGE, token, PAGE * token, 0, kv_heads, dim, dim, 0, dtype)


def latent(dtype: torch.dtype) -> ops.KVPlanes:
    token, tail = 512 * dtype.itemsize, 64 * dtype.itemsize
    return ops.KVPlanes(0, 0, PAGE * token, PAGE * (token + tail), PAGE, token, 0, tail, 1, 512, 512, 64, dtype)


def kernels(run: Run) -> Iterator[Row]:
    """A row for each kernel and shape. `bytes` is what must move at least; shares follow in the report."""
    for case in (*_attention(run), *_latent_attention(run), *_delta_rule(run), *_elementwise(run)):
        yield _row(run, *case)


Case = tuple[str, str, Callable[[], object], float, float]
"""Kernel, shape, the call, bytes, floating-point operations."""


def _row(run: Run, name: str, shape: str, call: Callable[[], object], num_bytes: float, flops: float) -> Row:
    row: Row = {"name": name, "shape": shape}
    try:
        taken = seconds(call, run)
    except Exception as error:  # one kernel that fails must not hide the others
        return {**row, "error": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "seconds": taken, "bytes_per_s": num_bytes / taken, "flops_per_s": flops / taken}


def _attention(run: Run) -> Iterator[Case]:
    sizes = [(1, 64), (2, 64)] if run.quick else [(1, 4096), (16, 1024), (16, 4096), (16, 16_384), (64, 4096)]
    for model, (heads, kv_heads, dim) in HEADS.items():
        planes = grouped(kv_heads, dim, run.dtype)
        for rows, context in [*sizes, (0, sizes[1][1] * 2)]:
            batch = step(rows, context, run)
            pool, q = pages_of(planes, batch.page_tables.numel(), run), noise(run, batch.num_rows, heads, dim)
            read = max(rows, 1) * context * 2 * kv_heads * dim * run.dtype.itemsize
            pairs = rows * context if rows else context * context / 2
            shape = f"{model}, {rows} x {context:,}" if rows else f"{model}, prompt of {context:,}"

            def call(q=q, pool=pool, planes=planes, batch=batch, dim=dim) -> None:
                ops.paged_attention(q, pool, planes, batch, dim**-0.5)

            yield "attention decode" if rows else "attention prefill", shape, call, read, 4 * pairs * heads * dim


def _latent_attention(run: Run) -> Iterator[Case]:
    planes = latent(run.dtype)
    for heads, rows, context in [(16, 1, 64)] if run.quick else [(16, 1, 4096), (16, 16, 4096), (128, 16, 4096)]:
        batch = step(rows, context, run)
        pool, q = pages_of(planes, batch.page_tables.numel(), run), noise(run, rows, heads, 576)

        def call(q=q, pool=pool, batch=batch) -> None:
            ops.paged_attention(q, pool, planes, batch, 192**-0.5)

        read = rows * context * 576 * run.dtype.itemsize
        yield "MLA decode", f"{heads} heads, {rows} x {context:,}", call, read, 2 * rows * context * heads * 1088


def _delta_rule(run: Run) -> Iterator[Case]:
    key_heads, value_heads, dim = (2, 4, 32) if run.quick else (16, 32, 128)
    state = value_heads * dim * dim * 4
    planes = ops.StatePlanes(0, 0, state, key_heads, value_heads, dim, dim, 4, run.dtype)
    width = 2 * key_heads * dim + value_heads * dim
    a_log, dt_bias = (torch.rand(value_heads, device=run.device) - 2 for _ in range(2))
    for rows in (1, 2, 0) if run.quick else (1, 16, 64, 0):
        batch = step(rows, 64 if run.quick else 2048, run)
        states = torch.zeros(max(rows, 1), state, dtype=torch.uint8, device=run.device)
        qkv, gates = noise(run, batch.num_rows, width), noise(run, batch.num_rows, 2 * value_heads)

        def call(rule=ops.delta_rule_step if rows else ops.delta_rule_chunk, states=states, qkv=qkv, gates=gates,
                 batch=batch) -> None:  # fmt: skip
            rule(qkv, gates, a_log, dt_bias, states, planes, batch)

        moved = 2 * len(states) * state
        flops = 8 * batch.num_rows * value_heads * dim * dim
        name, shape = ("GDN step", f"{rows} requests") if rows else ("GDN chunk", f"prompt of {batch.num_rows:,}")
        yield name, f"Qwen3.5-4B, {shape}", call, moved, flops


def _elementwise(run: Run) -> Iterator[Case]:
    width, heads, kv_heads, dim = (64, 4, 2, 16) if run.quick else (2560, 32, 8, 128)
    planes = grouped(kv_heads, dim, run.dtype)
    weight, cos_sin = noise(run, width), noise(run, 4096, dim, dtype=torch.float32)
    for rows in (1, 16, 2048):
        batch = step(0, rows, run)
        x, residual, gate_up = noise(run, rows, width), noise(run, rows, width), noise(run, rows, 8 * width)
        qkv, pool = noise(run, rows, (heads + 2 * kv_heads) * dim), pages_of(planes, batch.page_tables.numel(), run)
        size = run.dtype.itemsize
        shape = f"{rows} rows of {width}"
        yield "add_rms_norm", shape, lambda x=x, r=residual: ops.add_rms_norm(x, r, weight, 1e-6), 4 * x.nbytes, 0
        yield "silu_mul", shape, lambda g=gate_up: ops.silu_mul(g), 1.5 * gate_up.nbytes, 0

        def rope(qkv=qkv, pool=pool, batch=batch) -> None:
            ops.rope_and_store(qkv, cos_sin, pool, planes, batch, heads)

        yield "rope_and_store", shape, rope, 2 * qkv.nbytes + rows * 2 * kv_heads * dim * size, 0

"""Each Triton kernel against its reference, on small odd shapes. Runs on a GPU or in Triton's interpreter.

TRITON_INTERPRET=1 PYTHONPATH=. python tests/triton_cases.py    prints one JSON object: case -> error of the kernel

The error is the largest difference (float32), or the norm of the differences divided by the norm of the reference (16
bits), over results and over every tensor that the op writes to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from harness import step_of
from helpers import last, noise
from test_attention_kernels import Requests
from test_delta_rule_kernels import Requests as Recurrent
from test_elementwise_kernels import pages_for
from test_mla_kernels import Expanded, Latents, latent_layout, latent_planes

from nanokv.codecs import resolve_codec
from nanokv.codecs.pages import Heads
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import cuda, reference
from nanokv.kernels.experts import Experts
from nanokv.kernels.linear import PackedLinear
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import CodePlane, CodePlanes, HeadNorms

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = {"float32": F32, "bfloat16": BF16}


def wide(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view with a larger stride between rows."""
    return torch.cat([x, x], dim=1)[:, : x.shape[1]]


def copied(value: Any, device: str) -> Any:
    """A copy of an argument on a device, with the same strides."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return copy.copy_(value)
    if isinstance(value, list):
        return [copied(one, device) for one in value]
    if isinstance(value, (Batch, HeadNorms, Experts, CodePlanes, CodePlane, PackedLinear)):
        given = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: copied(getattr(value, name), device) for name in given})
    return value


class Off:
    """Runs the kernel and the reference of one op on equal arguments and keeps the largest error."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.value = device, dtype, 0.0

    def of(self, op: str, *args: Any, kept: torch.dtype | None = None) -> None:
        """kept   dtype of the numbers in a written tensor of bytes, if the op writes one"""
        truths = SimpleNamespace(add_experts=AUTO.add_experts) if op == "add_experts" else reference
        theirs, mine = copied(list(args), "cpu"), copied(list(args), self.device)
        truth, result = getattr(truths, op)(*theirs), getattr(cuda, op)(*mine)
        if truth is not None:
            self.note(result, truth)
        for before, after, expected in zip(args, mine, theirs, strict=True):
            if isinstance(before, torch.Tensor) and not torch.equal(before, expected):
                as_numbers = (after.cpu(), expected) if kept is None else (after.cpu().view(kept), expected.view(kept))
                self.note(*(torch.nan_to_num(one.float(), 7.0, 7.0, 7.0) for one in as_numbers))

    def note(self, mine: torch.Tensor, truth: torch.Tensor) -> None:
        assert mine.shape == truth.shape and mine.dtype == truth.dtype
        mine, truth = mine.cpu().double(), truth.double()
        off = (mine - truth).abs().max() if self.dtype == F32 else (mine - truth).norm() / truth.norm()
        assert torch.isfinite(off)
        self.value = max(self.value, float(off))


MIXED = [1, 15, 16, 17, 63, 64, 65, 1000]
MIXED_ROWS = {0: [0], 3: last(17, 17), 1: last(15, 1), 4: last(63, 2), 7: last(1000, 1), 5: last(64, 1),
              6: last(65, 40), 2: last(16, 1)}  # fmt: skip


def attend(off: Off, requests: Any, rows: dict[int, list[int]]) -> None:
    batch, q = requests.batch(rows)
    off.of("paged_attention", q.to(off.dtype), requests.pool, requests.planes, batch, requests.scale)


def mixed_step(off: Off) -> None:
    attend(off, Requests(MIXED, heads=6, kv_heads=2, head_dim=32, dtype=off.dtype), MIXED_ROWS)


def decodes(off: Off) -> None:
    lengths = [1, 16, 65, 1000]
    rows = {request: [length - 1] for request, length in enumerate(lengths)}
    attend(off, Requests(lengths, heads=4, kv_heads=4, head_dim=16, dtype=off.dtype), rows)


def groups(off: Off) -> None:
    for heads, kv_heads, head_dim in ((1, 1, 64), (4, 1, 24), (8, 1, 80), (40, 1, 16)):
        requests = Requests([70, 33], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=off.dtype)
        attend(off, requests, {0: last(70, 9), 1: last(33, 1)})


def page_sizes(off: Off) -> None:
    for page_size in (1, 48):
        requests = Requests([90, 47], heads=2, kv_heads=1, head_dim=16, page_size=page_size, dtype=off.dtype)
        attend(off, requests, {0: last(90, 20), 1: [46]})


def scattered(off: Off) -> None:
    requests = Requests([200], heads=3, kv_heads=1, head_dim=16, dtype=off.dtype)
    attend(off, requests, {0: [199, 0, 64, 63, 120]})


def latents(off: Off) -> None:
    for rank, rope, rows in ((32, 8, {0: last(65, 3), 1: [999], 2: [0]}), (512, 64, {0: [64], 1: [999], 2: [0]})):
        requests = Latents([65, 1000, 1], rank=rank, rope=rope, dtype=off.dtype, q_dtype=off.dtype)
        batch = ops_batch(requests, rows)
        q = torch.cat([requests.q[request][positions] for request, positions in rows.items()])
        off.of("paged_attention", q, requests.pool, requests.planes, batch, requests.scale)


def expanded(off: Off) -> None:
    requests, rows = Expanded([65, 17], dtype=off.dtype), {0: last(65, 30), 1: last(17, 1)}
    q = torch.cat([requests.q[request][positions] for request, positions in rows.items()]).to(off.dtype)
    off.of("paged_attention", q, requests.pool, requests.planes, ops_batch(requests, rows), requests.scale)


def ops_batch(requests: Any, rows: dict[int, list[int]]) -> Batch:
    return step_of(rows, requests.tables, requests.planes.page_size)


def writes(off: Off) -> None:
    for rotary, with_norms in ((32, True), (32, False), (16, True), (24, False)):
        qkv, cos_sin, pool, planes, batch = pages_for(5, 4, 2, 32, 16, off.dtype, rotary, off.dtype)
        norms = HeadNorms(noise(32), noise(32, seed=1), 1e-6) if with_norms else None
        off.of("rope_and_store", wide(qkv), cos_sin, pool, planes, batch, 4, norms, kept=off.dtype)


def rotations(off: Off) -> None:
    qkv, cos_sin, _, _, batch = pages_for(5, 4, 2, 32, 16, off.dtype, 16, off.dtype)
    off.of("rope", wide(qkv), cos_sin, batch, 4, 2, 32, HeadNorms(noise(32), noise(32, seed=1), 1e-6))


def latent_writes(off: Off) -> None:
    rows, heads, rank, rope = 5, 3, 24, 8
    planes = latent_planes(latent_layout(rank, rope, 16, off.dtype), 1)
    pool = torch.full((3, planes.page_bytes), 7, dtype=torch.uint8)
    slots = torch.tensor([0, 15, 3, 4, 7], dtype=torch.int32)
    unused = torch.zeros(rows, dtype=torch.int32)
    batch = Batch(unused.long(), 3 * slots, slots % 3, slots, unused[:2], unused[:, None], unused.long(), unused, 16)
    angles = noise(50, rope // 2)
    cos_sin, kv = torch.cat([angles.cos(), angles.sin()], dim=1), wide(noise(rows, rank + rope, dtype=off.dtype))
    q_rope = noise(rows, heads, 2 * rope, seed=2, dtype=off.dtype)[:, :, rope:]
    args = (noise(rank, seed=3, dtype=off.dtype), 1e-6, cos_sin, pool, planes, batch)
    off.of("store_latent", q_rope, kv, *args, kept=off.dtype)


CODECS = ("tq2/int4", "tq3/fp8", "tq4/int8")


def coded(codec: str, dim: int, kv_heads: int, page_size: int, lengths: list[int]) -> SimpleNamespace:
    """Requests whose pages hold codes of noise."""
    layout = PageLayout([LayerSpec(), resolve_codec(codec, F32).spec(kv_heads, dim, page_size)], page_size)
    heads = Heads(kv_heads, kv_heads, dim, 1.0, noise(8, dim))
    planes = resolve_codec(codec, F32).pages(layout, 1, heads)._planes
    counts = [layout.pages_for(length) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for request, pages in enumerate(order.split(counts)):
        tables[request, : len(pages)] = pages
    requests = SimpleNamespace(planes=planes, tables=tables, pool=torch.zeros(sum(counts), layout.page_bytes).byte())
    where = [(tables[r, p // page_size], p % page_size) for r, length in enumerate(lengths) for p in range(length)]
    pages, slots = (torch.tensor(one, dtype=torch.int32) for one in zip(*where, strict=True))
    rows = {r: list(range(length)) for r, length in enumerate(lengths)}
    requests.batch = step_of(rows, tables, page_size, pages, slots)
    requests.k, requests.v = (noise(len(where), kv_heads, dim, seed=seed) for seed in (1, 2))
    return requests


def code_writes(off: Off) -> None:
    for codec in CODECS:
        for one in (coded(codec, 32, 2, 16, [3]), coded(codec, 48, 1, 16, [2])):
            k, v = one.k.to(off.dtype), one.v.to(off.dtype)
            off.of("store_codes", wide(k), v, one.pool, one.planes, one.batch, kept=torch.uint8)


def codes(off: Off) -> None:
    for codec in CODECS:
        one, rows = coded(codec, 32, 2, 16, [70, 600]), {0: last(70, 5), 1: [599]}
        reference.store_codes(one.k, one.v, one.pool, one.planes, one.batch)
        q = noise(6, 6, 32, seed=3, dtype=off.dtype)
        off.of("code_attention", q, one.pool, one.planes, ops_batch(one, rows), 0.2)


def norms(off: Off) -> None:
    for width, weight_dtype in ((96, off.dtype), (576, F32)):
        x, weight = wide(noise(3, width, dtype=off.dtype)), noise(width, seed=1, dtype=weight_dtype)
        off.of("rms_norm", x, weight, 1e-6)
        off.of("add_rms_norm", x, noise(3, width, seed=2, dtype=off.dtype), weight, 1e-6)
        z = wide(noise(3, 2 * width, seed=3, dtype=off.dtype))
        off.of("gated_rms_norm", noise(3, 2 * width, dtype=off.dtype), z, weight, 1e-6)


def gates(off: Off) -> None:
    x = noise(3, 1500, dtype=off.dtype)
    off.of("silu_mul", torch.cat([x, x.flip(1)], dim=1))
    off.of("sigmoid_mul", x, wide(x.flip(1)))


def recurrent(off: Off, rows: dict[int, tuple[int, int]], op: str) -> None:
    """One op in a step that continues requests whose states an earlier step filled."""
    requests = Recurrent([100, 70, 3], key_heads=1, key_dim=16, value_dim=24, dtype=off.dtype, conv_dtype=off.dtype)
    states, planes = requests.pool(), requests.planes
    before = {request: (0, start) for request, (start, _) in rows.items() if start}
    if before:
        requests.conv(before, states, reference)
        requests.rule(before, states, reference)
    batch, x, gates = requests.step(rows)
    if op == "short_conv":
        off.of(op, x, requests.weight, states, planes, batch, kept=off.dtype)
    else:
        off.of(op, x, gates, requests.a_log, requests.dt_bias, states, planes, batch, kept=F32)


def chunks(off: Off) -> None:
    recurrent(off, {0: (50, 70), 1: (0, 66), 2: (2, 3)}, "delta_rule_chunk")


def steps(off: Off) -> None:
    recurrent(off, {0: (70, 71), 1: (0, 1), 2: (2, 3)}, "delta_rule_step")


def convolution(off: Off) -> None:
    recurrent(off, {0: (10, 80), 1: (0, 2), 2: (2, 3)}, "short_conv")
    recurrent(off, {0: (70, 71), 1: (0, 1), 2: (1, 2)}, "short_conv")


def experts(off: Off) -> None:
    count, width, hidden = 6, 48, 40
    weights = [noise(2 * hidden, width, seed=e) / 7 for e in range(count)]
    downs = [noise(width, hidden, seed=9 + e) / 7 for e in range(count)]
    packed = Experts(*([PackedLinear(tuple(one.shape), off.dtype, off.dtype, "plain", one.to(off.dtype))
                            for one in many] for many in (weights, downs)))  # fmt: skip
    for rows in (1, 70):
        chosen = noise(rows, count, seed=5).topk(2).indices
        x, out = noise(rows, width, dtype=off.dtype), noise(rows, width, seed=1, dtype=off.dtype)
        off.of("add_experts", out, x, noise(rows, 2, seed=6).softmax(-1), chosen, packed)


CASES: dict[str, Callable[[Off], None]] = {
    case.__name__: case
    for case in (
        mixed_step, decodes, groups, page_sizes, scattered, latents, expanded, writes, rotations, latent_writes,
        code_writes, codes, norms, gates,
        chunks, steps, convolution, experts,
    )
}  # fmt: skip


def run(case: str, format: str, device: str) -> float:
    """The error of the kernel in one case."""
    off = Off(device, FORMATS[format])
    CASES[case](off)
    return off.value


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({f"{case} {format}": run(case, format, "cpu") for case in CASES for format in FORMATS}))

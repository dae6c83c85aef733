"""Each Triton twin beside its reference, on small odd shapes: on a GPU, or in triton's interpreter.

TRITON_INTERPRET=1 PYTHONPATH=. python tests/triton_cases.py [CASE ...]    prints one JSON object: case -> error of the
twin. A CASE is such as "norms float32"; without one, all run.

The error is the largest difference (float32), or the norm of the differences over that of the reference (16 bits), over
results and over every tensor that the op writes to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from harness import step_of
from helpers import last, noise
from recurrent_requests import Requests as Recurrent
from test_attention_kernels import Requests
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
    """The same numbers as a view with a larger row stride."""
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


class Twins:
    """Runs ops of both twins on equal arguments and keeps the largest error."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.error = device, dtype, 0.0

    def run(self, op: str, *args: Any, kept: torch.dtype | None = None) -> None:
        """kept   the dtype of the numbers in a tensor of bytes that the op writes"""
        truths = SimpleNamespace(add_experts=AUTO.add_experts) if op == "add_experts" else reference
        theirs, mine = copied(list(args), "cpu"), copied(list(args), self.device)
        truth, result = getattr(truths, op)(*theirs), getattr(cuda, op)(*mine)
        if truth is not None:
            self._compare(result, truth)
        for before, after, expected in zip(args, mine, theirs, strict=True):
            if isinstance(before, torch.Tensor) and not torch.equal(before, expected):
                as_numbers = (after.cpu(), expected) if kept is None else (after.cpu().view(kept), expected.view(kept))
                self._compare(*(torch.nan_to_num(one.float(), 7.0, 7.0, 7.0) for one in as_numbers))

    def _compare(self, mine: torch.Tensor, truth: torch.Tensor) -> None:
        assert mine.shape == truth.shape and mine.dtype == truth.dtype
        mine, truth = mine.cpu().double(), truth.double()
        error = (mine - truth).abs().max() if self.dtype == F32 else (mine - truth).norm() / truth.norm()
        assert torch.isfinite(error)
        self.error = max(self.error, float(error))


MIXED = [1, 15, 16, 17, 63, 64, 65, 1000]
MIXED_ROWS = {0: [0], 3: last(17, 17), 1: last(15, 1), 4: last(63, 2), 7: last(1000, 1), 5: last(64, 1),
              6: last(65, 40), 2: last(16, 1)}  # fmt: skip


def attend(twins: Twins, requests: Any, rows: dict[int, list[int]]) -> None:
    batch, q = requests.batch(rows)
    twins.run("paged_attention", q.to(twins.dtype), requests.pool, requests.planes, batch, requests.scale)


def mixed_step(twins: Twins) -> None:
    attend(twins, Requests(MIXED, heads=6, kv_heads=2, head_dim=32, dtype=twins.dtype), MIXED_ROWS)


def decodes(twins: Twins) -> None:
    lengths = [1, 16, 65, 1000]
    rows = {request: [length - 1] for request, length in enumerate(lengths)}
    attend(twins, Requests(lengths, heads=4, kv_heads=4, head_dim=16, dtype=twins.dtype), rows)


def groups(twins: Twins) -> None:
    for heads, kv_heads, head_dim in ((1, 1, 64), (4, 1, 24), (8, 1, 80), (40, 1, 16)):
        requests = Requests([70, 33], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=twins.dtype)
        attend(twins, requests, {0: last(70, 9), 1: last(33, 1)})


def page_sizes(twins: Twins) -> None:
    for page_size in (1, 48):
        requests = Requests([90, 47], heads=2, kv_heads=1, head_dim=16, page_size=page_size, dtype=twins.dtype)
        attend(twins, requests, {0: last(90, 20), 1: [46]})


def scattered(twins: Twins) -> None:
    requests = Requests([200], heads=3, kv_heads=1, head_dim=16, dtype=twins.dtype)
    attend(twins, requests, {0: [199, 0, 64, 63, 120]})


def latents(twins: Twins) -> None:
    for rank, rope, rows in ((32, 8, {0: last(65, 3), 1: [999], 2: [0]}), (512, 64, {0: [64], 1: [999], 2: [0]})):
        requests = Latents([65, 1000, 1], rank=rank, rope=rope, dtype=twins.dtype, q_dtype=twins.dtype)
        batch = ops_batch(requests, rows)
        q = torch.cat([requests.q[request][positions] for request, positions in rows.items()])
        twins.run("paged_attention", q, requests.pool, requests.planes, batch, requests.scale)


def expanded(twins: Twins) -> None:
    requests, rows = Expanded([65, 17], dtype=twins.dtype), {0: last(65, 30), 1: last(17, 1)}
    q = torch.cat([requests.q[request][positions] for request, positions in rows.items()]).to(twins.dtype)
    twins.run("paged_attention", q, requests.pool, requests.planes, ops_batch(requests, rows), requests.scale)


def ops_batch(requests: Any, rows: dict[int, list[int]]) -> Batch:
    return step_of(rows, requests.tables, requests.planes.page_size)


def writes(twins: Twins) -> None:
    for rotary, with_norms in ((32, True), (32, False), (16, True), (24, False)):
        qkv, cos_sin, pool, planes, batch = pages_for(5, 4, 2, 32, 16, twins.dtype, rotary, twins.dtype)
        norms = HeadNorms(noise(32), noise(32, seed=1), 1e-6) if with_norms else None
        twins.run("rope_and_store", wide(qkv), cos_sin, pool, planes, batch, 4, norms, kept=twins.dtype)


def rotations(twins: Twins) -> None:
    qkv, cos_sin, _, _, batch = pages_for(5, 4, 2, 32, 16, twins.dtype, 16, twins.dtype)
    twins.run("rope", wide(qkv), cos_sin, batch, 4, 2, 32, HeadNorms(noise(32), noise(32, seed=1), 1e-6))


def latent_writes(twins: Twins) -> None:
    rows, heads, rank, rope = 5, 3, 24, 8
    planes = latent_planes(latent_layout(rank, rope, 16, twins.dtype), 1)
    pool = torch.full((3, planes.page_bytes), 7, dtype=torch.uint8)
    slots = torch.tensor([0, 15, 3, 4, 7], dtype=torch.int32)
    unused = torch.zeros(rows, dtype=torch.int32)
    batch = Batch(unused.long(), 3 * slots, slots % 3, slots, unused[:2], unused[:, None], unused.long(), unused, 16)
    angles = noise(50, rope // 2)
    cos_sin, kv = torch.cat([angles.cos(), angles.sin()], dim=1), wide(noise(rows, rank + rope, dtype=twins.dtype))
    q_rope = noise(rows, heads, 2 * rope, seed=2, dtype=twins.dtype)[:, :, rope:]
    args = (noise(rank, seed=3, dtype=twins.dtype), 1e-6, cos_sin, pool, planes, batch)
    twins.run("store_latent", q_rope, kv, *args, kept=twins.dtype)


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


def code_writes(twins: Twins) -> None:
    for codec in CODECS:
        for one in (coded(codec, 32, 2, 16, [3]), coded(codec, 48, 1, 16, [2])):
            k, v = one.k.to(twins.dtype), one.v.to(twins.dtype)
            twins.run("store_codes", wide(k), v, one.pool, one.planes, one.batch, kept=torch.uint8)


def codes(twins: Twins) -> None:
    for codec in CODECS:
        one, rows = coded(codec, 32, 2, 16, [70, 600]), {0: last(70, 5), 1: [599]}
        reference.store_codes(one.k, one.v, one.pool, one.planes, one.batch)
        q = noise(6, 6, 32, seed=3, dtype=twins.dtype)
        twins.run("code_attention", q, one.pool, one.planes, ops_batch(one, rows), 0.2)


def norms(twins: Twins) -> None:
    for width, weight_dtype in ((96, twins.dtype), (576, F32)):
        x, weight = wide(noise(3, width, dtype=twins.dtype)), noise(width, seed=1, dtype=weight_dtype)
        twins.run("rms_norm", x, weight, 1e-6)
        twins.run("add_rms_norm", x, noise(3, width, seed=2, dtype=twins.dtype), weight, 1e-6)
        z = wide(noise(3, 2 * width, seed=3, dtype=twins.dtype))
        twins.run("gated_rms_norm", noise(3, 2 * width, dtype=twins.dtype), z, weight, 1e-6)


def gates(twins: Twins) -> None:
    x = noise(3, 1500, dtype=twins.dtype)
    twins.run("silu_mul", torch.cat([x, x.flip(1)], dim=1))
    twins.run("sigmoid_mul", x, wide(x.flip(1)))


def recurrent(twins: Twins, rows: dict[int, tuple[int, int]], op: str) -> None:
    """The step after one that filled the states of all requests."""
    requests = Recurrent([100, 70, 3], key_heads=1, key_dim=16, value_dim=24, dtype=twins.dtype, conv_dtype=twins.dtype)
    states, planes = requests.pool(), requests.planes
    before = {request: (0, start) for request, (start, _) in rows.items() if start}
    if before:
        requests.conv(before, states, reference)
        requests.rule(before, states, reference)
    batch, x, gates = requests.step(rows)
    if op == "short_conv":
        twins.run(op, x, requests.weight, states, planes, batch, kept=twins.dtype)
    else:
        twins.run(op, x, gates, requests.a_log, requests.dt_bias, states, planes, batch, kept=F32)


def chunks(twins: Twins) -> None:
    recurrent(twins, {0: (50, 70), 1: (0, 66), 2: (2, 3)}, "delta_rule_chunk")


def steps(twins: Twins) -> None:
    recurrent(twins, {0: (70, 71), 1: (0, 1), 2: (2, 3)}, "delta_rule_step")


def convolution(twins: Twins) -> None:
    recurrent(twins, {0: (10, 80), 1: (0, 2), 2: (2, 3)}, "short_conv")
    recurrent(twins, {0: (70, 71), 1: (0, 1), 2: (1, 2)}, "short_conv")


def experts(twins: Twins) -> None:
    count, width, hidden = 6, 48, 40
    weights = [noise(2 * hidden, width, seed=e) / 7 for e in range(count)]
    downs = [noise(width, hidden, seed=9 + e) / 7 for e in range(count)]
    packed = Experts(*([PackedLinear(tuple(one.shape), twins.dtype, twins.dtype, None, one.to(twins.dtype))
                            for one in many] for many in (weights, downs)))  # fmt: skip
    for rows in (1, 70):
        chosen = noise(rows, count, seed=5).topk(2).indices
        x, out = noise(rows, width, dtype=twins.dtype), noise(rows, width, seed=1, dtype=twins.dtype)
        twins.run("add_experts", out, x, noise(rows, 2, seed=6).softmax(-1), chosen, packed)


CASES: dict[str, Callable[[Twins], None]] = {
    case.__name__: case
    for case in (
        mixed_step, decodes, groups, page_sizes, scattered, latents, expanded, writes, rotations, latent_writes,
        code_writes, codes, norms, gates,
        chunks, steps, convolution, experts,
    )
}  # fmt: skip


def run(case: str, format: str, device: str) -> float:
    """The error of the twin in one case."""
    twins = Twins(device, FORMATS[format])
    CASES[case](twins)
    return twins.error


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = sys.argv[1:] or [f"{case} {format}" for case in CASES for format in FORMATS]
    print(json.dumps({one: run(*one.split(), "cpu") for one in asked}))

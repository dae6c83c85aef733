"""Builds every Triton kernel in every configuration that known models use, without a GPU.

python scripts/compile_kernels.py [--json FILE]

The ops themselves record their launches for a model's shapes (`launch.recording`). Each distinct launch is compiled for
sm_80, sm_90 and sm_100, and `cuobjdump` (bundled with triton) reads the resources from the machine code: registers,
stack and local bytes (spilled registers), shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanokv.codecs import resolve_codec
from nanokv.codecs.pages import Heads as CodedHeads
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.kernels import cuda
from nanokv.kernels.cuda.launch import Launch, recording
from nanokv.kernels.experts import Experts
from nanokv.kernels.linear import PackedLinear
from nanokv.kernels.planes import HeadNorms, KVPlanes, StatePlanes

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""The largest shared memory of one program, in bytes (CUDA C++ Programming Guide, compute capabilities)."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """One kernel in one configuration for one target: its resources and its PTX.

    row   kernel, target, config, registers, stack_bytes, local_bytes, shared_bytes
    """

    row: dict[str, Any]
    ptx: str


def source_of(launch: Launch) -> ASTSource:
    """The launch as a source for the compiler, specialised as triton's own launcher does: integers that are 1 become
    constants; pointers, and integers that are multiples of 16, are marked as divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        is_special = not parameter.do_not_specialize and isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or (is_special and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        if isinstance(value, torch.Tensor) or (is_special and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def config_of(launch: Launch) -> str:
    """The configuration in words: compile-time arguments, formats of tensors, options."""
    words = []
    for parameter in launch.kernel.params:
        value = launch.args[parameter.name]
        if parameter.is_constexpr:
            words.append(f"{parameter.name}={value.name if isinstance(value, tl.dtype) else value}")
    formats = sorted({POINTERS[v.dtype][1:] for v in launch.args.values() if isinstance(v, torch.Tensor)})
    return " ".join([*words, "/".join(formats), *(f"{name}={value}" for name, value in launch.options.items())])


def build(launch: Launch, target: str) -> Built:
    """Compiles a launch for a target. Raises the errors of triton."""
    compiled = triton.compile(source_of(launch), GPUTarget("cuda", TARGETS[target], 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    row = {
        "kernel": launch.kernel.__name__, "target": target, "config": config_of(launch), "registers": registers,
        "stack_bytes": stack, "local_bytes": local, "shared_bytes": compiled.metadata.shared,
    }  # fmt: skip
    return Built(row, compiled.asm["ptx"])


def batch_like(rows: int, requests: int, pages: int = 512) -> Batch:
    """A batch of these sizes on the meta device."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    flat = ints(rows)
    return Batch(flat.long(), flat, flat, flat, ints(requests + 1), ints(requests, pages), flat[:0].long(),
                 ints(requests), 16)  # fmt: skip


STEPS = {"one decode": (1, 1), "decodes": (32, 32), "mixed": (2048, 17)}
"""(rows, requests): a launch depends on these and on the model."""
DECODES = ("one decode", "decodes")


@dataclass(frozen=True)
class Heads:
    """Attention of a model: query heads, KV heads, head_dim, dims that rotate, and whether heads are normed."""

    heads: int
    kv_heads: int
    dim: int
    rotary: int
    are_normed: bool


GROUPED = {
    "SmolLM2-135M": Heads(9, 3, 64, 64, False),
    "Llama-3.1-8B": Heads(32, 8, 128, 128, False),
    "Qwen3-0.6B, 1.7B": Heads(16, 8, 128, 128, True),
    "Qwen3-8B, 30B-A3B": Heads(32, 8, 128, 128, True),
    "Qwen3.5-4B": Heads(16, 4, 256, 64, True),
}
LATENT = {"DeepSeek-V2-Lite": 16, "DeepSeek-V3": 128}  # heads; rank 512, rope 64, nope and value 128
CODECS = ("tq4", "fp8", "int8", "int4", "tq3", "tq2")
RECURRENT = {"Qwen3.5-0.8B": (16, 16), "Qwen3.5-4B, Qwen3-Next": (16, 32)}  # key and value heads, of 128 dims each

MIXTURES = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "DeepSeek-V2-Lite": (64, 6, 2048, 1408)}
"""Experts, experts of a row, width, and the hidden width between the two products."""


def _planes(kv_heads: int, dim: int, dtype: torch.dtype) -> KVPlanes:
    size = dim * dtype.itemsize
    return KVPlanes(0, 16 * kv_heads * size, 0, 32 * kv_heads * size * 28, 16, size, 16 * size, 0, kv_heads, dim,
                        dim, 0, dtype)  # fmt: skip


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _grouped(shape: Heads, dtype: torch.dtype, batch: Batch) -> None:
    planes, pool = _planes(shape.kv_heads, shape.dim, dtype), _empty(64, 1024, dtype=torch.uint8)
    qkv = _empty(batch.num_rows, (shape.heads + 2 * shape.kv_heads) * shape.dim, dtype=dtype)
    weight = _empty(shape.dim, dtype=dtype)
    norms = HeadNorms(weight, weight, 1e-6) if shape.are_normed else None
    cos_sin = _empty(4096, shape.rotary, dtype=torch.float32)
    cuda.rope_and_store(qkv, cos_sin, pool, planes, batch, shape.heads, norms)
    q = qkv[:, : shape.heads * shape.dim].unflatten(1, (shape.heads, shape.dim))
    cuda.paged_attention(q, pool, planes, batch, 0.1)


def _codes(codec: str, dtype: torch.dtype, batch: Batch) -> None:
    """8 KV heads of 128 dims, as Llama-3.1-8B and Qwen3 have them. K and V are written from float32."""
    layout = PageLayout([resolve_codec(codec, dtype).spec(8, 128, 16)], 16)
    planes = resolve_codec(codec, dtype).pages(layout, 0, CodedHeads(32, 8, 128, 0.1, torch.empty(8, 128)))._planes
    pool, kv = _empty(64, 1024, dtype=torch.uint8), _empty(batch.num_rows, 8, 128, dtype=torch.float32)
    cuda.store_codes(kv, kv, pool, planes, batch)
    cuda.code_attention(_empty(batch.num_rows, 32, 128, dtype=dtype), pool, planes, batch, 0.1)


def _latent(heads: int, dtype: torch.dtype, batch: Batch) -> None:
    size, rows, pool = dtype.itemsize, batch.num_rows, _empty(64, 1024, dtype=torch.uint8)
    planes = KVPlanes(0, 0, 16 * 512 * size, 16 * 576 * size * 27, 16, 512 * size, 0, 64 * size, 1, 512, 512, 64,
                          dtype)  # fmt: skip
    cos_sin = _empty(4096, 64, dtype=torch.float32)
    cuda.store_latent(_empty(rows, heads, 64, dtype=dtype), _empty(rows, 576, dtype=dtype), _empty(512, dtype=dtype),
                      1e-6, cos_sin, pool, planes, batch)  # fmt: skip
    cuda.paged_attention(_empty(rows, heads, 576, dtype=dtype), pool, planes, batch, 0.1)
    if rows > batch.num_requests:
        row = heads * 256 + 64
        own = KVPlanes(0, 128 * size, heads * 256 * size, 4096 * row * size, 4096, row * size, 256 * size,
                           row * size, heads, 128, 128, 64, dtype)  # fmt: skip
        cuda.paged_attention(_empty(rows, heads, 192, dtype=dtype), pool, own, batch, 0.1)


def _recurrent(key_heads: int, value_heads: int, dtype: torch.dtype, batch: Batch) -> None:
    matrices, channels = 4 * value_heads * 128 * 128, (2 * key_heads + value_heads) * 128
    planes = StatePlanes(0, matrices, 18 * (matrices + channels * 3 * dtype.itemsize), key_heads, value_heads, 128,
                             128, 4, dtype)  # fmt: skip
    states, heads = _empty(4, 1024, dtype=torch.uint8), _empty(value_heads, dtype=torch.float32)
    qkv, gates = (_empty(batch.num_rows, width, dtype=dtype) for width in (channels, 2 * value_heads))
    cuda.short_conv(qkv, _empty(channels, 4, dtype=dtype), states, planes, batch)
    rule = cuda.delta_rule_step if batch.num_rows == batch.num_requests else cuda.delta_rule_chunk
    read = rule(qkv, gates, heads, heads, states, planes, batch)
    cuda.gated_rms_norm(read, read, _empty(128, dtype=torch.float32), 1e-6)


def _experts(count: int, per_token: int, width: int, hidden: int, dtype: torch.dtype, batch: Batch) -> None:
    experts, rows = Experts(*([PackedLinear(shape, dtype, dtype, None, _empty(*shape, dtype=dtype))] * count
                                  for shape in ((2 * hidden, width), (width, hidden)))), batch.num_rows  # fmt: skip
    x, weights = _empty(rows, width, dtype=dtype), _empty(rows, per_token, dtype=torch.float32)
    cuda.add_experts(x, x, weights, _empty(rows, per_token, dtype=torch.int64), experts)


def _rows(width: int, dtype: torch.dtype, batch: Batch) -> None:
    x, weight = _empty(batch.num_rows, width, dtype=dtype), _empty(width, dtype=dtype)
    cuda.rms_norm(x, weight, 1e-6)
    cuda.add_rms_norm(x, x, weight, 1e-6)
    cuda.silu_mul(x)
    cuda.sigmoid_mul(x, x)


def launches(*steps: str) -> list[Launch]:
    """Every distinct launch of some steps, all if none is named: bfloat16 for all models, float16 for one of a kind."""
    with recording() as found:
        for rows, requests in (STEPS[step] for step in steps or STEPS):
            batch = batch_like(rows, requests)
            for dtype, models in ((torch.bfloat16, None), (torch.float16, 1)):
                for shape in list(GROUPED.values())[:models]:
                    _grouped(shape, dtype, batch)
                for codec in CODECS[:models]:
                    _codes(codec, dtype, batch)
                for heads in list(LATENT.values())[:models]:
                    _latent(heads, dtype, batch)
                for heads in list(RECURRENT.values())[:models]:
                    _recurrent(*heads, dtype, batch)
                for mixture in list(MIXTURES.values())[:models]:
                    _experts(*mixture, dtype, batch)
                for width in (576, 4096)[:models]:
                    _rows(width, dtype, batch)
    distinct: dict[str, Launch] = {}
    for launch in found:
        source = source_of(launch)
        key = (launch.kernel.__name__, source.signature, source.constants, source.attrs, launch.options)
        distinct.setdefault(repr(key), launch)
    return list(distinct.values())


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to this file.")
def main(path: Path | None) -> None:
    """Compile every kernel for every target and print its resources."""
    rows, console = [], Console(stderr=True)
    jobs = [(launch, target) for launch in launches() for target in TARGETS]
    for launch, target in track(jobs, "compiling", console=console, disable=not console.is_terminal):
        rows.append(build(launch, target).row)
    for row in rows:
        click.echo("{kernel:24} {target:7} {registers:4} registers {stack_bytes:5} + {local_bytes} stack and local "
                   "{shared_bytes:7} shared  {config}".format(**row))  # fmt: skip
    if path is not None:
        report = {"command": "compile_kernels", "triton": triton.__version__, "rows": rows}
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

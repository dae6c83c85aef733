"""The gated delta rule on a CPU: one recurrence for prefill and decode, exact to the bit in both.

The columns of a state are independent: number c of v is written to column c, which number c of o reads. So a thread
takes a head of one request and runs over its tokens, 32 columns at a time, each token in one pass over these columns
(simd.update_state), which stay in the first-level cache. Every sum adds in the order of the key rows. So the bits of a
row depend on the tokens of its request alone: not on batch mates, threads, or how a prompt is cut into steps.

Measured for Qwen3.5-0.8B (16 heads, 128 x 128), float32, one thread of an AMD Zen 3 (AVX2), milliseconds a layer: a
prefill of 2,048 takes 63, where the limit of the instructions is 43 (four products for each number of the state and
token); a decode 0.1 a request, as long as a copy of the state. What lost: the chunk form, whose matrix products are
faster but more; batched over heads, chunk after chunk (the torch twin) 210; with all chunks prepared at once
(transformers) 310. For a decode, transformers' recurrence: 0.6.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.elementwise import sum_of_squares
from nanokv.kernels.cpu.exp import ONE, ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, fma, narrow, prefetch_line, size_of, view, widen
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.simd import multiply, update_state
from nanokv.kernels.planes import StatePlanes

F32, INT32 = np.empty(0, np.float32), np.empty(0, np.int32)
BLOCK = np.int64(32)  # columns of a state that are updated together: 16 KiB of 128 rows
TOKENS = np.int64(32)  # tokens whose q and k are prepared at once, and stay in the second-level cache
EPS, LINEAR = np.float32(1e-6), np.float32(20.0)  # above LINEAR, softplus(x) is x


@inner
def _normalise(source, out, width, scale, format):
    """`width` numbers at an address, divided by their length and times a scale, as float32 to another address."""
    numbers, target = view(source, width, format), view(out, width, F32)
    for d in range(width):
        target[d] = widen(numbers[d])
    factor = scale / np.sqrt(sum_of_squares(target) + EPS)
    for d in range(width):
        target[d] *= factor


@inner
def _copy(source, source_stride, target, target_stride, rows, columns):
    """[rows, columns] float32 from one address to another; strides count floats from row to row."""
    for r in range(rows):
        a, b = view(source + 4 * r * source_stride, columns, F32), view(target + 4 * r * target_stride, columns, F32)
        for c in range(columns):
            b[c] = a[c]


@inner
def _gate(b, a, a_log, dt_bias):
    """The decay of the state before a token, and beta, the weight of what the token writes."""
    x = a + dt_bias
    softplus = x if x > LINEAR else math.log1p(math.exp(x))
    return math.exp(-math.exp(a_log) * softplus), ONE / (ONE + math.exp(-b))


@inner
def _run(tokens, v, v_stride, out, out_stride, width, state, stride, key_dim, q, k, decays, betas, scratch, format):
    """Runs some tokens, one after the other, over `width` columns of a state, a multiple of 16.

    v, out          addresses of the first token's numbers for these columns; strides count numbers from token to token
    state           address of float32 [key_dim, width], rows `stride` floats apart
    q, k            addresses of float32 [tokens, key_dim]
    decays, betas   float32 [tokens]
    scratch         address of float32 [3, width]
    """
    written_at, result_at, predicted_at = scratch, scratch + 4 * width, scratch + 8 * width
    written, result = view(written_at, width, F32), view(result_at, width, F32)
    predicted = view(predicted_at, width, F32)
    predicted[:] = ZERO
    multiply(np.int64(1), width, key_dim, k, key_dim, state, stride, predicted_at, width)
    for t in range(tokens):
        value = view(v + t * v_stride * size_of(format), width, format)
        for c in range(width):
            written[c] = betas[t] * fma(-decays[t], predicted[c], widen(value[c]))
        # The prediction after the last token is not used: its own k takes the place of the next.
        at, next_at = 4 * t * key_dim, 4 * min(t + 1, tokens - 1) * key_dim
        update_state(
            width, key_dim, state, stride, decays[t], written_at, k + at, q + at, k + next_at, result_at, predicted_at
        )
        target = view(out + t * out_stride * size_of(format), width, format)
        for c in range(width):
            target[c] = narrow(result[c], format)


@inner
def _work(
    counter, qkv, qkv_stride, gates, gates_stride, a_log, dt_bias, out, states, geometry, starts, positions, state_ids,
    requests, part, format,
):  # fmt: skip
    """One thread of the kernel: takes units (a request, a value head, `part` columns of it) until none is left."""
    _, offset, state_bytes, key_heads, value_heads, key_dim, value_dim, _ = geometry
    size, splits, blocks = size_of(format), (value_dim + part - 1) // part, (part + BLOCK - 1) // BLOCK
    out_stride, group = value_heads * value_dim, value_heads // key_heads
    starts, state_ids = view(starts, requests + 1, INT32), view(state_ids, requests, INT32)
    a_log, dt_bias = view(a_log, value_heads, F32), view(dt_bias, value_heads, F32)
    # One piece of memory for all that a thread needs, in cache lines of its own.
    memory = np.empty(blocks * key_dim * BLOCK + 2 * TOKENS * (key_dim + 1) + 3 * part + 16, np.float32)
    copy = (np.int64(memory.ctypes.data) + 63) // 64 * 64  # the state of a unit, block after block
    q = copy + 4 * blocks * key_dim * BLOCK
    k = q + 4 * TOKENS * key_dim
    scratch = k + 4 * TOKENS * key_dim
    decays, betas = view(scratch + 12 * part, TOKENS, F32), view(scratch + 12 * part + 4 * TOKENS, TOKENS, F32)
    while True:
        unit = fetch_add(counter, 1)
        if unit >= requests * value_heads * splits:
            break
        request, head, first = unit // (value_heads * splits), unit // splits % value_heads, unit % splits * part
        start, end, columns = np.int64(starts[request]), np.int64(starts[request + 1]), min(part, value_dim - first)
        if start == end:
            continue
        state_at = states + state_ids[request] * state_bytes + offset + 4 * (head * key_dim * value_dim + first)
        if view(positions, end, INT32)[start] == 0:
            for r in range(key_dim):
                view(state_at + 4 * r * value_dim, columns, F32)[:] = ZERO
        # A single token updates the state in place. For more, each block of columns is first copied side by side.
        is_copied = end - start > 1
        state, stride, width = (copy, BLOCK, BLOCK) if is_copied else (state_at, value_dim, columns)
        if is_copied:
            for c in range(0, columns, BLOCK):
                _copy(state_at + 4 * c, value_dim, copy + 4 * c * key_dim, BLOCK, key_dim, min(BLOCK, columns - c))
        for row in range(start, end, TOKENS):
            tokens = min(TOKENS, end - row)
            v = qkv + (row * qkv_stride + 2 * key_heads * key_dim + head * value_dim + first) * size
            for t in range(tokens):
                source = qkv + ((row + t) * qkv_stride + head // group * key_dim) * size
                _normalise(source, q + 4 * t * key_dim, key_dim, ONE / np.sqrt(np.float32(key_dim)), format)
                _normalise(source + key_heads * key_dim * size, k + 4 * t * key_dim, key_dim, ONE, format)
                gate = view(gates + (row + t) * gates_stride * size, 2 * value_heads, format)
                b, a = widen(gate[head]), widen(gate[value_heads + head])
                decays[t], betas[t] = _gate(b, a, a_log[head], dt_bias[head])
                for byte in range(0, columns * size, 64):
                    prefetch_line(v + t * qkv_stride * size + byte)
            target = out + (row * out_stride + head * value_dim + first) * size
            for c in range(0, columns, width):
                _run(
                    tokens, v + c * size, qkv_stride, target + c * size, out_stride, min(width, columns - c),
                    state + 4 * c * key_dim, stride, key_dim, q, k, decays, betas, scratch, format,
                )  # fmt: skip
        if is_copied:
            for c in range(0, columns, BLOCK):
                _copy(copy + 4 * c * key_dim, BLOCK, state_at + 4 * c, value_dim, key_dim, min(BLOCK, columns - c))
    memory[0] = ZERO  # numba frees an array after its last use, and an address is no use


@compiled
def _delta_rule(
    gomp, threads, qkv, qkv_stride, gates, gates_stride, a_log, dt_bias, out, states, geometry, starts, positions,
    state_ids, requests, part, format,
):  # fmt: skip
    numbers = (
        geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7],
    )  # fmt: skip
    args = (
        qkv, qkv_stride, gates, gates_stride, a_log, dt_bias, out, states, numbers, starts, positions, state_ids,
        requests, part, format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def delta_rule_chunk(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """As reference.delta_rule_chunk."""
    rows, heads, dim = qkv.shape[0], planes.value_heads, planes.value_dim
    (qkv_stride, step), (gates_stride, gates_step) = qkv.stride(), gates.stride()
    if qkv.shape[1] != planes.channels or gates.shape != (rows, 2 * heads) or gates.dtype != qkv.dtype or dim % 16:
        raise ValueError(f"delta_rule: qkv {tuple(qkv.shape)} and gates {tuple(gates.shape)} do not fit {planes}")
    if step != 1 or gates_step != 1:
        raise ValueError("delta_rule: the columns of qkv and of gates must lie side by side")
    out = qkv.new_empty(rows, heads * dim)
    if rows == 0:
        return out
    threads = threads_for(rows * heads * dim * planes.key_dim / 10e3)
    # A unit takes all columns of a head, unless that would leave threads without work.
    units = batch.num_requests * heads
    part = dim
    while part % 32 == 0 and units < 4 * threads:
        part, units = part // 2, units * 2
    a_log, dt_bias = a_log.float(), dt_bias.float()
    _delta_rule(
        GOMP, threads, qkv.data_ptr(), qkv_stride, gates.data_ptr(), gates_stride, a_log.data_ptr(),
        dt_bias.data_ptr(), out.data_ptr(), states.data_ptr(), planes.geometry, batch.request_starts.data_ptr(),
        batch.positions.data_ptr(), batch.state_ids.data_ptr(), batch.num_requests, part, FORMAT[qkv.dtype],
    )  # fmt: skip
    return out


def delta_rule_step(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """As reference.delta_rule_step. A row computes the same either way: the recurrence with one token."""
    return delta_rule_chunk(qkv, gates, a_log, dt_bias, states, planes, batch)

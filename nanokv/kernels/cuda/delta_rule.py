"""The gated delta rule on the GPU: a step for decodes, bound by the bytes of the states, and chunks for prefills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import launch, num_tiles, power_of_two
from nanokv.kernels.reference.delta_rule import CHUNK

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import StatePlanes

STEP_V, CHUNK_V = 32, 32
"""Value dims of a head in one program: the columns of a state [key_dim, value_dim] are independent."""


@triton.jit
def head_terms(
    qkv, qkv_row, rows, is_row, head, VALUE_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q and k of a value head [rows, BLOCK_K], float32, normalised to length 1; q is divided by sqrt(KEY_DIM), too."""
    dims = tl.arange(0, BLOCK_K)
    at = rows.to(tl.int64)[:, None] * qkv_row + head // (VALUE_HEADS // KEY_HEADS) * KEY_DIM + dims[None, :]
    is_valid = is_row[:, None] & (dims < KEY_DIM)[None, :]
    q = tl.load(qkv + at, mask=is_valid, other=0.0).to(tl.float32)
    k = tl.load(qkv + at + KEY_HEADS * KEY_DIM, mask=is_valid, other=0.0).to(tl.float32)
    q = q * (tl.rsqrt(tl.sum(q * q, 1) + 1e-6) * (KEY_DIM**-0.5))[:, None]
    return q, k * tl.rsqrt(tl.sum(k * k, 1) + 1e-6)[:, None]


@triton.jit
def head_values(qkv, qkv_row, rows, is_row, head, dims, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Some value dims of a head [rows, dims], float32."""
    at = rows.to(tl.int64)[:, None] * qkv_row + 2 * KEY_WIDTH + head * VALUE_DIM + dims[None, :]
    return tl.load(qkv + at, mask=is_row[:, None] & (dims < VALUE_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def head_gates(gates, gates_row, a_log, dt_bias, rows, is_row, head, VALUE_HEADS: tl.constexpr):
    """The logarithm of decay and beta of a head [rows], float32; both 0 where there is no row."""
    at = rows.to(tl.int64) * gates_row + head
    beta = tl.sigmoid(tl.load(gates + at, mask=is_row, other=0.0).to(tl.float32))
    a = tl.load(gates + at + VALUE_HEADS, mask=is_row, other=0.0).to(tl.float32)
    a += tl.load(dt_bias + head).to(tl.float32)
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    log_decay = -tl.exp(tl.load(a_log + head).to(tl.float32)) * softplus
    return tl.where(is_row, log_decay, 0.0), tl.where(is_row, beta, 0.0)


@triton.jit
def delta_rule_step_kernel(
    qkv, qkv_row, gates, gates_row, a_log, dt_bias, states, state_bytes, state_offset, state_ids, positions, out,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (request, value head, block of value dims): reads its columns of the state once, writes them once."""
    row, head = tl.program_id(0), tl.program_id(1)
    rows = row + tl.arange(0, 1)
    dims, values = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = (states + tl.load(state_ids + row).to(tl.int64) * state_bytes + state_offset).to(
        tl.pointer_type(tl.float32), bitcast=True
    )
    place = place + head * KEY_DIM * VALUE_DIM + dims[:, None] * VALUE_DIM + values[None, :]
    is_valid = (dims < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
    key_dims = tl.where(tl.load(positions + row) > 0, KEY_DIM, 0)  # at position 0 the state is 0
    state = tl.load(place, mask=is_valid & (dims < key_dims)[:, None], other=0.0)
    q, k = head_terms(qkv, qkv_row, rows, rows >= 0, head, VALUE_HEADS, KEY_HEADS, KEY_DIM, BLOCK_K)
    v = head_values(qkv, qkv_row, rows, rows >= 0, head, values, KEY_HEADS * KEY_DIM, VALUE_DIM)
    log_decay, beta = head_gates(gates, gates_row, a_log, dt_bias, rows, rows >= 0, head, VALUE_HEADS)
    q, k = tl.trans(q), tl.trans(k)  # [BLOCK_K, 1]
    state = state * tl.exp(log_decay)[:, None]
    written = beta[:, None] * (v - tl.sum(state * k, 0)[None, :])
    state = state + k * written
    tl.store(place, state, mask=is_valid)
    result = tl.sum(state * q, 0)
    at = (row.to(tl.int64) * VALUE_HEADS + head) * VALUE_DIM + values
    tl.store(out + at, result.to(out.dtype.element_ty), mask=values < VALUE_DIM)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b of float32. bfloat16 models round to tf32, which is still more precise than their inputs."""
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["requests"])
def chunk_pairs_kernel(
    qkv, qkv_row, gates, gates_row, a_log, dt_bias, starts, requests, positions, solved, seen,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (chunk, value head): the factors between pairs of a chunk's tokens. They need no state, so all chunks of
    a prompt run at once.

    solved   [rows, value_heads, CHUNK] inverse of the system of reference.delta_rule._chunk, its columns times beta.
             By forward substitution, row after row: sums of powers of the system would be fewer products, but cancel
             badly where keys repeat
    seen     [rows, value_heads, CHUNK] the factor of each earlier token's write in the result of a token
    """
    head = tl.program_id(1)
    start, end = chunk_of(starts, requests, positions, tl.program_id(0), CHUNK)
    if start >= end:
        return
    i = tl.arange(0, CHUNK)
    rows, is_row = start + i, start + i < end
    q, k = head_terms(qkv, qkv_row, rows, is_row, head, VALUE_HEADS, KEY_HEADS, KEY_DIM, BLOCK_K)
    log_decay, beta = head_gates(gates, gates_row, a_log, dt_bias, rows, is_row, head, VALUE_HEADS)
    total = tl.cumsum(log_decay, 0)
    # From j to i the state decays by exp(total_i - total_j). Hidden before exp: for j > i that would overflow.
    is_later = i[:, None] < i[None, :]
    between = tl.exp(tl.where(is_later, float("-inf"), total[:, None] - total[None, :]))
    at = (rows.to(tl.int64) * VALUE_HEADS + head)[:, None] * CHUNK + i[None, :]
    nothing = tl.zeros([CHUNK, CHUNK], tl.float32)
    tl.store(seen + at, between * product(q, tl.trans(k), nothing, PRECISION), mask=is_row[:, None])
    system = beta[:, None] * between * product(k, tl.trans(k), nothing, PRECISION)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, end - start):
        factors = tl.sum(tl.where((i == row)[:, None] & (i < row)[None, :], system, 0.0), 0)
        change = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(i[:, None] == row, inverse - change[None, :], inverse)
    tl.store(solved + at, inverse * beta[None, :], mask=is_row[:, None])


@triton.jit
def chunk_of(starts, requests, positions, tile, CHUNK: tl.constexpr):
    """First row and end of a chunk; chunks begin at positions of their request that are multiples of CHUNK.

    As launch.tile_of, but request r owns the tiles from starts[r] // CHUNK + 2 r on: its first chunk may be short.
    """
    low, high = 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        is_later = tl.load(starts + middle) // CHUNK + 2 * middle > tile
        low, high = tl.where(is_later, low, middle), tl.where(is_later, middle, high)
    first, end = tl.load(starts + low), tl.load(starts + low + 1)
    position = tl.load(positions + first, mask=first < end, other=0)
    before = (position // CHUNK + tile - first // CHUNK - 2 * low) * CHUNK - position  # rows before this chunk
    return first + tl.maximum(before, 0), tl.minimum(first + before + CHUNK, end)


@triton.jit
def delta_rule_chunk_kernel(
    qkv, qkv_row, gates, gates_row, a_log, dt_bias, states, state_bytes, state_offset, state_ids, starts, positions,
    solved, seen, out,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (request, value head, block of value dims): carries its columns of the state over chunks in registers.

    The names are those of reference.delta_rule._chunk.
    """
    request, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + request), tl.load(starts + request + 1)
    if start >= end:
        return
    position, i = tl.load(positions + start), tl.arange(0, CHUNK)
    dims, values = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = (states + tl.load(state_ids + request).to(tl.int64) * state_bytes + state_offset).to(
        tl.pointer_type(tl.float32), bitcast=True
    )
    place = place + head * KEY_DIM * VALUE_DIM + dims[:, None] * VALUE_DIM + values[None, :]
    is_valid = (dims < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
    key_dims = tl.where(position > 0, KEY_DIM, 0)  # at position 0 the state is 0
    state = tl.load(place, mask=is_valid & (dims < key_dims)[:, None], other=0.0)
    first = start - position % CHUNK
    for chunk in range(first, end, CHUNK):
        # The first and the last chunk may be short. Where there is no row, k and log_decay are 0: the state stays.
        base = tl.maximum(chunk, start)
        rows = base + i
        is_row = rows < tl.minimum(chunk + CHUNK, end)
        q, k = head_terms(qkv, qkv_row, rows, is_row, head, VALUE_HEADS, KEY_HEADS, KEY_DIM, BLOCK_K)
        v = head_values(qkv, qkv_row, rows, is_row, head, values, KEY_HEADS * KEY_DIM, VALUE_DIM)
        log_decay, _ = head_gates(gates, gates_row, a_log, dt_bias, rows, is_row, head, VALUE_HEADS)
        total = tl.cumsum(log_decay, 0)
        since_start = tl.exp(total)[:, None]
        at = (rows.to(tl.int64) * VALUE_HEADS + head)[:, None] * CHUNK + i[None, :]
        nothing = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        errors = v - since_start * product(k, state, nothing, PRECISION)
        result = since_start * product(q, state, nothing, PRECISION)
        written = product(tl.load(solved + at, mask=is_row[:, None], other=0.0), errors, nothing, PRECISION)
        result = product(tl.load(seen + at, mask=is_row[:, None], other=0.0), written, result, PRECISION)
        place_out = out + ((rows.to(tl.int64) * VALUE_HEADS + head) * VALUE_DIM)[:, None] + values[None, :]
        tl.store(place_out, result.to(out.dtype.element_ty), mask=is_row[:, None] & (values < VALUE_DIM)[None, :])
        whole = tl.sum(log_decay, 0)
        kept = k * tl.exp(whole - total)[:, None]
        state = product(tl.trans(kept), written, tl.exp(whole) * state, PRECISION)
    tl.store(place, state, mask=is_valid)


def _args(
    qkv: torch.Tensor, gates: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor, planes: StatePlanes
) -> dict[str, Any]:
    if qkv.shape[1] != planes.channels or qkv.stride(1) != 1 or gates.stride(1) != 1:
        raise ValueError(f"delta rule: qkv {tuple(qkv.shape)} with strides {qkv.stride()} does not fit {planes}")
    return {
        "qkv": qkv, "qkv_row": qkv.stride(0), "gates": gates, "gates_row": gates.stride(0), "a_log": a_log,
        "dt_bias": dt_bias, "KEY_HEADS": planes.key_heads, "VALUE_HEADS": planes.value_heads,
        "KEY_DIM": planes.key_dim, "BLOCK_K": power_of_two(planes.key_dim, 16),
    }  # fmt: skip


def _state_args(states: torch.Tensor, planes: StatePlanes, batch: Batch) -> dict[str, Any]:
    return {
        "states": states, "state_bytes": planes.state_bytes, "state_offset": planes.state_offset,
        "state_ids": batch.state_ids, "positions": batch.positions, "VALUE_DIM": planes.value_dim,
    }  # fmt: skip


def delta_rule_step(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """As reference.delta_rule_step."""
    out = qkv.new_empty(qkv.shape[0], planes.value_heads * planes.value_dim)
    block_v = min(STEP_V, power_of_two(planes.value_dim))
    launch(
        delta_rule_step_kernel, (qkv.shape[0], planes.value_heads, -(-planes.value_dim // block_v)), out=out,
        BLOCK_V=block_v, **_args(qkv, gates, a_log, dt_bias, planes), **_state_args(states, planes, batch),
    )  # fmt: skip
    return out


def delta_rule_chunk(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """As reference.delta_rule_chunk.

    Source   Yang et al. 2024 (Gated Delta Networks); the inverse apart from the recurrence as in Yang et al. 2024 (the
             chunked delta rule)
    """
    rows, requests, heads = qkv.shape[0], batch.num_requests, planes.value_heads
    out = qkv.new_empty(rows, heads * planes.value_dim)
    solved, seen = torch.empty(2, rows, heads, CHUNK, dtype=torch.float32, device=qkv.device)
    block_v = min(CHUNK_V, power_of_two(planes.value_dim, 16))
    args = _args(qkv, gates, a_log, dt_bias, planes)
    tiling: dict[str, Any] = {"CHUNK": CHUNK, "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else "tf32"}
    launch(
        chunk_pairs_kernel, (num_tiles(rows, 2 * requests, CHUNK), heads), starts=batch.request_starts,
        requests=requests, positions=batch.positions, solved=solved, seen=seen, num_warps=8, **args, **tiling,
    )  # fmt: skip
    launch(
        delta_rule_chunk_kernel, (requests, heads, -(-planes.value_dim // block_v)), starts=batch.request_starts,
        solved=solved, seen=seen, out=out, num_warps=8, num_stages=1, BLOCK_V=block_v, **args, **tiling,
        **_state_args(states, planes, batch),
    )  # fmt: skip
    return out

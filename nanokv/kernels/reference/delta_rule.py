"""Gated DeltaNet in torch: a short convolution and the gated delta rule, each with a state of fixed size per request.

    S <- decay * S                      the state [key_dim, value_dim] of a head decays,
    S <- S + k (beta * (v - S^T k))^T   is corrected by its error about v,
    o  = S^T q                          and is read by the query.

Source   Yang, Kautz and Hatamizadeh 2024 (Gated Delta Networks)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import StatePlanes

CHUNK = 64
"""Tokens of a chunk in `delta_rule_chunk`; chunks begin at positions that are multiples of it."""


def conv_view(states: torch.Tensor, planes: StatePlanes) -> torch.Tensor:
    """The last inputs of the convolution in every state.

    states   uint8 [num_states, state_bytes]
    Returns  a view [num_states, channels, kernel - 1], dtype planes.conv_dtype
    """
    width, size = planes.conv_dtype.itemsize, planes.channels * (planes.kernel - 1)
    numbers = states.view(planes.conv_dtype)[:, planes.conv_offset // width : planes.conv_offset // width + size]
    return numbers.view(-1, planes.channels, planes.kernel - 1)


def state_view(states: torch.Tensor, planes: StatePlanes) -> torch.Tensor:
    """The matrices of every state.

    states   uint8 [num_states, state_bytes]
    Returns  a view [num_states, value_heads, key_dim, value_dim], float32
    """
    size = planes.value_heads * planes.key_dim * planes.value_dim
    numbers = states.view(torch.float32)[:, planes.state_offset // 4 : planes.state_offset // 4 + size]
    return numbers.view(-1, planes.value_heads, planes.key_dim, planes.value_dim)


def _requests(batch: Batch) -> Iterator[tuple[int, int, int, int]]:
    """First row, row after the last, position of the first row and state id of each request that has rows."""
    starts = batch.request_starts.tolist()
    for request, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if start < end:
            yield start, end, int(batch.positions[start]), int(batch.state_ids[request])


def short_conv(
    x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor, planes: StatePlanes, batch: Batch
) -> torch.Tensor:
    """Causal convolution of each channel over the last `kernel` inputs of its request, then silu; in float32, IN PLACE.

    x        [rows, channels], float; may be a view with a larger row stride. The rows of a request are in order and
             without gaps. Results replace the inputs
    weight   [channels, kernel], float; the last column is multiplied with the row itself
    states   uint8 [num_states, state_bytes]; the conv plane of state batch.state_ids[r] holds the last kernel - 1
             inputs of request r, before and after the call. Not read where the request starts at position 0: inputs
             before that are 0
    Returns  x
    Source   Yang, Kautz and Hatamizadeh 2024

    Inputs are rounded to the plane's dtype before use, the rows of this step too, so results do not depend on how a
    prompt is cut into steps.
    """
    plane = conv_view(states, planes)
    for start, end, position, state in _requests(batch):
        before = plane[state].T if position else x.new_zeros(planes.kernel - 1, planes.channels, dtype=plane.dtype)
        inputs = torch.cat([before, x[start:end].to(plane.dtype)])
        windows = inputs.float().unfold(0, planes.kernel, 1)  # [rows, channels, kernel]
        x[start:end] = F.silu((windows * weight.float()).sum(-1)).to(x.dtype)
        plane[state] = inputs[1 - planes.kernel :].T
    return x


def _terms(
    qkv: torch.Tensor, gates: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor, planes: StatePlanes
) -> tuple[torch.Tensor, ...]:
    """q, k, v [rows, value_heads, dim], the logarithm of decay and beta [rows, value_heads]: float32."""
    width = planes.key_heads * planes.key_dim
    q, k, v = qkv.float().split([width, width, planes.value_heads * planes.value_dim], dim=-1)
    q, k = (part.unflatten(-1, (planes.key_heads, planes.key_dim)) for part in (q, k))
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    shared = planes.value_heads // planes.key_heads  # consecutive value heads that share a key head
    q, k = ((q * planes.key_dim**-0.5).repeat_interleave(shared, dim=1), k.repeat_interleave(shared, dim=1))
    b, a = gates.float().chunk(2, dim=-1)
    log_decay = -a_log.float().exp() * F.softplus(a + dt_bias.float())
    return q, k, v.unflatten(-1, (planes.value_heads, planes.value_dim)), log_decay, b.sigmoid()


def delta_rule_step(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """One token of every request, in float32: row r belongs to request r.

    qkv              [requests, channels], float: q | k | v after the convolution, each head's dims side by side. q and
                     k are normalised here
    gates            [requests, 2 * value_heads]: b, then a; beta = sigmoid(b), decay = exp(-exp(a_log) *
                     softplus(a + dt_bias)). qkv and gates may be views with a larger row stride
    a_log, dt_bias   [value_heads], float
    states           uint8 [num_states, state_bytes]; the matrices of state batch.state_ids[r] are updated IN PLACE.
                     Not read where the row is at position 0: the state before that is 0
    Returns          [requests, value_heads * value_dim], dtype of qkv, contiguous
    Source           Yang, Kautz and Hatamizadeh 2024
    """
    q, k, v, log_decay, beta = _terms(qkv, gates, a_log, dt_bias, planes)
    plane, ids = state_view(states, planes), batch.state_ids.long()
    state = plane[ids].masked_fill((batch.positions == 0)[:, None, None, None], 0.0)
    state = state * log_decay.exp()[..., None, None]
    error = v - (state * k.unsqueeze(-1)).sum(-2)
    state = state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    plane[ids] = state
    return (state * q.unsqueeze(-1)).sum(-2).flatten(1).to(qkv.dtype)


def delta_rule_chunk(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """Any number of tokens of each request, in order and without gaps; otherwise as `delta_rule_step`.

    qkv      [rows, channels]
    gates    [rows, 2 * value_heads]
    Returns  [rows, value_heads * value_dim], dtype of qkv, contiguous
    Source   Yang, Kautz and Hatamizadeh 2024 (the chunked form, `_chunk`)

    Chunks of 64 tokens are aligned to absolute positions: a request that starts at position 70 takes 58 rows first.
    """
    terms = _terms(qkv, gates, a_log, dt_bias, planes)
    plane = state_view(states, planes)
    out = qkv.new_empty(qkv.shape[0], planes.value_heads, planes.value_dim)
    for start, end, position, number in _requests(batch):
        state = plane[number] if position else torch.zeros_like(plane[number])
        while start < end:
            count = min(end - start, CHUNK - position % CHUNK)
            chunk = (term[start : start + count].transpose(0, 1) for term in terms)
            result, state = _chunk(state, *chunk)
            out[start : start + count] = result.transpose(0, 1).to(qkv.dtype)
            start, position = start + count, position + count
        plane[number] = state
    return out.flatten(1)


def _chunk(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens of one request as matrix products.

    The write of token i, w_i = beta_i (v_i - S^T k_i), depends on the writes of the tokens j < i of the chunk, through
    k_i . k_j and the decay between them. These equations are one unit lower triangular system for all w.

    state             [heads, key_dim, value_dim] before the first token
    q, k, v           [heads, tokens, dim]
    log_decay, beta   [heads, tokens]
    Returns           results [heads, tokens, value_dim], and the state after the last token
    """
    total = log_decay.cumsum(-1)
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    # From j to i the state decays by exp(total_i - total_j). Masked before exp: j > i would overflow.
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    since_start, beta = total.exp().unsqueeze(-1), beta.unsqueeze(-1)
    system = (beta * (k @ k.transpose(-1, -2)) * between).tril(-1)
    written = torch.linalg.solve_triangular(
        system, beta * (v - since_start * (k @ state)), upper=False, unitriangular=True
    )
    result = since_start * (q @ state) + ((q @ k.transpose(-1, -2)) * between) @ written
    until_end = (total[:, -1:] - total).exp().unsqueeze(-1)
    return result, since_start[:, -1:] * state + (until_end * k).transpose(-1, -2) @ written

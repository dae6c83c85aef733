"""Requests with random inputs for the ops of Gated DeltaNet, and their results in float64."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels import cpu
from nanokv.kernels.planes import StatePlanes

F32 = torch.float32
Rows = dict[int, tuple[int, int]]  # request -> its first position in a step, and the one after its last


class Requests:
    """Requests with random inputs, and a pool of shuffled states in which every byte reads as NaN.

    The gates are well conditioned: decays near 1, as trained models have them. Fast decays give results near 0, for
    which float32 itself is inexact.
    """

    def __init__(self, lengths, key_heads=2, group=2, key_dim=32, value_dim=32, dtype=F32, conv_dtype=F32):
        noise = torch.Generator().manual_seed(sum(lengths) + key_dim)
        heads = key_heads * group
        channels = 2 * key_heads * key_dim + heads * value_dim
        conv = Plane("conv", (channels, 3), conv_dtype, None)
        layout = PageLayout([LayerSpec(state=(conv, Plane("state", (heads, key_dim, value_dim), F32, None)))] * 3, 16)
        offsets = layout.state(1, "conv").offset, layout.state(1, "state").offset
        self.planes = StatePlanes(
            *offsets, layout.state_bytes, key_heads, heads, key_dim, value_dim, 4, conv_dtype
        )  # fmt: skip
        assert self.planes.channels == channels
        self.lengths, self.num_states, self.truths = lengths, len(lengths) + 2, {}
        self.ids = torch.randperm(self.num_states, generator=torch.Generator().manual_seed(1)).int()
        self.weight = (torch.randn(channels, 4, generator=noise) / 2).to(conv_dtype)
        self.a_log = (0.02 + 0.48 * torch.rand(heads, generator=noise)).log()
        self.dt_bias = 0.1 * torch.randn(heads, generator=noise) - 2
        self.x = [torch.randn(length, channels, generator=noise).to(dtype) for length in lengths]
        self.gates = [torch.randn(length, 2 * heads, generator=noise).to(dtype) for length in lengths]

    def pool(self) -> torch.Tensor:
        return torch.full((self.num_states, self.planes.state_bytes), 255, dtype=torch.uint8)

    def step(self, rows: Rows) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """A step over some positions of some requests: batch, x and gates, which are columns of one wide tensor."""
        positions = torch.cat([torch.arange(*span, dtype=torch.int32) for span in rows.values()])
        starts = torch.tensor([0, *np.cumsum([end - start for start, end in rows.values()])], dtype=torch.int32)
        unused = torch.zeros(len(positions), dtype=torch.int32)
        batch = Batch(
            token_ids=unused.long(), positions=positions, write_pages=unused, write_slots=unused, request_starts=starts,
            page_tables=unused[:, None], logit_rows=unused.long(), state_ids=self.ids[list(rows)], page_size=16,
        )  # fmt: skip
        x = torch.cat([self.x[request][slice(*span)] for request, span in rows.items()])
        gates = torch.cat([self.gates[request][slice(*span)] for request, span in rows.items()])
        wide = torch.cat([gates, x, gates], dim=1)
        return batch, wide[:, gates.shape[1] : -gates.shape[1]], wide[:, -gates.shape[1] :]

    def rule(self, rows: Rows, states: torch.Tensor, twin=cpu, op="delta_rule_chunk") -> torch.Tensor:
        """The delta rule alone, as if x had been through the convolution."""
        batch, x, gates = self.step(rows)
        return getattr(twin, op)(x, gates, self.a_log, self.dt_bias, states, self.planes, batch)

    def conv(self, rows: Rows, states: torch.Tensor, twin=cpu) -> torch.Tensor:
        batch, x, _ = self.step(rows)
        return twin.short_conv(x, self.weight, states, self.planes, batch)

    def layer(self, rows: Rows, states: torch.Tensor) -> torch.Tensor:
        """The convolution, then the delta rule."""
        batch, x, gates = self.step(rows)
        qkv = cpu.short_conv(x, self.weight, states, self.planes, batch)
        return cpu.delta_rule_chunk(qkv, gates, self.a_log, self.dt_bias, states, self.planes, batch)

    def whole(self) -> Rows:
        return {request: (0, length) for request, length in enumerate(self.lengths)}

    def terms(self, request: int) -> tuple[torch.Tensor, ...]:
        """q, k, v [tokens, heads, dim] as the projection gives them, log of decay and beta [tokens, heads]; float64."""
        planes, x, gates = self.planes, self.x[request].double(), self.gates[request].double()
        width = planes.key_heads * planes.key_dim
        q, k, v = x.split([width, width, planes.value_heads * planes.value_dim], dim=1)
        q, k = (part.view(len(x), planes.key_heads, planes.key_dim) for part in (q, k))
        b, a = gates.chunk(2, dim=1)
        log_decay = -self.a_log.double().exp() * F.softplus(a + self.dt_bias.double())
        return q, k, v.view(len(x), planes.value_heads, planes.value_dim), log_decay, b.sigmoid()

    def truth(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Results [tokens, heads * value_dim] and the state after the last token; float64."""
        if request not in self.truths:
            self.truths[request] = self.recurrence(request)
        return self.truths[request]

    def recurrence(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rule as it is defined, token after token."""
        q, k, v, log_decay, beta = self.terms(request)
        q, k = ((part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt()) for part in (q, k))
        group = self.planes.value_heads // self.planes.key_heads
        q, k = (part.repeat_interleave(group, dim=1) for part in (q * self.planes.key_dim**-0.5, k))
        state, results = torch.zeros(self.planes.value_heads, k.shape[2], v.shape[2], dtype=torch.float64), []
        for t in range(len(q)):
            state = log_decay[t].exp()[:, None, None] * state
            error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
            results.append(torch.einsum("hkv,hk->hv", state, q[t]).flatten())
        return torch.stack(results), state

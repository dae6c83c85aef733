"""Times one Gated DeltaNet layer without its projections on this CPU: Qwen3.5-0.8B's shape, float32.

python scripts/bench_delta_rule.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import bounded_spins  # noqa: F401
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as transformers

from nanokv.core.batch import Batch
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO
from nanokv.kernels.planes import StatePlanes

HEADS, DIM, TOKENS, REPEATS = 16, 128, 2048, 9
WIDTH, STATE = HEADS * DIM, 4 * HEADS * DIM * DIM
PLANES = StatePlanes(STATE, 0, STATE + 6 * 3 * WIDTH, HEADS, HEADS, DIM, DIM, 4, torch.bfloat16)
KEEP = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
LAYERS = 18  # between two uses of a state, the states of all other layers have passed through the CPU caches


def batch_of(requests: int, rows: int, position: int) -> Batch:
    """A step with `rows` rows of each request, starting at `position`."""
    positions = torch.arange(position, position + rows).repeat(requests).int()
    starts, unused = torch.arange(0, requests * rows + 1, rows).int(), torch.zeros_like(positions)
    ids = torch.arange(requests).int()
    return Batch(unused.long(), positions, unused, unused, starts, unused[:, None], unused.long(), ids, 16)


def measure(name: str, run: Callable[[], object], calls: int = 1) -> None:
    """Prints the milliseconds of one of the `calls` of a run. The first run is a warm-up."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3 / calls)
    times = sorted(times[1:])
    print(f"{name:24} {times[0]:8.3f} {times[REPEATS // 2]:8.3f} {times[-1]:8.3f}", flush=True)


def terms_of(qkv: torch.Tensor, gates: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor) -> list[torch.Tensor]:
    """Inputs of transformers: q, k, v [1, rows, heads, dim], the logarithm of the decay and beta [1, rows, heads]."""
    b, a = gates[None].chunk(2, dim=2)
    heads = [part.reshape(1, -1, HEADS, DIM) for part in qkv.split(WIDTH, dim=1)]
    return [*heads, -a_log.exp() * F.softplus(a + dt_bias), b.sigmoid()]


def prefill(x, z, gates, weight, norm, a_log, dt_bias) -> None:
    print(f"\nprefill of {TOKENS:,} tokens")
    batch, states = batch_of(1, TOKENS, 0), torch.zeros(1, PLANES.state_bytes, dtype=torch.uint8)
    columns, terms, gated = x.T[None], terms_of(x, gates, a_log, dt_bias), transformers.Qwen3_5RMSNormGated(DIM)
    given = (x, gates, a_log, dt_bias, states, PLANES, batch)
    out = AUTO.delta_rule_chunk(*given)
    measure("delta_rule_chunk", lambda: AUTO.delta_rule_chunk(*given))
    measure("  its torch twin", lambda: reference.delta_rule_chunk(*given))
    measure("  transformers", lambda: transformers.torch_chunk_gated_delta_rule(*terms, **KEEP))
    measure("gated_rms_norm", lambda: AUTO.gated_rms_norm(out, z, norm, 1e-6))
    measure("  transformers", lambda: gated(out.view(-1, DIM), z.reshape(-1, DIM)))
    measure("short_conv", lambda: AUTO.short_conv(x, weight, states, PLANES, batch))
    measure("  transformers", lambda: transformers.causal_conv1d_fn(columns, weight, activation="silu"))


def decode(requests: int, x, z, gates, weight, norm, a_log, dt_bias) -> None:
    print(f"\ndecode of {requests} requests, {LAYERS} layers in sequence")
    batch, x, z, gates = batch_of(requests, 1, 300), x[:requests], z[:requests], gates[:requests]
    layers = [(x.clone(), torch.zeros(requests, PLANES.state_bytes, dtype=torch.uint8)) for _ in range(LAYERS)]
    terms = [term.transpose(0, 1) for term in terms_of(x, gates, a_log, dt_bias)]
    matrices = [torch.zeros(requests, HEADS, DIM, DIM) for _ in range(LAYERS)]

    def step():
        for x, states in layers:
            AUTO.delta_rule_step(x, gates, a_log, dt_bias, states, PLANES, batch)

    def conv():
        for x, states in layers:
            AUTO.short_conv(x, weight, states, PLANES, batch)

    def peer():
        for state in matrices:
            transformers.torch_recurrent_gated_delta_rule(*terms, initial_state=state, **KEEP)

    measure("delta_rule_step", step, LAYERS)
    measure("  transformers", peer, LAYERS)
    measure("gated_rms_norm", lambda: AUTO.gated_rms_norm(z, z, norm, 1e-6))
    measure("short_conv", conv, LAYERS)


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; milliseconds of a layer: fastest, median, slowest of {REPEATS}")
    fused = torch.randn(TOKENS, 4 * WIDTH + 2 * HEADS)  # the output of one fused projection
    x, z, gates = fused.split([3 * WIDTH, WIDTH, 2 * HEADS], dim=1)
    a_log, dt_bias = (0.02 + 0.48 * torch.rand(HEADS)).log(), torch.full((HEADS,), -2.0)
    given = (x, z, gates, torch.randn(3 * WIDTH, 4) / 2, torch.ones(DIM), a_log, dt_bias)
    with torch.no_grad():
        prefill(*given)
        decode(1, *given)
        decode(16, *given)


if __name__ == "__main__":
    main()

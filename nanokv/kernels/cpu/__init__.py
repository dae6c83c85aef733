"""The numba twins: the ops of reference/, compiled for this CPU."""

# ruff: noqa: F401  the ops are imported for others

from nanokv.kernels.cpu.attention import paged_attention
from nanokv.kernels.cpu.code_attention import code_attention, group_attention
from nanokv.kernels.cpu.code_store import refuse_unwritable, store_codes
from nanokv.kernels.cpu.delta_rule import delta_rule_chunk, delta_rule_step
from nanokv.kernels.cpu.elementwise import add_rms_norm, cast, gated_rms_norm, rms_norm, sigmoid_mul, silu_mul
from nanokv.kernels.cpu.short_conv import short_conv
from nanokv.kernels.cpu.store import rope, rope_and_store, store_latent
